// The inner loops of the Gramian and of the weighted sum, included once per instruction set with MOVAE_VECTOR_BYTES set.

#define MOVAE_INLINE __attribute__((always_inline)) inline

constexpr int kLanes64 = MOVAE_VECTOR_BYTES / 8;
// Rows a tile side: its sums, kBlock^2 vectors, must fit the registers beside the operands.
constexpr int kBlock = MOVAE_VECTOR_BYTES == 64 ? 4 : 3;

typedef double Doubles __attribute__((vector_size(MOVAE_VECTOR_BYTES)));
typedef float HalfFloats __attribute__((vector_size(MOVAE_VECTOR_BYTES / 2)));

MOVAE_INLINE Doubles load64(const float* x) {
    HalfFloats v;
    __builtin_memcpy(&v, x, sizeof v);
    return __builtin_convertvector(v, Doubles);
}
MOVAE_INLINE Doubles load64(const double* x) {
    Doubles v;
    __builtin_memcpy(&v, x, sizeof v);
    return v;
}

// out[i * ld + j] += a_i . b_j over n columns: the rows a (R of them) by the rows b (S), or a by itself, i <= j.
template <class T, int R, int S, bool kDiagonal, int kUnroll>
void tile(const T* a, const T* b, int64_t stride, int64_t n, double* out, int64_t ld) {
    Doubles sum[kUnroll][R][S] = {};
    const auto step = [&](const T* pa, const T* pb, int u) __attribute__((always_inline)) {
        Doubles x[R], y[S];
        MOVAE_UNROLL
        for (int i = 0; i < R; ++i) x[i] = load64(pa + i * stride);
        MOVAE_UNROLL
        for (int j = 0; j < S; ++j) y[j] = kDiagonal ? x[j < R ? j : 0] : load64(pb + j * stride);
        MOVAE_UNROLL
        for (int i = 0; i < R; ++i) {
            MOVAE_UNROLL
            for (int j = kDiagonal ? i : 0; j < S; ++j) sum[u][i][j] += x[i] * y[j];
        }
    };
    int64_t k = 0;
    for (; k + kUnroll * kLanes64 <= n; k += kUnroll * kLanes64) {
        MOVAE_UNROLL
        for (int u = 0; u < kUnroll; ++u) step(a + k + u * kLanes64, b + k + u * kLanes64, u);
    }
    for (; k + kLanes64 <= n; k += kLanes64) step(a + k, b + k, 0);
    const int64_t rest = n - k;
    for (int i = 0; i < R; ++i)
        for (int j = kDiagonal ? i : 0; j < S; ++j) {
            Doubles total = sum[0][i][j];
            for (int u = 1; u < kUnroll; ++u) total += sum[u][i][j];
            double s = 0;
            for (int l = 0; l < kLanes64; ++l) s += total[l];
            const T *pa = a + i * stride + k, *pb = (kDiagonal ? a : b) + j * stride + k;
            for (int64_t l = 0; l < rest; ++l) s += double(pa[l]) * double(pb[l]);
            out[i * ld + j] += s;
        }
}

template <class T, int R>
void diagonal_tile(const T* a, int64_t stride, int64_t n, double* out, int64_t ld) {
    constexpr int kSums = R * (R + 1) / 2, kUnroll = kSums == 1 ? 8 : kSums == 3 ? 4 : kLanes64 == 8 ? 2 : 1;
    tile<T, R, R, true, kUnroll>(a, a, stride, n, out, ld);
}

template <class T, int S>
void side_tile(const T* a, const T* b, int64_t stride, int64_t n, double* out, int64_t ld) {
    tile<T, kBlock, S, false, S == 1 ? 2 : 1>(a, b, stride, n, out, ld);
}

// part [m, m] += the upper triangle of x x' for n columns x [m, n], block of rows by block of rows.
template <class T>
void add_products(const T* x, int64_t stride, int64_t m, int64_t n, double* part) {
    for (int64_t i = 0; i < m; i += kBlock) {
        const T* a = x + i * stride;
        double* out = part + i * m + i;
        switch (m - i) {
            case 1: diagonal_tile<T, 1>(a, stride, n, out, m); break;
            case 2: diagonal_tile<T, 2>(a, stride, n, out, m); break;
            case 3: diagonal_tile<T, 3>(a, stride, n, out, m); break;
            default: diagonal_tile<T, kBlock>(a, stride, n, out, m);
        }
        for (int64_t j = i + kBlock; j < m; j += kBlock) {
            const T* b = x + j * stride;
            double* to = part + i * m + j;
            switch (m - j) {
                case 1: side_tile<T, 1>(a, b, stride, n, to, m); break;
                case 2: side_tile<T, 2>(a, b, stride, n, to, m); break;
                case 3: side_tile<T, 3>(a, b, stride, n, to, m); break;
                default: side_tile<T, kBlock>(a, b, stride, n, to, m);
            }
        }
    }
}

