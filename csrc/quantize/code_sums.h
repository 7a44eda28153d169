// Sums over the rows that chose a code. Each sum runs over its rows in ascending order, in float64, on one thread:
// the result does not depend on the number of threads, and no thread needs a copy of the codebook.
#pragma once

#include "nearest_code/nearest_code.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace movae {

struct BfloatBits {
    uint16_t bits;
};
struct HalfBits {
    uint16_t bits;
};

inline double to_real(float x) { return x; }
inline double to_real(double x) { return x; }
inline double to_real(BfloatBits x) { return from_bfloat16(x.bits); }
inline double to_real(HalfBits x) { return from_half(x.bits); }

// Calls body with a value of the type in which `dtype` is stored.
template <class Body>
void with_element(Dtype dtype, Body body) {
    switch (dtype) {
        case Dtype::kFloat32: return body(float{});
        case Dtype::kFloat64: return body(double{});
        case Dtype::kBfloat16: return body(BfloatBits{});
        case Dtype::kFloat16: return body(HalfBits{});
    }
}

// out[code, k] = sum over rows with index[row] == code of value(row, offset of z[row, k], code, k).
template <class Real, class Value>
void sum_by_code(const RowsView& z, const int64_t* index, int64_t codes, Real* out, int threads, Value value) {
    const int64_t rows = z.rows(), depth = z.depth;
    if (z.depth_stride != 1) {  // channel-first: a channel per thread, its numbers read where they lie
#pragma omp parallel num_threads(threads)
        {
            std::vector<double> sum(codes);
#pragma omp for schedule(static)
            for (int64_t k = 0; k < depth; ++k) {
                std::fill(sum.begin(), sum.end(), 0.0);
                for (int64_t b = 0, row = 0; b < z.batch; ++b) {
                    int64_t offset = b * z.batch_stride + k * z.depth_stride;
                    for (int64_t s = 0; s < z.spatial; ++s, ++row, offset += z.spatial_stride)
                        sum[index[row]] += value(row, offset, index[row], k);
                }
                for (int64_t code = 0; code < codes; ++code) out[code * depth + k] = static_cast<Real>(sum[code]);
            }
        }
        return;
    }
    // Rows sorted by code (counting sort, stable), then a code per thread.
    std::vector<int64_t> start(codes + 1), order(rows);
    for (int64_t row = 0; row < rows; ++row) ++start[index[row] + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    {
        std::vector<int64_t> next(start.begin(), start.end() - 1);
        for (int64_t row = 0; row < rows; ++row) order[next[index[row]]++] = row;
    }
#pragma omp parallel num_threads(threads)
    {
        std::vector<double> sum(depth);
#pragma omp for schedule(dynamic, 16)
        for (int64_t code = 0; code < codes; ++code) {
            std::fill(sum.begin(), sum.end(), 0.0);
            for (int64_t i = start[code]; i < start[code + 1]; ++i) {
                const int64_t row = order[i], offset = z.offset(row);
                for (int64_t k = 0; k < depth; ++k) sum[k] += value(row, offset + k, code, k);
            }
            for (int64_t k = 0; k < depth; ++k) out[code * depth + k] = static_cast<Real>(sum[k]);
        }
    }
}

}  // namespace movae
