// Vectors of MOVAE_VECTOR_BYTES, their loads and stores and e^x, for the kernels of one instruction set (every_isa.h). No
// include guard: each instruction set has its own.

template <class T>
struct Simd;
template <>
struct Simd<float> {
    typedef float V __attribute__((vector_size(MOVAE_VECTOR_BYTES)));
    typedef int32_t I __attribute__((vector_size(MOVAE_VECTOR_BYTES)));
};
template <>
struct Simd<double> {
    typedef double V __attribute__((vector_size(MOVAE_VECTOR_BYTES)));
    typedef int64_t I __attribute__((vector_size(MOVAE_VECTOR_BYTES)));
};
template <class T>
using Vec = typename Simd<T>::V;

#define MOVAE_INLINE static inline __attribute__((always_inline))

template <class T>
MOVAE_INLINE Vec<T> load(const T* p) {
    Vec<T> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
}
template <class T>
MOVAE_INLINE void store(T* p, Vec<T> v) {
    __builtin_memcpy(p, &v, sizeof(v));
}

// e^x for x below about 40. x = n ln2 + r with |r| <= ln2 / 2; n by adding 1.5 * 2^mantissa, which leaves it in the
// low bits; ln2 in two parts, the first short enough that n * part is exact. e^r = 1 + r + r^2 p(r), p interpolated
// at Chebyshev nodes: relative error 1.1e-8 (float, before rounding) and 1.8e-17 (double). Where the result would be
// subnormal, and at -inf, it is 0; a NaN stays one (the comparison is false).
MOVAE_INLINE Vec<float> vexp(Vec<float> x) {
    const float magic = 12582912.0f, lowest = -87.0f;
    const Vec<float> zero = {};
    const Simd<float>::I below = x < lowest;
    x = below ? zero + lowest : x;
    const Vec<float> t = x * 1.44269504f + magic;
    const Vec<float> n = t - magic;
    const Vec<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Vec<float> p = zero + 0.0013926250831497611f;
    p = p * r + 0.008363232883682618f;
    p = p * r + 0.04166655421298415f;
    p = p * r + 0.16666576666119928f;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    const Simd<float>::I scale = ((Simd<float>::I)t + (127 - 0x4B400000)) << 23;
    return below ? zero : p * (Vec<float>)scale;
}

MOVAE_INLINE Vec<double> vexp(Vec<double> x) {
    const double magic = 6755399441055744.0, lowest = -708.0;
    const Vec<double> zero = {};
    const Simd<double>::I below = x < lowest;
    x = below ? zero + lowest : x;
    const Vec<double> t = x * 1.4426950408889634 + magic;
    const Vec<double> n = t - magic;
    const Vec<double> r = (x - n * 0.6931471803691238) - n * 1.9082149292705877e-10;
    Vec<double> p = zero + 2.09147553258932e-09;
    p = p * r + 2.5105312729622103e-08;
    p = p * r + 2.755727347871858e-07;
    p = p * r + 2.755725517000089e-06;
    p = p * r + 2.480158732567746e-05;
    p = p * r + 0.0001984126987500228;
    p = p * r + 0.0013888888888883711;
    p = p * r + 0.008333333333326084;
    p = p * r + 0.041666666666666664;
    p = p * r + 0.1666666666666667;
    p = p * r + 0.5;
    p = p * (r * r) + r + 1.0;
    const Simd<double>::I scale = ((Simd<double>::I)t + (1023LL - 0x4338000000000000LL)) << 52;
    return below ? zero : p * (Vec<double>)scale;
}
