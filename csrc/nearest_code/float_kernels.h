// The float32 kernels' bodies, compiled once per instruction set: portable.cpp, avx2.cpp and avx512.cpp define a
// vector `V` and include this under their own target pragma. All is in an unnamed namespace, so that the linker
// cannot put one file's wide instructions in another's place.

#include <cstring>

namespace movae {
namespace {

// Rows x (VECTORS * V::width) scores in registers: the norm goes in first, the products are added one by one.
template <int ROWS>
inline void screen_tile(const float* z, int64_t z_stride, const float* panel, const float* half_norms, float norm_scale,
                        int depth, float* minima, int64_t stride) {
    constexpr int kColumns = V::vectors * V::width;
    static_assert(kColumns == kLanes || (kColumns == kPanel && V::vectors == kGroup), "one member or all of a group");
    for (int first = 0; first < kPanel; first += kColumns) {
        V::type score[ROWS][V::vectors];
        MOVAE_UNROLL
        for (int v = 0; v < V::vectors; ++v) {
            const V::type norm = V::load(half_norms + first + v * V::width) * V::broadcast(norm_scale);
            MOVAE_UNROLL
            for (int r = 0; r < ROWS; ++r) score[r][v] = norm;
        }
        const float* column = panel + first;
        for (int k = 0; k < depth; ++k, column += kPanel) {
            V::type code[V::vectors];
            MOVAE_UNROLL
            for (int v = 0; v < V::vectors; ++v) code[v] = V::load(column + v * V::width);
            MOVAE_UNROLL
            for (int r = 0; r < ROWS; ++r) {
                const V::type x = V::broadcast(z[r * z_stride + k]);
                MOVAE_UNROLL
                for (int v = 0; v < V::vectors; ++v) score[r][v] = V::fma(x, code[v], score[r][v]);
            }
        }
        MOVAE_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            float* out = minima + r * stride;
            if constexpr (kColumns == kPanel) {
                V::store(out, V::min(V::min(score[r][0], score[r][1]), V::min(score[r][2], score[r][3])));
            } else {
                MOVAE_UNROLL
                for (int v = 0; v < V::vectors; ++v) {
                    float* lane = out + v * V::width;
                    V::store(lane, first == 0 ? score[r][v] : V::min(V::load(lane), score[r][v]));
                }
            }
        }
    }
}

void screen(const float* z, int64_t z_stride, int rows, const float* panel, const float* half_norms, float norm_scale,
            int depth, float* minima, int64_t stride) {
    for (int r = 0; r < rows; r += V::rows)
        screen_tile<V::rows>(z + r * z_stride, z_stride, panel, half_norms, norm_scale, depth, minima + r * stride, stride);
}

int candidates(const float* minima, const float* bound, int panels, float best, uint16_t* groups) {
    V::type least = V::broadcast(best);
    for (int p = 0; p < panels; ++p) {
        const V::type slack = V::broadcast(bound[p]);
        for (int lane = 0; lane < kLanes; lane += V::width) least = V::min(least, V::load(minima + p * kLanes + lane) + slack);
    }
    float values[V::width];
    std::memcpy(values, &least, sizeof values);
    float threshold = values[0];
    for (int i = 1; i < V::width; ++i) threshold = values[i] < threshold ? values[i] : threshold;

    const V::type limit = V::broadcast(threshold);
    int count = 0;
    for (int p = 0; p < panels; ++p) {
        const V::type slack = V::broadcast(bound[p]);
        for (int lane = 0; lane < kLanes; lane += V::width) {
            unsigned mask = V::not_greater(V::load(minima + p * kLanes + lane) - slack, limit);
            for (; mask; mask &= mask - 1) groups[count++] = static_cast<uint16_t>(p * kLanes + lane + __builtin_ctz(mask));
        }
    }
    return count;
}

typedef float F8 __attribute__((vector_size(32)));
typedef double D8 __attribute__((vector_size(64)));

// Inlined everywhere, so that no 64-byte vector crosses a call.
#pragma GCC diagnostic ignored "-Wpsabi"
__attribute__((always_inline)) inline D8 load8(const float* x) {
    F8 v;
    std::memcpy(&v, x, sizeof v);
    return __builtin_convertvector(v, D8);
}

__attribute__((always_inline)) inline D8 load8(const double* x) {
    D8 v;
    std::memcpy(&v, x, sizeof v);
    return v;
}

template <class Real>
__attribute__((always_inline)) inline D8 load_tail(const Real* x, int n) {
    Real padded[8] = {};
    for (int i = 0; i < n; ++i) padded[i] = x[i];
    return load8(padded);
}

inline double sum8(const D8& v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

template <class Real>
void dot4(const Real* z, const Real* const* codes, int depth, double* out) {
    D8 sum0 = {}, sum1 = {}, sum2 = {}, sum3 = {};
    const Real *c0 = codes[0], *c1 = codes[1], *c2 = codes[2], *c3 = codes[3];
    int k = 0;
    for (; k + 8 <= depth; k += 8) {
        const D8 x = load8(z + k);
        sum0 += x * load8(c0 + k);
        sum1 += x * load8(c1 + k);
        sum2 += x * load8(c2 + k);
        sum3 += x * load8(c3 + k);
    }
    if (k < depth) {
        const D8 x = load_tail(z + k, depth - k);
        sum0 += x * load_tail(c0 + k, depth - k);
        sum1 += x * load_tail(c1 + k, depth - k);
        sum2 += x * load_tail(c2 + k, depth - k);
        sum3 += x * load_tail(c3 + k, depth - k);
    }
    out[0] = sum8(sum0), out[1] = sum8(sum1), out[2] = sum8(sum2), out[3] = sum8(sum3);
}

void dot4_float(const float* z, const float* const* codes, int depth, double* out) { dot4(z, codes, depth, out); }
void dot4_double(const double* z, const double* const* codes, int depth, double* out) { dot4(z, codes, depth, out); }

float sum_squares(const float* x, int depth) {
    V::type sum = V::broadcast(0.0f);
    int k = 0;
    for (; k + V::width <= depth; k += V::width) {
        const V::type v = V::load(x + k);
        sum = V::fma(v, v, sum);
    }
    float values[V::width], total = 0.0f;
    std::memcpy(values, &sum, sizeof values);
    for (int i = 0; i < V::width; ++i) total += values[i];
    for (; k < depth; ++k) total += x[k] * x[k];
    return total;
}

double squared_distance(const float* x, const float* y, int depth) {
    D8 sum = {};
    int k = 0;
    for (; k + 8 <= depth; k += 8) {
        const D8 difference = load8(x + k) - load8(y + k);
        sum += difference * difference;
    }
    if (k < depth) {
        const D8 difference = load_tail(x + k, depth - k) - load_tail(y + k, depth - k);
        sum += difference * difference;
    }
    return sum8(sum);
}

const FloatKernels kKernels = {V::rows, &screen, &candidates, &dot4_float, &dot4_double, &sum_squares, &squared_distance};

}  // namespace
}  // namespace movae
