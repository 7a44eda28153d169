// The dtypes of torch that the ops take, as movae_fast/ops/extension.py numbers them, and bfloat16 and half by hand.
#pragma once

#include <cstdint>

namespace movae {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBfloat16 = 2, kFloat16 = 3 };

inline int64_t item_size(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

inline uint16_t to_bfloat16(float x) {  // round to nearest even; finite x only
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline uint16_t to_bfloat16_or_nan(float x) {  // as above, for any x
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return (bits & 0x7fffffffu) > 0x7f800000u ? uint16_t(0x7fc0u) : to_bfloat16(x);
}

inline float from_bfloat16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float out;
    __builtin_memcpy(&out, &bits, 4);
    return out;
}

inline uint16_t to_half(float value) {  // round to nearest even
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const float size = __builtin_fabsf(value);
    if (!(size < 65520.0f)) return static_cast<uint16_t>(sign | (value != value ? 0x7e00u : 0x7c00u));
    if (size < 0x1p-14f)  // subnormal halves are multiples of 2^-24
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(__builtin_lrintf(size * 0x1p24f)));
    bits = (bits & 0x7fffffffu) - (112u << 23);
    return static_cast<uint16_t>(sign | ((bits + 0xfffu + (bits >> 13 & 1u)) >> 13));
}

inline float from_half(uint16_t half) {  // exact for every half, subnormals and non-finite values too
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, exponent = (half >> 10) & 0x1fu;
    const uint32_t mantissa = half & 0x3ffu;
    uint32_t bits;
    float value;
    if (exponent == 0) {
        value = static_cast<float>(mantissa) * 0x1p-24f;
        __builtin_memcpy(&bits, &value, 4);
        bits |= sign;
    } else {
        bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    }
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

}  // namespace movae