template <class T>
struct Vector;
template <>
struct Vector<float> {
    typedef float type __attribute__((vector_size(MOVAE_VECTOR_BYTES)));
};
template <>
struct Vector<double> {
    typedef double type __attribute__((vector_size(MOVAE_VECTOR_BYTES)));
};
template <class T>
using Wide = typename Vector<T>::type;

// Past the caches: the gradient is written once and read much later, and an ordinary store would first read the line.
template <class T>
MOVAE_INLINE void stream(T* out, const Wide<T>& v) {
#if MOVAE_VECTOR_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), __m512i(v));
#elif MOVAE_VECTOR_BYTES == 32
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), __m256i(v));
#else
    __builtin_memcpy(out, &v, sizeof v);
#endif
}

// out = weights @ x over n columns of R rows, plus what `out` holds if kAdd.
template <class T, int R, bool kAdd, bool kStream>
void sum_rows(const T* x, int64_t stride, const T* weights, int64_t n, T* out) {
    constexpr int kItems = MOVAE_VECTOR_BYTES / sizeof(T);
    T w[R];
    for (int i = 0; i < R; ++i) w[i] = weights[i];
    int64_t k = 0;
    for (; k + kItems <= n; k += kItems) {
        Wide<T> total = {}, v;
        if (kAdd) __builtin_memcpy(&total, out + k, sizeof total);
        MOVAE_UNROLL
        for (int i = 0; i < R; ++i) {
            __builtin_memcpy(&v, x + i * stride + k, sizeof v);
            total = i == 0 && !kAdd ? w[i] * v : total + w[i] * v;
        }
        if (kStream)
            stream<T>(out + k, total);
        else
            __builtin_memcpy(out + k, &total, sizeof total);
    }
    for (; k < n; ++k) {
        T total = kAdd ? out[k] : T(0);
        for (int i = 0; i < R; ++i) total += w[i] * x[i * stride + k];
        out[k] = total;
    }
}

template <class T, bool kAdd, bool kStream>
void sum_some(const T* x, int64_t stride, const T* weights, int64_t m, int64_t n, T* out) {
    switch (m) {
        case 1: return sum_rows<T, 1, kAdd, kStream>(x, stride, weights, n, out);
        case 2: return sum_rows<T, 2, kAdd, kStream>(x, stride, weights, n, out);
        case 3: return sum_rows<T, 3, kAdd, kStream>(x, stride, weights, n, out);
        case 4: return sum_rows<T, 4, kAdd, kStream>(x, stride, weights, n, out);
        case 5: return sum_rows<T, 5, kAdd, kStream>(x, stride, weights, n, out);
        case 6: return sum_rows<T, 6, kAdd, kStream>(x, stride, weights, n, out);
        case 7: return sum_rows<T, 7, kAdd, kStream>(x, stride, weights, n, out);
        default: return sum_rows<T, 8, kAdd, kStream>(x, stride, weights, n, out);
    }
}

// out [n] = weights @ x: eight rows at a time, the first eight overwriting. Past the caches only if one sweep does it all.
template <class T>
void weighted_sum(const T* x, int64_t stride, const T* weights, int64_t m, int64_t n, T* out, bool past_caches) {
    if (m <= 8 && past_caches && reinterpret_cast<uintptr_t>(out) % MOVAE_VECTOR_BYTES == 0)
        return sum_some<T, false, true>(x, stride, weights, m, n, out);
    sum_some<T, false, false>(x, stride, weights, m < 8 ? m : 8, n, out);
    for (int64_t i = 8; i < m; i += 8)
        sum_some<T, true, false>(x + i * stride, stride, weights + i, m - i < 8 ? m - i : 8, n, out);
}

void from_bfloat(const uint16_t* x, float* out, int64_t n) {
    for (int64_t k = 0; k < n; ++k) out[k] = from_bfloat16(x[k]);
}

void to_bfloat(const float* x, uint16_t* out, int64_t n) {
    for (int64_t k = 0; k < n; ++k) out[k] = to_bfloat16_or_nan(x[k]);
}

#undef MOVAE_INLINE
