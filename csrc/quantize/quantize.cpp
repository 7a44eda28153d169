// quantize and its gradients, row by row; sums over the rows of a code are in code_sums.h.
#include "quantize/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "common/threads.h"
#include "nearest_code/pack.h"
#include "quantize/code_sums.h"

namespace movae {
namespace {

constexpr int kRows = 64;

inline void store(float* out, double value) { *out = static_cast<float>(value); }
inline void store(double* out, double value) { *out = value; }
inline void store(HalfBits* out, double value) { out->bits = to_half(static_cast<float>(value)); }
inline void store(BfloatBits* out, double value) { out->bits = to_bfloat16_or_nan(static_cast<float>(value)); }

// Rows of Real to where they belong in `out`, rounded to its dtype.
template <class Real>
void scatter_rows(const Real* rows, const RowsView& out, int64_t first, int count) {
    with_element(out.dtype, [&](auto element) {
        auto* data = static_cast<decltype(element)*>(out.data);
        const int64_t depth = out.depth;
        if (out.depth_stride == 1) {
            for (int r = 0; r < count; ++r) {
                auto* row = data + out.offset(first + r);
                for (int64_t k = 0; k < depth; ++k) store(row + k, rows[r * depth + k]);
            }
            return;
        }
        int64_t target[kRows];
        for (int r = 0; r < count; ++r) target[r] = out.offset(first + r);
        for (int64_t k = 0; k < depth; ++k)
            for (int r = 0; r < count; ++r) store(data + target[r] + k * out.depth_stride, rows[r * depth + k]);
    });
}

char* place(const RowsView& view, int64_t element) { return static_cast<char*>(view.data) + element * item_size(view.dtype); }

// codes [rows] of `size`-byte items to the rows of z_q, whatever its strides: exact copies of the codebook.
void copy_codes(const Codebook& codebook, const int64_t* index, const RowsView& out, int64_t first, int rows) {
    const int64_t size = item_size(codebook.dtype), depth = codebook.depth;
    const char* codes = static_cast<const char*>(codebook.data);
    if (out.depth_stride == 1) {
        for (int r = 0; r < rows; ++r)
            std::memcpy(place(out, out.offset(first + r)), codes + index[r] * depth * size, depth * size);
        return;
    }
    int64_t target[kRows];
    for (int start = 0; start < rows; start += kRows) {
        const int n = std::min(kRows, rows - start);
        for (int r = 0; r < n; ++r) target[r] = out.offset(first + start + r);
        for (int64_t k = 0; k < depth; ++k)
            for (int r = 0; r < n; ++r) {
                const char* from = codes + (index[start + r] * depth + k) * size;
                char* to = place(out, target[r] + k * out.depth_stride);
                if (size == 4)
                    std::memcpy(to, from, 4);
                else if (size == 2)
                    std::memcpy(to, from, 2);
                else
                    std::memcpy(to, from, 8);
            }
    }
}

double distance(const float* x, const float* y, int depth, const Kernels& kernels) {
    return kernels.exact->squared_distance(x, y, depth);
}

double distance(const double* x, const double* y, int depth, const Kernels&) {
    double sum = 0;
    for (int k = 0; k < depth; ++k) sum += (x[k] - y[k]) * (x[k] - y[k]);
    return sum;
}

// A code as Real: where it lies if it is stored so.
template <class Real>
const Real* code_row(const Codebook& codebook, int64_t code, Real* scratch, const Kernels& kernels) {
    const void* row = at(codebook.data, codebook.dtype, code * codebook.depth);
    if (item_size(codebook.dtype) == sizeof(Real)) return static_cast<const Real*>(row);
    widen(row, codebook.dtype, codebook.depth, scratch, kernels);
    return scratch;
}

template <class Real>
void errors(const RowsView& z, const Codebook& codebook, const int64_t* index, int64_t first, int rows, Real* out,
            const Kernels& kernels) {
    thread_local Buffer<Real> block, code;
    const int depth = static_cast<int>(z.depth);
    block.resize(kRows * z.depth), code.resize(z.depth);
    for (int start = 0; start < rows; start += kRows) {
        const int n = std::min(kRows, rows - start);
        gather_rows(z, first + start, n, block.get(), kernels);
        for (int r = 0; r < n; ++r) {
            const Real* nearest = code_row(codebook, index[start + r], code.get(), kernels);
            out[first + start + r] =
                static_cast<Real>(distance(block.get() + static_cast<int64_t>(r) * depth, nearest, depth, kernels));
        }
    }
}

template <class Real>
void forward(const RowsView& z, const Codebook& codebook, const Quantized& out, InstructionSet isa, int threads) {
    const Kernels kernels = kernels_of(isa);
    const auto finish = [&](int64_t first, int rows, const int64_t* index) {
        copy_codes(codebook, index, out.z_q, first, rows);
        errors(z, codebook, index, first, rows, static_cast<Real*>(out.squared_error), kernels);
    };
    nearest_code(z, codebook, out.index, true, isa, threads, finish);
    Real* count = static_cast<Real*>(out.count);
    std::fill(count, count + codebook.count, Real(0));
    for (int64_t row = 0; row < z.rows(); ++row) count[out.index[row]] += 1;  // exact up to 2^24 rows per code
    with_element(z.dtype, [&](auto element) {
        using T = decltype(element);
        const T* data = static_cast<const T*>(z.data);
        sum_by_code(z, out.index, codebook.count, static_cast<Real*>(out.code_sum), threads,
                    [=](int64_t, int64_t offset, int64_t, int64_t) { return to_real(data[offset]); });
    });
}

// gradient[k] <- what z receives, given what z_q received. e = z / |z|, q = code / |code|, lambda = |code| / |z|;
// the rotation R = I - 2 s s' / |s|^2 + 2 q e' with s = e + q takes e to q (Fifty et al. 2024, section 4.2), and
// lambda R is held constant, so z receives lambda R' gradient. Where a norm is zero there is no rotation.
template <class Real>
void rotate_back(const Real* z, const Real* code, Real* gradient, int depth) {
    double z2 = 0, code2 = 0;
    for (int k = 0; k < depth; ++k) z2 += double(z[k]) * z[k], code2 += double(code[k]) * code[k];
    if (!(z2 > 0) || !(code2 > 0)) return;
    const double over_z = 1 / std::sqrt(z2), over_code = 1 / std::sqrt(code2);
    double s2 = 0, along_s = 0, along_q = 0;
    for (int k = 0; k < depth; ++k) {
        const double q = code[k] * over_code, s = z[k] * over_z + q;
        s2 += s * s, along_s += s * gradient[k], along_q += q * gradient[k];
    }
    const double lambda = std::sqrt(code2) * over_z, reflect = s2 > 0 ? 2 * along_s / s2 : 0;
    for (int k = 0; k < depth; ++k) {
        const double e = z[k] * over_z, s = e + code[k] * over_code;
        gradient[k] = static_cast<Real>(lambda * (gradient[k] - reflect * s + 2 * along_q * e));
    }
}

template <class Real>
void backward_z(const RowsView& z, const Codebook& codebook, const int64_t* index, const QuantizeGradient& g,
                const Kernels& kernels, int threads) {
    const int depth = static_cast<int>(z.depth);
    const Real* grad_error = static_cast<const Real*>(g.grad_error);
    const bool through = g.grad_z_q.data && g.through != Gradient::kCodebook;
    const int64_t blocks = (z.rows() + kRows - 1) / kRows;
#pragma omp parallel num_threads(threads)
    {
        Buffer<Real> rows, grads, scratch;
        rows.resize(kRows * z.depth), grads.resize(kRows * z.depth), scratch.resize(z.depth);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t first = b * kRows;
            const int n = static_cast<int>(std::min<int64_t>(kRows, z.rows() - first));
            gather_rows(z, first, n, rows.get(), kernels);
            if (through)
                gather_rows(g.grad_z_q, first, n, grads.get(), kernels);
            else
                std::fill(grads.get(), grads.get() + n * z.depth, Real(0));
            for (int r = 0; r < n; ++r) {
                const Real* x = rows.get() + r * z.depth;
                Real* out = grads.get() + r * z.depth;
                const Real* code = code_row(codebook, index[first + r], scratch.get(), kernels);
                if (through && g.through == Gradient::kRotation) rotate_back(x, code, out, depth);
                if (grad_error) {
                    const Real twice = 2 * grad_error[first + r];
                    for (int k = 0; k < depth; ++k) out[k] += twice * (x[k] - code[k]);
                }
            }
            scatter_rows(grads.get(), g.grad_z, first, n);
        }
    }
}

template <class Real>
void backward_codebook(const RowsView& z, const Codebook& codebook, const int64_t* index, const QuantizeGradient& g,
                       int threads) {
    const Real* grad_error = static_cast<const Real*>(g.grad_error);
    const bool through = g.grad_z_q.data && g.through == Gradient::kCodebook;
    with_element(z.dtype, [&](auto element) {
        using T = decltype(element);
        const T *data = static_cast<const T*>(z.data), *codes = static_cast<const T*>(codebook.data);
        const T* grad_z_q = static_cast<const T*>(g.grad_z_q.data);
        const int64_t depth = z.depth;
        sum_by_code(z, index, codebook.count, static_cast<Real*>(g.grad_codebook), threads,
                    [=, &g](int64_t row, int64_t offset, int64_t code, int64_t k) {
                        double value = 0;
                        if (grad_error)
                            value = 2.0 * grad_error[row] * (to_real(codes[code * depth + k]) - to_real(data[offset]));
                        if (through) value += to_real(grad_z_q[g.grad_z_q.offset(row) + k * g.grad_z_q.depth_stride]);
                        return value;
                    });
    });
}

// Indices come from outside, and one beyond the codebook would read wild memory, or write it in the backward.
void check_indices(const char* op, const int64_t* index, int64_t rows, int64_t codes) {
    const uint64_t end = static_cast<uint64_t>(codes);  // a negative index is larger than any codebook
    bool beyond = false;
    for (int64_t row = 0; row < rows; ++row) beyond |= static_cast<uint64_t>(index[row]) >= end;
    if (!beyond) return;
    const int64_t* bad = std::find_if(index, index + rows, [=](int64_t i) { return static_cast<uint64_t>(i) >= end; });
    throw std::out_of_range(std::string(op) + ": index " + std::to_string(*bad) + " at position " +
                            std::to_string(bad - index) + " does not lie in [0, " + std::to_string(codes) +
                            "), the codebook's; leave out masked vectors, whose index is -1");
}

}  // namespace

