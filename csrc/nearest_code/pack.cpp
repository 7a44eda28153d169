#include "nearest_code/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

namespace movae {
namespace {

constexpr float kUp = 1.001f;  // covers the rounding of a norm computed in float32 from up to 2^13 terms

// A block of rows, each made contiguous. Channel-first data is read along its contiguous axis and transposed in
// the cache.
template <class Real>
void gather(const RowsView& z, int64_t first, int rows, Real* out, const Kernels& kernels) {
    const int64_t depth = z.depth;
    if (z.depth_stride == 1) {
        for (int r = 0; r < rows; ++r)
            widen(at(z.data, z.dtype, z.offset(first + r)), z.dtype, depth, out + r * depth, kernels);
        return;
    }
    constexpr int kRun = 64;
    Real run[kRun];
    char copy[kRun * sizeof(double)];
    for (int r = 0; r < rows;) {
        const int64_t left_in_image = z.spatial - (first + r) % z.spatial;
        const int n = static_cast<int>(std::min<int64_t>({kRun, rows - r, left_in_image}));
        const int64_t start = z.offset(first + r);
        for (int64_t k = 0; k < depth; ++k) {
            const int64_t element = start + k * z.depth_stride;
            const void* source = at(z.data, z.dtype, element);
            if (z.spatial_stride != 1) {
                const int64_t size = item_size(z.dtype);
                for (int i = 0; i < n; ++i)
                    std::memcpy(copy + i * size, at(z.data, z.dtype, element + i * z.spatial_stride), size);
                source = copy;
            }
            widen(source, z.dtype, n, run, kernels);
            for (int i = 0; i < n; ++i) out[(r + i) * depth + k] = run[i];
        }
        r += n;
    }
}

template <class Real>
bool all_finite(const Real* x, int64_t n) {
    Real sum = 0;  // x * 0 is 0 for finite x and NaN otherwise
    for (int64_t i = 0; i < n; ++i) sum += x[i] * 0;
    return sum == 0;
}

template <class Real>
double largest_of(const Real* x, int64_t n) {
    Real largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::abs(x[i]));
    return static_cast<double>(largest);
}

double power_of_two(int exponent) { return std::ldexp(1.0, exponent); }

}  // namespace

void widen(const void* source, Dtype dtype, int64_t n, double* out, const Kernels&) {
    if (dtype == Dtype::kFloat64) std::memcpy(out, source, n * sizeof *out);
}

void widen(const void* source, Dtype dtype, int64_t n, float* out, const Kernels& kernels) {
    if (dtype == Dtype::kFloat32) {
        std::memcpy(out, source, n * sizeof *out);
    } else if (dtype == Dtype::kFloat16) {
        kernels.half_to_float(static_cast<const uint16_t*>(source), out, n);
    } else {
        const uint16_t* bits = static_cast<const uint16_t*>(source);
        for (int64_t i = 0; i < n; ++i) out[i] = from_bfloat16(bits[i]);
    }
}

void gather_rows(const RowsView& z, int64_t first, int rows, float* out, const Kernels& kernels) {
    gather(z, first, rows, out, kernels);
}

void gather_rows(const RowsView& z, int64_t first, int rows, double* out, const Kernels& kernels) {
    gather(z, first, rows, out, kernels);
}

bool comfortable(double largest) { return largest == 0 || (largest >= 0x1p-40 && largest <= 0x1p40); }

int scale_exponent(double largest) {
    if (comfortable(largest)) return 0;
    return std::clamp(-std::ilogb(largest), -1000, 1000);
}

double largest_magnitude(const Codebook& codebook, const Kernels& kernels, int threads) {
    double largest = 0;
    const int64_t depth = codebook.depth;
#pragma omp parallel for num_threads(threads) reduction(max : largest) if (codebook.count * depth > 65536)
    for (int64_t k = 0; k < codebook.count; ++k) {
        const void* row = at(codebook.data, codebook.dtype, k * depth);
        double value;
        if (codebook.dtype == Dtype::kFloat64) {
            const double* x = static_cast<const double*>(row);
            value = all_finite(x, depth) ? largest_of(x, depth) : 0;
        } else if (codebook.dtype == Dtype::kFloat32) {
            const float* x = static_cast<const float*>(row);
            value = all_finite(x, depth) ? largest_of(x, depth) : 0;
        } else {
            thread_local Buffer<float> scratch;
            float* x = scratch.resize(depth);
            widen(row, codebook.dtype, depth, x, kernels);
            value = all_finite(x, depth) ? largest_of(x, depth) : 0;
        }
        largest = std::max(largest, value);
    }
    return largest;
}

