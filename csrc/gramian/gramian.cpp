// The Gramian and the weighted sum of a Jacobian's rows: which columns go where, and in which order they are added.
#include "gramian/gramian.h"

#include <algorithm>
#include <cstring>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "common/half_to_float.h"
#include "common/threads.h"

namespace movae {
namespace {

constexpr int64_t kChunk = 16384;      // columns of one partial Gramian, at least
constexpr int64_t kChunks = 512;       // partial Gramians, at most
constexpr int64_t kColumns = 1024;     // columns that stay in the second-level cache while all pairs of rows meet
constexpr int64_t kSumColumns = 4096;  // columns of one piece of the weighted sum

constexpr int64_t kPastCaches = int64_t(8) << 20;  // bytes of a result that would only drive others out of the cache

#define MOVAE_KERNEL "gramian/kernel.h"
#include "common/every_isa.h"

template <class T>
struct Path {
    void (*add_products)(const T*, int64_t, int64_t, int64_t, double*);
    void (*weighted_sum)(const T*, int64_t, const T*, int64_t, int64_t, T*, bool);
    void (*from_bfloat)(const uint16_t*, float*, int64_t);
    void (*to_bfloat)(const float*, uint16_t*, int64_t);
    HalfToFloat from_half;
};
#define MOVAE_PATH(ns) {ns::add_products<T>, ns::weighted_sum<T>, ns::from_bfloat, ns::to_bfloat, half_to_float(isa)}

template <class T>
Path<T> choose(InstructionSet isa) {
#ifdef __x86_64__
    if (vectors_of(isa) == InstructionSet::kAvx512) return MOVAE_PATH(avx512);
    if (isa == InstructionSet::kAvx2) return MOVAE_PATH(avx2);
#endif
    return MOVAE_PATH(portable);
}

// n columns of every row as T: where they lie, or widened into `scratch` [m, n].
template <class T>
struct Columns {
    const T* x;
    int64_t stride;
};

template <class T>
Columns<T> columns(const Rows& rows, int64_t first, int64_t n, T* scratch, const Path<T>& path) {
    if (rows.dtype == Dtype::kFloat32 || rows.dtype == Dtype::kFloat64)
        return {static_cast<const T*>(rows.data) + first, rows.stride};
    for (int64_t i = 0; i < rows.m; ++i) {
        const uint16_t* from = static_cast<const uint16_t*>(rows.data) + i * rows.stride + first;
        float* to = reinterpret_cast<float*>(scratch) + i * n;  // half precision only comes with T = float
        if (rows.dtype == Dtype::kBfloat16)
            path.from_bfloat(from, to, n);
        else
            path.from_half(from, to, n);
    }
    return {scratch, n};
}

bool is_half(const Rows& rows) { return item_size(rows.dtype) == 2; }

template <class T>
void products(const Rows& rows, double* out, InstructionSet isa, int threads) {
    const Path<T> path = choose<T>(isa);
    const int64_t m = rows.m;
    const int64_t chunk = std::max(kChunk, ((rows.columns + kChunks - 1) / kChunks + 63) / 64 * 64);
    const int64_t chunks = std::max<int64_t>(1, (rows.columns + chunk - 1) / chunk);
    threads = static_cast<int>(std::min<int64_t>(useful_threads(threads, m * (m + 1) / 2 * rows.columns), chunks));
    // One block of rows meets only itself: its columns may run through the cache.
    const int64_t piece = m <= 4 && !is_half(rows) ? chunk : kColumns;
    std::vector<double> parts(chunks * m * m);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<T> scratch(is_half(rows) ? m * piece : 0);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < chunks; ++c) {
            const int64_t end = std::min(rows.columns, (c + 1) * chunk);
            for (int64_t k = c * chunk; k < end; k += piece) {
                const int64_t n = std::min(piece, end - k);
                const Columns<T> here = columns(rows, k, n, scratch.data(), path);
                path.add_products(here.x, here.stride, m, n, parts.data() + c * m * m);
            }
        }
    }
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = i; j < m; ++j) {
            double sum = 0;
            for (int64_t c = 0; c < chunks; ++c) sum += parts[(c * m + i) * m + j];
            out[i * m + j] = out[j * m + i] = sum;
        }
}

template <class T>
void weighted_sum(const Rows& rows, const double* weights, void* out, InstructionSet isa, int threads) {
    const Path<T> path = choose<T>(isa);
    const std::vector<T> w(weights, weights + rows.m);
    const int64_t pieces = (rows.columns + kSumColumns - 1) / kSumColumns, size = item_size(rows.dtype);
    const bool half = is_half(rows), past_caches = rows.columns * size >= kPastCaches;
    threads = useful_threads(threads, (rows.m + 1) * rows.columns);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<T> scratch(half ? (rows.m + 1) * kSumColumns : 0);
        T* sum = scratch.data() + (half ? rows.m * kSumColumns : 0);
        // From the last columns to the first: what a Gramian has just read last is still in the cache.
#pragma omp for schedule(static)
        for (int64_t back = 0; back < pieces; ++back) {
            const int64_t first = (pieces - 1 - back) * kSumColumns, n = std::min(kSumColumns, rows.columns - first);
            const Columns<T> here = columns(rows, first, n, scratch.data(), path);
            T* to = half ? sum : static_cast<T*>(out) + first;
            path.weighted_sum(here.x, here.stride, w.data(), rows.m, n, to, past_caches && !half);
            uint16_t* packed = static_cast<uint16_t*>(out) + first;
            if (rows.dtype == Dtype::kBfloat16) path.to_bfloat(reinterpret_cast<float*>(sum), packed, n);
            if (rows.dtype == Dtype::kFloat16)
                for (int64_t k = 0; k < n; ++k) packed[k] = to_half(static_cast<float>(sum[k]));
        }
#ifdef __x86_64__
        _mm_sfence();  // streamed stores are ordered before whatever follows
#endif
    }
}

}  // namespace

void gramian(const Rows& rows, double* out, InstructionSet isa, int threads) {
    if (rows.dtype == Dtype::kFloat64)
        products<double>(rows, out, isa, threads);
    else
        products<float>(rows, out, isa, threads);
}

void combine(const Rows& rows, const double* weights, void* out, InstructionSet isa, int threads) {
    if (rows.m == 0) {
        std::memset(out, 0, rows.columns * item_size(rows.dtype));
        return;
    }
    if (rows.dtype == Dtype::kFloat64)
        weighted_sum<double>(rows, weights, out, isa, threads);
    else
        weighted_sum<float>(rows, weights, out, isa, threads);
}

}  // namespace movae
