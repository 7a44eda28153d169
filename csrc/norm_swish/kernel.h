// The inner loops of norm_swish for one instruction set. Nothing here may instantiate a std template: one compiled for
// AVX-512 could be the copy that the linker keeps.
//
// An example is `count` periods of `period` numbers, and a channel's coefficients are repeated over a period: then every
// vector of the map has its coefficients at the same place. Within a strip of periods the loops go through one vector of
// the period after the other, so that coefficients and sums stay in registers. Strips are short: memory is prefetched
// along its addresses, and longer ones would jump too far.

#include "common/vectors.h"

// u sigmoid(u)'s sigmoid. Beyond `most` the exponential would overflow; the sigmoid is below 1e-34 there.
template <class T>
MOVAE_INLINE Vec<T> sigmoid(Vec<T> u) {
    const T most = sizeof(T) == 4 ? T(80) : T(700);
    const Vec<T> zero = {};
    Vec<T> x = -u;
    x = x > most ? zero + most : x;
    return T(1) / (T(1) + vexp(x));
}

// dL/du of the normalised value u, from that of swish(u).
template <class T, bool kSwish>
MOVAE_INLINE Vec<T> before_swish(Vec<T> grad, Vec<T> u) {
    if (!kSwish) return grad;
    const Vec<T> s = sigmoid<T>(u);
    return grad * (s * (T(1) + u * (T(1) - s)));
}

// Two sums per place in the period: in T over a block of periods, in double over the blocks.
template <class T>
struct Partial {
    T* parts;  // 2 periods
    double *first, *second;
    int64_t period;

    inline __attribute__((always_inline)) void clear() const {
        for (int64_t j = 0; j < 2 * period; ++j) parts[j] = 0;
    }
    inline __attribute__((always_inline)) void flush() const {
        for (int64_t j = 0; j < period; ++j) {
            first[j] += double(parts[j]);
            second[j] += double(parts[period + j]);
        }
    }
};

// first[j] += sum of (y - shift), second[j] += sum of (y - shift)^2.
template <class T>
static void sums(const T* y, const Strips& s, const T* shift, T* parts, double* first, double* second) {
    constexpr int W = sizeof(Vec<T>) / sizeof(T);
    const Partial<T> partial = {parts, first, second, s.period};
    for (int64_t b = 0; b < s.count; b += kBlock) {
        partial.clear();
        const int64_t end = b + kBlock < s.count ? b + kBlock : s.count;
        for (int64_t p0 = b; p0 < end; p0 += s.strip) {
            const int64_t p1 = p0 + s.strip < end ? p0 + s.strip : end;
            for (int64_t j = 0; j < s.period; j += W) {
                const Vec<T> centre = load(shift + j);
                Vec<T> one = load(parts + j), two = load(parts + s.period + j);
                for (int64_t p = p0; p < p1; ++p) {
                    const Vec<T> v = load(y + p * s.period + j) - centre;
                    one += v;
                    two += v * v;
                }
                store(parts + j, one);
                store(parts + s.period + j, two);
            }
        }
        partial.flush();
    }
}

// out = swish(a y + d), or a y + d.
template <class T, bool kSwish>
static void forward(const T* y, const Strips& s, const T* a, const T* d, T* out) {
    constexpr int W = sizeof(Vec<T>) / sizeof(T);
    for (int64_t p0 = 0; p0 < s.count; p0 += s.strip) {
        const int64_t p1 = p0 + s.strip < s.count ? p0 + s.strip : s.count;
        for (int64_t j = 0; j < s.period; j += W) {
            const Vec<T> slope = load(a + j), offset = load(d + j);
            for (int64_t p = p0; p < p1; ++p) {
                const Vec<T> u = load(y + p * s.period + j) * slope + offset;
                store(out + p * s.period + j, kSwish ? u * sigmoid<T>(u) : u);
            }
        }
    }
}

// first[j] += sum of dL/du, second[j] += sum of dL/du (y - shift), with u = a y + d.
template <class T, bool kSwish>
static void gradient_sums(const T* y, const T* grad, const Strips& s, const T* a, const T* d, const T* shift, T* parts,
                          double* first, double* second) {
    constexpr int W = sizeof(Vec<T>) / sizeof(T);
    const Partial<T> partial = {parts, first, second, s.period};
    for (int64_t b = 0; b < s.count; b += kBlock) {
        partial.clear();
        const int64_t end = b + kBlock < s.count ? b + kBlock : s.count;
        for (int64_t p0 = b; p0 < end; p0 += s.strip) {
            const int64_t p1 = p0 + s.strip < end ? p0 + s.strip : end;
            for (int64_t j = 0; j < s.period; j += W) {
                const Vec<T> slope = load(a + j), offset = load(d + j), centre = load(shift + j);
                Vec<T> one = load(parts + j), two = load(parts + s.period + j);
                for (int64_t p = p0; p < p1; ++p) {
                    const Vec<T> v = load(y + p * s.period + j);
                    const Vec<T> du = before_swish<T, kSwish>(load(grad + p * s.period + j), v * slope + offset);
                    one += du;
                    two += du * (v - centre);
                }
                store(parts + j, one);
                store(parts + s.period + j, two);
            }
        }
        partial.flush();
    }
}

// out = k dL/du + l (y - shift) + m, with u = a y + d; the coefficients are rows of one period: a, d, shift, k, l, m.
template <class T, bool kSwish>
static void backward(const T* y, const T* grad, const Strips& s, const T* const* rows, T* out) {
    constexpr int W = sizeof(Vec<T>) / sizeof(T);
    for (int64_t p0 = 0; p0 < s.count; p0 += s.strip) {
        const int64_t p1 = p0 + s.strip < s.count ? p0 + s.strip : s.count;
        for (int64_t j = 0; j < s.period; j += W) {
            const Vec<T> a = load(rows[0] + j), d = load(rows[1] + j), shift = load(rows[2] + j);
            const Vec<T> k = load(rows[3] + j), l = load(rows[4] + j), m = load(rows[5] + j);
            for (int64_t p = p0; p < p1; ++p) {
                const Vec<T> v = load(y + p * s.period + j);
                const Vec<T> du = before_swish<T, kSwish>(load(grad + p * s.period + j), v * a + d);
                store(out + p * s.period + j, k * du + l * (v - shift) + m);
            }
        }
    }
}

#undef MOVAE_INLINE
