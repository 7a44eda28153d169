// log q(z) and sum_d log q(z_d) of the aggregate posterior, forward and backward, without a B x B x D buffer.
//
// Every (sample i, posterior j, dimension d) costs one exponential per pass; nothing of size B x B is stored. The
// posteriors lie transposed, [D, B], so that a vector holds one dimension of several j. The weights W_ij are one constant but
// for two positions per row (stratified sampling): the constant goes into the log-sum-exp, the two others enter as factors.
#include "tc_terms/tc_terms.h"

#include <cmath>
#include <cstring>

#include "common/buffer.h"

namespace movae {
namespace {

constexpr int64_t kForwardBlock = 2048;  // posteriors per pass: three rows of them stay in the first-level cache
constexpr int64_t kBackwardBlock = 256;  // and here 2 D rows of gradients do, for D up to about 16
constexpr int64_t kPad = 32;             // two of the widest vectors

// A sample that no posterior reaches has maximum -inf and sum 0; its gradients are 0, not NaN.
template <class T>
T finite_or_zero(T x) {
    return x == -T(INFINITY) ? T(0) : x;
}
template <class T>
T over(T x, T total) {
    return total == T(0) ? T(0) : x / total;
}

template <class T>
struct Problem {
    int64_t batch, padded, dims;
    const T* z;                 // [B, D]
    const T *mu, *niv, *c;      // [D, padded]: mean, -1 / (2 variance), -(log 2 pi + logvar) / 2
    double log_w;               // log of the common weight
    T own, other;               // W_ii and W_i,i+1 over the common weight (stratified sampling)
    T *log_q_z, *log_prod_q_z;  // [B]
    T *top, *total;             // [B, D + 1]: max and sum of exp(. - max) of each dimension and, last, of the joint

