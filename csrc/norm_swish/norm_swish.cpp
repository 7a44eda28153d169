// BatchNorm of a gated map and the swish behind it, in one reading for the statistics and one for the result.
//
// A gate scales an example's channel, so the statistics of g y follow from those of y in each example and channel, and
// normalising g y is a line a y + d whose slope is the example's own: a gate costs no pass over the map. The backward
// needs two sums over each example and channel, of dL/du and of dL/du (y - its mean); the gradients of gate, weight and
// bias and the line that dL/dy is in (dL/du, y) follow from these. Only y is kept, and dL/du is computed twice.
#include "norm_swish/norm_swish.h"

#include <cmath>
#include <cstring>

#include "common/buffer.h"

namespace movae {
namespace {

constexpr int64_t kWidest = 16;        // numbers of the widest vector
constexpr int64_t kBlock = 64;         // periods that are summed in T
constexpr int64_t kStripBytes = 1024;  // of y per strip

// An example's numbers: `count` whole periods, the least multiple of both the channels and a vector.
struct Strips {
    int64_t period, count, strip;
};

#define MOVAE_KERNEL "norm_swish/kernel.h"
#include "common/every_isa.h"

template <class T>
struct Path {
    void (*sums)(const T*, const Strips&, const T*, T*, double*, double*);
    void (*forward[2])(const T*, const Strips&, const T*, const T*, T*);
    void (*gradient_sums[2])(const T*, const T*, const Strips&, const T*, const T*, const T*, T*, double*, double*);
    void (*backward[2])(const T*, const T*, const Strips&, const T* const*, T*);
};
#define MOVAE_PATH(ns)                                                                                                         \
    Path<T> {                                                                                                                  \
        ns::sums<T>, {ns::forward<T, false>, ns::forward<T, true>}, {ns::gradient_sums<T, false>, ns::gradient_sums<T, true>}, \
        {                                                                                                                      \
            ns::backward<T, false>, ns::backward<T, true>                                                                      \
        }                                                                                                                      \
    }

template <class T>
Path<T> choose(InstructionSet isa) {
#ifdef __x86_64__
    if (vectors_of(isa) == InstructionSet::kAvx512) return MOVAE_PATH(avx512);
    if (isa == InstructionSet::kAvx2) return MOVAE_PATH(avx2);
#endif
    return MOVAE_PATH(portable);
}

Strips strips_of(int64_t pixels, int64_t channels, int64_t bytes) {
    int64_t period = channels;
    while (period % kWidest) period += channels;
    const int64_t strip = kStripBytes / (period * bytes);
    return {period, pixels * channels / period, strip < 4 ? 4 : strip > kBlock ? kBlock : strip};
}

template <class T>
double gate_of(const NormInputs<T>& in, int64_t example, int64_t channel) {
    return in.gate ? double(in.gate[example * in.gate_stride + channel]) : 1.0;
}

// Per channel, 1 / sqrt(var + eps), and that times the weight.
class Scales {
  public:
    template <class T>
    Scales(const NormInputs<T>& in, const NormStatistics& s) : numbers_(2 * in.channels), channels_(in.channels) {
        for (int64_t c = 0; c < in.channels; ++c) {
            const double inverse = 1 / std::sqrt(s.all_var[c] + in.eps);
            numbers_[c] = inverse, numbers_[channels_ + c] = inverse * double(in.weight[c]);
        }
    }
    double inverse(int64_t c) const { return numbers_[c]; }
    double weighted(int64_t c) const { return numbers_[channels_ + c]; }

  private:
    Buffer<double> numbers_;
    int64_t channels_;
};

// One thread's work on one example after the other. Rows are of one period; where an example's last period is not
// complete, it is filled up and computed in rows of its own.
template <class T>
class Worker {
  public:
    Worker(const NormInputs<T>& in, const NormStatistics& s, InstructionSet isa)
        : in_(in), s_(s), path_(choose<T>(isa)), strips_(strips_of(in.pixels, in.channels, sizeof(T))),
          last_{strips_.period, 1, 1}, done_(strips_.count * strips_.period), rest_(in.pixels * in.channels - done_),
          rows_(kRows * strips_.period), sums_(2 * strips_.period) {
        fill(kZeros, [](int64_t) { return T(0); });
    }

    // The means of y over the example's pixels, and the sums of squared distances from them.
    void measure(int64_t b) const {
        const double n = double(in_.pixels);
        double *mean = s_.mean + b * in_.channels, *squares = s_.squares + b * in_.channels;
        for (int64_t c = 0; c < in_.channels; ++c) mean[c] = 0;
        // About 0 first, then about the means so found: squares of distances do not cancel.
        for (int pass = 0; pass < 2; ++pass) {
            begin(b);
            path_.sums(of(in_.y), strips_, row(kMean), row(kParts), sums_.get(), sums_.get() + strips_.period);
            if (rest_) {
                path_.sums(rest_of(in_.y, kLastY, kMean), last_, row(kMean), row(kParts), sums_.get(),
                           sums_.get() + strips_.period);
            }
            for (int64_t c = 0; c < in_.channels; ++c) {
                const double first = sum(0, c), left = sum(1, c) - first * first / n;
                mean[c] = double(row(kMean)[c]) + first / n;
                squares[c] = left < 0 ? 0 : left;  // below 0 by rounding alone; a NaN stays one
            }
        }
    }

