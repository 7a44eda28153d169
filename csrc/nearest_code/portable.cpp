// The float32 kernels for any CPU: four-wide vectors of the compiler's own.
#include "nearest_code/kernels.h"

#include <cstring>

namespace {

// Exact for every half, subnormals and non-finite values too.
inline float half_to_single(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, exponent = (half >> 10) & 0x1fu;
    const uint32_t mantissa = half & 0x3ffu;
    uint32_t bits;
    float value;
    if (exponent == 0) {
        value = static_cast<float>(mantissa) * 0x1p-24f;
        std::memcpy(&bits, &value, 4);
        bits |= sign;
    } else {
        bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    }
    std::memcpy(&value, &bits, 4);
    return value;
}

struct V {
    typedef float type __attribute__((vector_size(16)));
    static constexpr const char* name = "portable";
    static constexpr int width = 4, vectors = 4, rows = 2, half_width = 1;
    static type load(const float* x) {
        type v;
        std::memcpy(&v, x, sizeof v);
        return v;
    }
    static void store(float* x, type v) { std::memcpy(x, &v, sizeof v); }
    static type broadcast(float x) { return type{x, x, x, x}; }
    static type fma(type a, type b, type c) { return a * b + c; }
    static type min(type a, type b) { return a < b ? a : b; }
    static unsigned not_greater(type a, type b) {
        unsigned mask = 0;
        for (int i = 0; i < width; ++i) mask |= static_cast<unsigned>(a[i] <= b[i]) << i;
        return mask;
    }
    static void widen_half(const uint16_t* x, float* out) { *out = half_to_single(*x); }
};

}  // namespace

#include "nearest_code/float_kernels.h"

const movae::FloatKernels* movae::portable_kernels() { return &kKernels; }