template <class Real>
void CodeBlock<Real>::pack(const Codebook& codebook, int64_t first_code, int64_t codes, int scale, const Kernels& kernels,
                           int threads) {
    first = first_code, count = codes, depth = codebook.depth, exponent = scale;
    panels = (count + kPanel - 1) / kPanel;
    const int64_t padded_depth = (depth + kDepthStep - 1) / kDepthStep * kDepthStep;
    const void* source = at(codebook.data, codebook.dtype, first * depth);
    const bool direct = codebook.dtype == (std::is_same<Real, double>::value ? Dtype::kFloat64 : Dtype::kFloat32);
    if (direct) {
        rows = static_cast<const Real*>(source);
    } else {
        widened_.resize(count * depth);
        rows = widened_.get();
    }
    rows_scale = std::is_same<Real, double>::value ? static_cast<Real>(power_of_two(exponent)) : Real(1);
    panel32.resize(panels * depth * kPanel);
    if (kernels.screening) panel16.resize(panels * padded_depth * kPanel);
    half_norm.resize(panels * kPanel);
    half_norm64.resize(panels * kPanel);
    norm.resize(panels), dropped32.resize(panels), dropped16.resize(panels);
#pragma omp parallel num_threads(threads) if (count * depth > 16384)
    {
        Buffer<Real> scratch;
        scratch.resize(depth);
#pragma omp for schedule(static)
        for (int64_t p = 0; p < panels; ++p) {
            if (!direct) {
                const int64_t n = std::min<int64_t>(kPanel, count - p * kPanel) * depth, start = p * kPanel * depth;
                widen(at(source, codebook.dtype, start), codebook.dtype, n, widened_.get() + start, kernels);
            }
            pack_panel(p, kernels, scratch.get());
        }
    }
}

template <class Real>
void CodeBlock<Real>::pack_panel(int64_t panel, const Kernels& kernels, Real* scratch) {
    const int64_t padded_depth = (depth + kDepthStep - 1) / kDepthStep * kDepthStep;
    const double scale = power_of_two(exponent);
    const double norm_unit = std::is_same<Real, double>::value ? 1.0 : 1.0 / (scale * scale);
    float* out32 = panel32.get() + panel * depth * kPanel;
    uint16_t* out16 = kernels.screening ? panel16.get() + panel * padded_depth * kPanel : nullptr;
    if (out16) std::memset(out16, 0, padded_depth * kPanel * sizeof *out16);
    double largest_norm = 0, largest_dropped32 = 0, largest_dropped16 = 0;
    for (int c = 0; c < kPanel; ++c) {
        const int64_t code = panel * kPanel + c;
        const bool usable = code < count && all_finite(rows + code * depth, depth);
        if (!usable) {
            for (int64_t k = 0; k < depth; ++k) out32[k * kPanel + c] = 0;
            half_norm[code] = std::numeric_limits<float>::infinity();
            half_norm64[code] = std::numeric_limits<double>::infinity();
            continue;
        }
        double norm2 = 0, lost32 = 0, lost16 = 0;
        for (int64_t k = 0; k < depth; ++k) {
            const double exact = static_cast<double>(rows[code * depth + k]) * scale;
            const float single = static_cast<float>(exact);
            out32[k * kPanel + c] = -single;
            norm2 += exact * exact;
            lost32 += (exact - single) * (exact - single);
            if (out16) {
                const uint16_t half = to_bfloat16(-single);
                out16[(k / 2 * kPanel + c) * 2 + k % 2] = half;
                const double lost = exact + from_bfloat16(half);
                lost16 += lost * lost;
            }
        }
        half_norm[code] = static_cast<float>(norm2 / 2);
        half_norm64[code] = norm2 / 2 * norm_unit;
        largest_norm = std::max(largest_norm, norm2);
        largest_dropped32 = std::max(largest_dropped32, lost32);
        largest_dropped16 = std::max(largest_dropped16, lost16);
    }
    // 1 %: bfloat16 may have lengthened a code by 2^-8.
    norm[panel] = static_cast<float>(std::sqrt(largest_norm)) * 1.01f;
    dropped32[panel] = static_cast<float>(std::sqrt(largest_dropped32)) * kUp;
    dropped16[panel] = static_cast<float>(std::sqrt(largest_dropped16)) * kUp;
}