    void write(int64_t b, const Scales& scales, T* out) const {
        begin(b);
        set_line(scales);
        path_.forward[in_.swish](of(in_.y), strips_, row(kSlope), row(kOffset), of(out));
        if (rest_) {
            path_.forward[in_.swish](rest_of(in_.y, kLastY, kMean), last_, row(kSlope), row(kOffset), row(kLastOut));
            std::memcpy(of(out) + done_, row(kLastOut), rest_ * sizeof(T));
        }
    }

    // first [C]: sums of dL/du, second [C]: of dL/du (y - the example's mean).
    void sum_gradients(int64_t b, const Scales& scales, const T* grad, double* first, double* second) const {
        begin(b);
        set_line(scales);
        double *ones = sums_.get(), *twos = ones + strips_.period;
        path_.gradient_sums[in_.swish](of(in_.y), of(grad), strips_, row(kSlope), row(kOffset), row(kMean), row(kParts), ones,
                                       twos);
        if (rest_) {
            path_.gradient_sums[in_.swish](rest_of(in_.y, kLastY, kMean), rest_of(grad, kLastGrad, kZeros), last_, row(kSlope),
                                           row(kOffset), row(kMean), row(kParts), ones, twos);
        }
        for (int64_t c = 0; c < in_.channels; ++c) {
            first[c] = sum(0, c);
            // The loops' means are rounded to T.
            second[c] = sum(1, c) + (double(row(kMean)[c]) - s_.mean[b * in_.channels + c]) * first[c];
        }
    }

    // per_bias, per_weight [C]: dL/dbias and dL/dweight over the numbers of a channel.
    void write_gradient(int64_t b, const Scales& scales, const NormGradients<T>& g, const double* per_bias,
                        const double* per_weight) const {
        begin(b);
        set_line(scales);
        for (int64_t c = 0; c < in_.channels; ++c) {
            const double gate = gate_of(in_, b, c), slope = gate * scales.weighted(c);
            const double bend = -slope * scales.inverse(c) * per_weight[c];
            row(kLine)[c] = T(slope), row(kLine + 1)[c] = T(bend * gate);
            row(kLine + 2)[c] = T(bend * (gate * double(row(kMean)[c]) - s_.all_mean[c]) - slope * per_bias[c]);
        }
        for (int i = 0; i < 3; ++i) repeat(kLine + i);
        const T* rows[] = {row(kSlope), row(kOffset), row(kMean), row(kLine), row(kLine + 1), row(kLine + 2)};
        path_.backward[in_.swish](of(in_.y), of(g.out), strips_, rows, of(g.y));
        if (rest_) {
            path_.backward[in_.swish](rest_of(in_.y, kLastY, kMean), rest_of(g.out, kLastGrad, kZeros), last_, rows,
                                      row(kLastOut));
            std::memcpy(of(g.y) + done_, row(kLastOut), rest_ * sizeof(T));
        }
    }

  private:
    enum Row { kZeros, kMean, kSlope, kOffset, kLine, kParts = kLine + 3, kLastY = kParts + 2, kLastGrad, kLastOut, kRows };

    T* row(int i) const { return rows_.get() + i * strips_.period; }
    void repeat(int i) const {
        for (int64_t j = in_.channels; j < strips_.period; ++j) row(i)[j] = row(i)[j - in_.channels];
    }
    template <class Value>  // channel -> number
    void fill(int i, const Value& value) const {
        for (int64_t c = 0; c < in_.channels; ++c) row(i)[c] = value(c);
        repeat(i);
    }
    void begin(int64_t b) const {
        b_ = b;
        fill(kMean, [&](int64_t c) { return T(s_.mean[b * in_.channels + c]); });
        std::memset(sums_.get(), 0, 2 * strips_.period * sizeof(double));
    }
    void set_line(const Scales& scales) const {
        fill(kSlope, [&](int64_t c) { return T(gate_of(in_, b_, c) * scales.weighted(c)); });
        fill(kOffset, [&](int64_t c) { return T(double(in_.bias[c]) - s_.all_mean[c] * scales.weighted(c)); });
    }
    template <class P>
    P* of(P* map) const {
        return map + b_ * in_.pixels * in_.channels;
    }
    const T* rest_of(const T* map, int to, int filler) const {
        for (int64_t j = 0; j < strips_.period; ++j) row(to)[j] = j < rest_ ? of(map)[done_ + j] : row(filler)[j];
        return row(to);
    }
    double sum(int which, int64_t channel) const {
        double total = 0;
        for (int64_t j = channel; j < strips_.period; j += in_.channels) total += sums_[which * strips_.period + j];
        return total;
    }