    void place(T* w, int64_t i, int64_t j0, int64_t n, T at_own, T at_next) const {
        const int64_t next = (i + 1) % batch;
        if (next >= j0 && next < j0 + n) w[next - j0] = at_next;
        if (i >= j0 && i < j0 + n) w[i - j0] = at_own;  // last: with B = 1 the diagonal wins
    }
    void set_weights(T* w, int64_t i, int64_t j0, int64_t n) const { place(w, i, j0, n, own, other); }
    void clear_weights(T* w, int64_t i, int64_t j0, int64_t n) const { place(w, i, j0, n, 1, 1); }
};

#define MOVAE_KERNEL "tc_terms/kernel.h"
#include "common/every_isa.h"

template <class T>
struct Path {
    void (*forward[2])(const Problem<T>&, int64_t, int64_t, T*);
    void (*backward[2])(const Problem<T>&, const TcGradients<T>&, int64_t, int64_t, double*, T*);
};
#define MOVAE_PATH(ns)                                                                                                         \
    Path<T> {                                                                                                                  \
        {ns::forward_rows<T, false>, ns::forward_rows<T, true>}, { ns::backward_block<T, false>, ns::backward_block<T, true> } \
    }

template <class T>
Path<T> choose(InstructionSet isa) {
#ifdef __x86_64__
    if (vectors_of(isa) == InstructionSet::kAvx512) return MOVAE_PATH(avx512);
    if (isa == InstructionSet::kAvx2) return MOVAE_PATH(avx2);
#endif
    return MOVAE_PATH(portable);
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Transposes the posteriors and fills the padding with ones that no sample can come from: log density -inf.
template <class T>
void prepare(Problem<T>& p, const T* mu, const T* logvar, T* store) {
    T *tm = store, *tn = tm + p.dims * p.padded, *tc = tn + p.dims * p.padded;
    for (int64_t d = 0; d < p.dims; ++d)
        for (int64_t j = 0; j < p.padded; ++j) {
            const int64_t to = d * p.padded + j, from = j * p.dims + d;
            tm[to] = j < p.batch ? mu[from] : T(0);
            tn[to] = j < p.batch ? T(-0.5 * std::exp(-double(logvar[from]))) : T(-1);
            tc[to] = j < p.batch ? T(-0.5 * (1.8378770664093453 + double(logvar[from]))) : -T(INFINITY);
        }
    p.mu = tm, p.niv = tn, p.c = tc;
}

template <class T>
Problem<T> problem(const TcInputs<T>& in, const TcSums<T>& sums) {
    Problem<T> p{};
    p.batch = in.batch, p.dims = in.dims, p.padded = round_up(in.batch, kPad);
    p.z = in.z;
    const double B = double(in.batch), N = double(in.n_data);
    p.log_w = in.stratified ? -std::log(B - 1) : -std::log(N * B);
    p.own = T((B - 1) / N), p.other = T((N - B + 1) / N);
    p.top = sums.top, p.total = sums.total;
    return p;
}

}  // namespace

template <class T>
void tc_terms(const TcInputs<T>& in, T* log_q_z, T* log_prod_q_z, const TcSums<T>& sums, InstructionSet isa, int threads) {
    const Path<T> path = choose<T>(isa);
    Problem<T> p = problem(in, sums);
    const Buffer<T> posteriors(3 * p.dims * p.padded);
    prepare(p, in.mu, in.logvar, posteriors.get());
    p.log_q_z = log_q_z, p.log_prod_q_z = log_prod_q_z;
    const int64_t each = round_up(3 * kForwardBlock * sizeof(T) + 2 * (p.dims + 1) * sizeof(double), 64);
    const Buffer<char> scratch(each * threads);
    constexpr int64_t kRows = 16;  // small enough to balance, large enough not to share cache lines of the output
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int t = 0; t < threads; ++t) {
        T* own = reinterpret_cast<T*>(scratch.get() + t * each);
        for (int64_t i = t * kRows; i < p.batch; i += threads * kRows)
            path.forward[in.stratified](p, i, i + kRows < p.batch ? i + kRows : p.batch, own);
    }
}

template <class T>
void tc_terms_backward(const TcInputs<T>& in, const TcSums<T>& sums, const TcGradients<T>& g, InstructionSet isa, int threads) {
    const Path<T> path = choose<T>(isa);
    Problem<T> p = problem(in, sums);
    const int64_t batch = p.batch, dims = p.dims;
    const Buffer<T> posteriors(3 * dims * p.padded);
    prepare(p, in.mu, in.logvar, posteriors.get());
    // Each thread owns a range of posteriors and a private gradient of z, which is summed in thread order at the end.
    const int64_t share = round_up((p.padded + threads - 1) / threads, kPad);
    const int workers = int((p.padded + share - 1) / share);
    const int64_t block = share < kBackwardBlock ? share : kBackwardBlock;
    const int64_t each = round_up(block * (2 + 2 * dims) * sizeof(T) + 2 * block * dims * sizeof(double), 64);
    const Buffer<char> scratch(each * workers);
    const Buffer<double> partial(workers * batch * dims);
    double* parts = partial.get();
    std::memset(parts, 0, workers * batch * dims * sizeof(double));
#pragma omp parallel for schedule(static) num_threads(workers)
    for (int t = 0; t < workers; ++t) {
        T* own = reinterpret_cast<T*>(scratch.get() + t * each);
        const int64_t end = (t + 1) * share < p.padded ? (t + 1) * share : p.padded;
        for (int64_t j = t * share; j < end; j += block)
            path.backward[in.stratified](p, g, j, end - j < block ? end - j : block, parts + t * batch * dims, own);
    }
    for (int64_t k = 0; k < batch * dims; ++k) {
        double s = 0;
        for (int t = 0; t < workers; ++t) s += parts[t * batch * dims + k];
        g.z[k] = T(s);
    }
}

template void tc_terms(const TcInputs<float>&, float*, float*, const TcSums<float>&, InstructionSet, int);
template void tc_terms(const TcInputs<double>&, double*, double*, const TcSums<double>&, InstructionSet, int);
template void tc_terms_backward(const TcInputs<float>&, const TcSums<float>&, const TcGradients<float>&, InstructionSet, int);
template void tc_terms_backward(const TcInputs<double>&, const TcSums<double>&, const TcGradients<double>&, InstructionSet,
                                int);

}  // namespace movae