template <class Real>
void RowBlock<Real>::load(const RowsView& z, int64_t first, int n, int max_exponent, const Kernels& kernels) {
    const int depth = static_cast<int>(z.depth);
    rows = n;
    padded = (n + kRowStep - 1) / kRowStep * kRowStep;
    raw.resize(static_cast<int64_t>(padded) * depth);
    norm32.resize(padded), dropped32.resize(padded), norm16.resize(padded), dropped16.resize(padded);
    bad.resize(padded);
    gather_rows(z, first, n, raw.get(), kernels);
    std::fill(raw.get() + static_cast<int64_t>(n) * depth, raw.get() + static_cast<int64_t>(padded) * depth, Real(0));

    exponent = 0;
    if constexpr (std::is_same<Real, float>::value) {
        bool usual = max_exponent >= 0;
        float largest2 = 0;
        for (int r = 0; r < padded; ++r) {
            const float norm2 = kernels.exact->sum_squares(raw.get() + static_cast<int64_t>(r) * depth, depth);
            usual &= norm2 <= 0x1p80f;  // false for a NaN too
            largest2 = std::max(largest2, norm2);
            norm32[r] = std::sqrt(norm2) * kUp;
            dropped32[r] = 0;
            bad[r] = 0;
        }
        if (usual && (largest2 >= 0x1p-80f || largest_of(raw.get(), static_cast<int64_t>(n) * depth) == 0)) {
            screen = raw.get();
            return;
        }
    }
    double largest = 0;
    for (int r = 0; r < padded; ++r) {
        const Real* row = raw.get() + static_cast<int64_t>(r) * depth;
        bad[r] = !all_finite(row, depth);
        if (!bad[r]) largest = std::max(largest, largest_of(row, depth));
    }
    rescale(depth, std::min(scale_exponent(largest), max_exponent));
}

// The general case: float64 rows, a scale out of the ordinary, or a row that is not finite.
template <class Real>
void RowBlock<Real>::rescale(int depth, int scale_by) {
    exponent = scale_by;
    const double scale = power_of_two(exponent);
    screen = scaled.resize(static_cast<int64_t>(padded) * depth);
    for (int r = 0; r < padded; ++r) {
        Real* row = raw.get() + static_cast<int64_t>(r) * depth;
        float* out = scaled.get() + static_cast<int64_t>(r) * depth;
        double dropped2 = 0, kept2 = 0;
        for (int k = 0; k < depth; ++k) {
            const double exact = bad[r] ? 0.0 : static_cast<double>(row[k]) * scale;
            out[k] = static_cast<float>(exact);
            dropped2 += (exact - out[k]) * (exact - out[k]);
            kept2 += static_cast<double>(out[k]) * out[k];
            if constexpr (std::is_same<Real, double>::value) row[k] = exact;
        }
        dropped32[r] = static_cast<float>(std::sqrt(dropped2)) * kUp;
        norm32[r] = static_cast<float>(std::sqrt(kept2)) * kUp;
    }
}

template <class Real>
void RowBlock<Real>::round(int depth, const BfloatKernels& kernels) {
    const int64_t stride = (depth + kDepthStep - 1) / kDepthStep * kDepthStep;
    rounded.resize(padded * stride);
    for (int r = 0; r < padded; ++r) {
        float dropped, kept;
        kernels.round_row(screen + static_cast<int64_t>(r) * depth, depth, rounded.get() + r * stride, &dropped, &kept);
        dropped16[r] = dropped * kUp + dropped32[r];
        norm16[r] = kept * kUp;
    }
}

template struct CodeBlock<float>;
template struct CodeBlock<double>;
template struct RowBlock<float>;
template struct RowBlock<double>;

}  // namespace movae