    const NormInputs<T>& in_;
    const NormStatistics& s_;
    const Path<T> path_;
    const Strips strips_, last_;
    const int64_t done_, rest_;  // numbers in whole periods, and behind them
    const Buffer<T> rows_;
    const Buffer<double> sums_;  // two per place in the period
    mutable int64_t b_ = 0;
};

// Calls work(worker, b) for every example; which thread takes it changes no result.
template <class T, class Work>
void over_examples(const NormInputs<T>& in, const NormStatistics& s, InstructionSet isa, int threads, const Work& work) {
#pragma omp parallel num_threads(threads)
    {
        const Worker<T> worker(in, s, isa);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < in.batch; ++b) work(worker, b);
    }
}

// The mean and variance of gate * y over the batch, from those of y in each example.
template <class T>
void combine_examples(const NormInputs<T>& in, const NormStatistics& s) {
    const double n = double(in.pixels);
    for (int64_t c = 0; c < in.channels; ++c) {
        double mean = 0, squares = 0;
        for (int64_t b = 0; b < in.batch; ++b) mean += gate_of(in, b, c) * s.mean[b * in.channels + c];
        mean /= double(in.batch);
        for (int64_t b = 0; b < in.batch; ++b) {
            const double g = gate_of(in, b, c), distance = g * s.mean[b * in.channels + c] - mean;
            squares += g * g * s.squares[b * in.channels + c] + n * distance * distance;
        }
        s.all_mean[c] = mean, s.all_var[c] = squares / (n * double(in.batch));
    }
}

// The gradients of bias, weight and gates from the sums of each example [B, C]; those of bias and weight over the numbers
// of a channel go into per_bias and per_weight [C].
template <class T>
void combine_gradients(const NormInputs<T>& in, const NormStatistics& s, const Scales& scales, const double* firsts,
                       const double* seconds, const NormGradients<T>& g, double* per_bias, double* per_weight) {
    const int64_t channels = in.channels;
    const double n = double(in.pixels), all = n * double(in.batch);
    for (int64_t c = 0; c < channels; ++c) {
        const double inverse = scales.inverse(c);
        double bias = 0, weight = 0, gates = 0;
        for (int64_t at = c; at < in.batch * channels; at += channels) {
            const double gate = gate_of(in, at / channels, c);
            bias += firsts[at];
            weight += inverse * (gate * seconds[at] + (gate * s.mean[at] - s.all_mean[c]) * firsts[at]);
        }
        g.bias[c] = T(bias), g.weight[c] = T(weight);
        per_bias[c] = bias / all, per_weight[c] = weight / all;
        for (int64_t at = c; g.gate && at < in.batch * channels; at += channels) {
            const double gate = gate_of(in, at / channels, c), distance = gate * s.mean[at] - s.all_mean[c];
            // Sums of dL/d(g y) over scale, and of it times (y - its mean), over the example's pixels.
            const double plain = firsts[at] - n * (per_bias[c] + per_weight[c] * inverse * distance);
            const double centred = seconds[at] - per_weight[c] * inverse * gate * s.squares[at];
            const double gradient = scales.weighted(c) * (centred + s.mean[at] * plain);
            gates += gradient;
            if (in.gate_stride) g.gate[at] = T(gradient);
        }
        if (g.gate && !in.gate_stride) g.gate[c] = T(gates);
    }
}

}  // namespace

template <class T>
void norm_swish(const NormInputs<T>& in, T* out, const NormStatistics& s, InstructionSet isa, int threads) {
    over_examples(in, s, isa, threads, [](const Worker<T>& worker, int64_t b) { worker.measure(b); });
    combine_examples(in, s);
    const Scales scales(in, s);
    over_examples(in, s, isa, threads, [&](const Worker<T>& worker, int64_t b) { worker.write(b, scales, out); });
}

template <class T>
void norm_swish_backward(const NormInputs<T>& in, const NormStatistics& s, const NormGradients<T>& g, InstructionSet isa,
                         int threads) {
    const int64_t channels = in.channels;
    const Scales scales(in, s);
    const Buffer<double> firsts(in.batch * channels), seconds(in.batch * channels), per_bias(channels), per_weight(channels);
    over_examples(in, s, isa, threads, [&](const Worker<T>& worker, int64_t b) {
        worker.sum_gradients(b, scales, g.out, firsts.get() + b * channels, seconds.get() + b * channels);
    });
    combine_gradients(in, s, scales, firsts.get(), seconds.get(), g, per_bias.get(), per_weight.get());
    over_examples(in, s, isa, threads, [&](const Worker<T>& worker, int64_t b) {
        worker.write_gradient(b, scales, g, per_bias.get(), per_weight.get());
    });
}

template void norm_swish(const NormInputs<float>&, float*, const NormStatistics&, InstructionSet, int);
template void norm_swish(const NormInputs<double>&, double*, const NormStatistics&, InstructionSet, int);
template void norm_swish_backward(const NormInputs<float>&, const NormStatistics&, const NormGradients<float>&, InstructionSet,
                                  int);
template void norm_swish_backward(const NormInputs<double>&, const NormStatistics&, const NormGradients<double>&,
                                  InstructionSet, int);

}  // namespace movae
