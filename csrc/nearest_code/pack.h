// Operands of the search in the layouts of the kernels, with the norms that its certificate needs.
#pragma once

#include "common/buffer.h"
#include "nearest_code/kernels.h"
#include "nearest_code/nearest_code.h"

namespace movae {

// Screening works on z 2^a and codes 2^b, so that no scale of the data over- or underflows float32. Within
// 2^-40 .. 2^40 the exponents are zero and nothing is copied for their sake.
bool comfortable(double largest);
int scale_exponent(double largest);

// Some thousands of consecutive codes. Codes that hold a NaN or an infinity get an infinite norm: never nearest.
template <class Real>  // float; double for float64 sources
struct CodeBlock {
    int64_t first = 0, count = 0, panels = 0, depth = 0;
    int exponent = 0;            // b, the same for all blocks of a codebook
    const Real* rows = nullptr;  // [count, depth] for re-scoring: the caller's, or a widened copy
    Real rows_scale = 1;         // to be applied to `rows`; 1 unless Real is double and the scale is extreme

    Buffer<float> panel32;       // [panels][depth][64], negated
    Buffer<uint16_t> panel16;    // [panels][padded depth / 2][64][2], negated
    Buffer<float> half_norm;     // |c|^2 / 2 in screening units, infinite in the padding
    Buffer<double> half_norm64;  // |c|^2 / 2 in re-scoring units
    // Of each panel, rounded up: the largest norm, what float32 dropped of a code, what bfloat16 dropped of one.
    Buffer<float> norm, dropped32, dropped16;

    void pack(const Codebook& codebook, int64_t first, int64_t count, int exponent, const Kernels& kernels, int threads);

  private:
    Buffer<Real> widened_;
    void pack_panel(int64_t panel, const Kernels& kernels, Real* scratch);
};

constexpr int kRowStep = 48;  // a multiple of every kernel's row_step

// Some dozens of rows of z.
template <class Real>
struct RowBlock {
    int rows = 0, padded = 0;  // padded: with rows of zeros, to whole micro-tiles
    int exponent = 0;          // a
    Buffer<Real> raw;          // [padded, depth] for re-scoring
    Buffer<float> scaled;      // [padded, depth] in screening units; unused where `screen` is `raw`
    Buffer<uint16_t> rounded;  // [padded, padded depth] bfloat16
    const float* screen = nullptr;
    // Norm of what the kernel reads and of what rounding dropped, float32 and bfloat16 screening.
    Buffer<float> norm32, dropped32, norm16, dropped16;
    Buffer<unsigned char> bad;  // holds a NaN or an infinity: takes no part, its index is 0

    void load(const RowsView& z, int64_t first, int rows, int max_exponent, const Kernels& kernels);
    void round(int depth, const BfloatKernels& kernels);

  private:
    void rescale(int depth, int exponent);
};

// n consecutive numbers in float32 (float64 from float64 only: nothing is ever narrowed).
void widen(const void* source, Dtype dtype, int64_t n, float* out, const Kernels& kernels);
void widen(const void* source, Dtype dtype, int64_t n, double* out, const Kernels& kernels);

inline const void* at(const void* data, Dtype dtype, int64_t element) {
    return static_cast<const char*>(data) + element * item_size(dtype);
}

// A block of rows, each made contiguous: out [rows, depth] in float32 (float64 for float64 sources).
void gather_rows(const RowsView& z, int64_t first, int rows, float* out, const Kernels& kernels);
void gather_rows(const RowsView& z, int64_t first, int rows, double* out, const Kernels& kernels);

// The largest finite magnitude among codes that hold nothing else.
double largest_magnitude(const Codebook& codebook, const Kernels& kernels, int threads);

}  // namespace movae