void quantize(const RowsView& z, const Codebook& codebook, const Quantized& out, InstructionSet isa, int threads) {
    threads = useful_threads(threads, z.rows() * codebook.count * z.depth / 16);
    if (z.dtype == Dtype::kFloat64)
        forward<double>(z, codebook, out, isa, threads);
    else
        forward<float>(z, codebook, out, isa, threads);
}

void code_error(const RowsView& z, const Codebook& codebook, const int64_t* index, void* squared_error, InstructionSet isa,
                int threads) {
    check_indices("code_error", index, z.rows(), codebook.count);
    const Kernels kernels = kernels_of(isa);
    threads = useful_threads(threads, z.rows() * z.depth);
    const int64_t blocks = (z.rows() + kRows - 1) / kRows;
#pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b * kRows;
        const int n = static_cast<int>(std::min<int64_t>(kRows, z.rows() - first));
        if (z.dtype == Dtype::kFloat64)
            errors(z, codebook, index + first, first, n, static_cast<double*>(squared_error), kernels);
        else
            errors(z, codebook, index + first, first, n, static_cast<float*>(squared_error), kernels);
    }
}

void quantize_backward(const RowsView& z, const Codebook& codebook, const int64_t* index, const QuantizeGradient& gradient,
                       InstructionSet isa, int threads) {
    check_indices("quantize_backward", index, z.rows(), codebook.count);
    const Kernels kernels = kernels_of(isa);
    const bool wide = z.dtype == Dtype::kFloat64;
    threads = useful_threads(threads, z.rows() * z.depth);
    if (gradient.grad_z.data) {
        if (wide)
            backward_z<double>(z, codebook, index, gradient, kernels, threads);
        else
            backward_z<float>(z, codebook, index, gradient, kernels, threads);
    }
    if (gradient.grad_codebook) {
        if (wide)
            backward_codebook<double>(z, codebook, index, gradient, threads);
        else
            backward_codebook<float>(z, codebook, index, gradient, threads);
    }
}

}  // namespace movae
