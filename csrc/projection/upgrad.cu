// From a Jacobian's rows to UPGrad's weights in one launch.
//
// Each block computes the Gramian of its share of the columns in float64; the last to finish adds the shares in the
// order of the blocks (so that the sum is the same every time) and, up to 16 rows, solves: one warp per problem. Above,
// a second launch has one block per problem. How many blocks there are depends on the shape alone.
#include "projection/upgrad.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "common/team.h"

namespace movae {
namespace {

#include "projection/solver.h"

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBlocks = 512;  // shares of the Gramian, at most
constexpr int kColumnsAThread = 4;
constexpr int kStage = 32;  // columns that lie in shared memory at a time, for more than eight rows
constexpr unsigned kAll = Warp::kAll;

struct Task {
    Projection problem;  // `rows` problems, m of them for a sum
    double* each;        // [rows, m]: the solutions; for a sum scratch, else the projection's `out` itself
    int* unfinished;
    int32_t* status;
};

__host__ __device__ int row_stride(int m) { return m | 1; }  // odd: a column's entries lie in different banks
__host__ __device__ long shared_doubles(int m, int warps) {
    const long ld = row_stride(m);
    return (m + 1) * ld + warps * (scratch_size(m, int(ld)) + 2 * ld);
}

__device__ __forceinline__ bool prepare(const Projection& p, const double* gramian, double* A) {
    const int ld = row_stride(p.m);
    const Regulariser by = p.by_diagonal ? kDiagonal : kTrace;
    return prepare(Warp(), gramian, p.m, ld, by, p.norm_eps, p.reg_eps, A, A + static_cast<long>(p.m) * ld);
}

// One problem by one warp, as project_rows in kernel.h does it. The scales lie behind A.
__device__ __forceinline__ void project_row(const Task& task, int r, bool finite_gramian, const double* A, double* scratch) {
    const Warp warp;
    const Projection& p = task.problem;
    const bool add = p.mode == ProjectionMode::sum, multipliers = p.mode == ProjectionMode::multipliers;
    const int m = p.m, ld = row_stride(m);
    const double *scales = A + static_cast<long>(m) * ld, *given = p.given + (add ? 0 : static_cast<long>(r) * m);
    double *u = scratch, *q = u + ld, *out = task.each + static_cast<long>(r) * m;
    const double preference = add ? given[r] : 1;
    const bool adds_nothing = add && preference <= 0;
    double size = magnitude(preference);
    for (int k = 0; k < m; ++k) size += add ? 0 : magnitude(multipliers ? scales[k] * given[k] : given[k] / scales[k]);
    for (int k = warp.rank(); k < ld; k += 32) {
        const double value = k >= m ? 0 : add ? (k == r ? 1 : 0) : multipliers ? scales[k] * given[k] : given[k] / scales[k];
        u[k] = multipliers ? 0 : value, q[k] = multipliers ? value : 0;
    }
    __syncwarp();
    if (!finite_gramian || adds_nothing || !finite(size)) {
        const double value = finite_gramian && adds_nothing ? 0 : __longlong_as_double(0x7ff8000000000000ll);
        for (int k = warp.rank(); k < m; k += 32) out[k] = value;
        return;
    }
    Problem<Warp> problem(warp, m, ld, A, q + ld);
    const bool solved = problem.solve(u, multipliers ? q : nullptr, add ? r : -1, false);
    const double factor = add ? preference / scales[r] : 1;
    for (int k = warp.rank(); k < m; k += 32) out[k] = factor * scales[k] * problem.v[k];
    if (!solved && warp.rank() == 0) atomicAdd(task.unfinished, 1);
}

// The sum over the problems in their order, and the status; by one block, after all of them.
__device__ void finish(const Task& task, bool finite_gramian) {
    const Projection& p = task.problem;
    if (p.mode == ProjectionMode::sum)
        for (int k = threadIdx.x; k < p.m; k += blockDim.x) {
            double total = 0;
            for (int r = 0; r < p.rows; ++r) total += __ldcg(task.each + static_cast<long>(r) * p.m + k);
            p.out[k] = total;
        }
    if (threadIdx.x == 0) *task.status = finite_gramian ? atomicAdd(task.unfinished, 0) : -1;
}

// Whether this block is the last of the grid to come here; what the others wrote before is then visible.
__device__ bool last_block(int* counter) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(counter, 1) == static_cast<int>(gridDim.x) - 1;
    __syncthreads();
    __threadfence();
    return last;
}

// One block of one warp per problem.
__global__ void __launch_bounds__(32) project_kernel(Task task, int* counter) {
    extern __shared__ double shared[];
    const int m = task.problem.m, ld = row_stride(m);
    double* A = shared;
    const bool ok = prepare(task.problem, task.problem.gramian, A);
    if (static_cast<int>(blockIdx.x) < task.problem.rows)
        project_row(task, blockIdx.x, ok, A, A + static_cast<long>(m + 1) * ld);
    if (last_block(counter)) finish(task, ok);
}

__device__ double wide(float x) { return x; }
__device__ double wide(double x) { return x; }
__device__ double wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ double wide(__half x) { return __half2float(x); }

struct Jacobian {
    const void* rows;  // [m, columns]
    int dtype;         // as Dtype in common/dtype.h
    long columns, stride;
};

template <class T>
struct Share {
    const T* rows;
    long columns, stride;
    double* part;  // [m, m] of this block, upper triangle
};

// Up to eight rows: every product of a thread's columns in its registers.
template <class T, int M>
__device__ __forceinline__ void gramian_share(const Share<T>& share) {
    constexpr int kPairs = M * (M + 1) / 2;
    double sum[kPairs] = {};
    const long step = static_cast<long>(gridDim.x) * kThreads;
    for (long c = static_cast<long>(blockIdx.x) * kThreads + threadIdx.x; c < share.columns; c += step) {
        double x[M];
#pragma unroll
        for (int i = 0; i < M; ++i) x[i] = wide(share.rows[i * share.stride + c]);
#pragma unroll
        for (int i = 0, e = 0; i < M; ++i)
#pragma unroll
            for (int j = i; j < M; ++j, ++e) sum[e] += x[i] * x[j];
    }
    __shared__ double across[kWarps];
#pragma unroll
    for (int i = 0, e = 0; i < M; ++i)
#pragma unroll
        for (int j = i; j < M; ++j, ++e) {
            double total = sum[e];
            for (int k = 16; k; k >>= 1) total += __shfl_xor_sync(kAll, total, k);
            if ((threadIdx.x & 31) == 0) across[threadIdx.x >> 5] = total;
            __syncthreads();
            if (threadIdx.x == 0) {
                total = 0;
                for (int w = 0; w < kWarps; ++w) total += across[w];
                share.part[i * M + j] = total;
            }
            __syncthreads();
        }
}

// More rows: a stage of columns in shared memory, four by four products per thread, groups of threads sharing the columns.
template <class T>
__device__ __forceinline__ void gramian_share_tiles(const Share<T>& share, int m, double* shared) {
    constexpr int kSide = 4, kPitch = kStage + 1;
    const int blocks = (m + kSide - 1) / kSide, tiles = blocks * (blocks + 1) / 2, groups = min(kThreads / tiles, kStage);
    const int tile = threadIdx.x % tiles, group = threadIdx.x / tiles;
    int bi = 0, at = tile;
    while (at >= blocks - bi) at -= blocks - bi, ++bi;
    const int bj = bi + at;
    double sum[kSide][kSide] = {};
    const long step = static_cast<long>(gridDim.x) * kStage;
    for (long first = static_cast<long>(blockIdx.x) * kStage; first < share.columns; first += step) {
        for (int e = threadIdx.x; e < blocks * kSide * kStage; e += kThreads) {
            const int i = e / kStage, c = e % kStage;
            const bool inside = i < m && first + c < share.columns;
            shared[i * kPitch + c] = inside ? wide(share.rows[i * share.stride + first + c]) : 0;
        }
        __syncthreads();
        if (group < groups)
            for (int c = group; c < kStage; c += groups) {
                double x[kSide], y[kSide];
#pragma unroll
                for (int k = 0; k < kSide; ++k) {
                    x[k] = shared[(bi * kSide + k) * kPitch + c];
                    y[k] = shared[(bj * kSide + k) * kPitch + c];
                }
#pragma unroll
                for (int i = 0; i < kSide; ++i)
#pragma unroll
                    for (int j = 0; j < kSide; ++j) sum[i][j] += x[i] * y[j];
            }
        __syncthreads();
    }
    for (int g = 0; g < groups; ++g) {  // group by group, in order
        if (group == g)
#pragma unroll
            for (int i = 0; i < kSide; ++i)
#pragma unroll
                for (int j = 0; j < kSide; ++j) {
                    const int row = bi * kSide + i, column = bj * kSide + j;
                    if (row > column || column >= m) continue;
                    double* to = share.part + row * m + column;
                    *to = (g ? *to : 0) + sum[i][j];
                }
        __syncthreads();
    }
}

// The share for any dtype and number of rows of a class: 0 up to four, 1 up to eight, 2 above. A kernel for each
// dtype and number would hold the solver as often, and take minutes to compile; a class has the registers of its largest.
template <int kClass, class T>
__device__ __forceinline__ void share_of(const Jacobian& J, int m, double* part, double* shared) {
    const Share<T> share = {static_cast<const T*>(J.rows), J.columns, J.stride, part};
    if constexpr (kClass == 2) return gramian_share_tiles<T>(share, m, shared);
    if constexpr (kClass == 0) {
        if (m == 1) return gramian_share<T, 1>(share);
        if (m == 2) return gramian_share<T, 2>(share);
        if (m == 3) return gramian_share<T, 3>(share);
        return gramian_share<T, 4>(share);
    }
    if (m == 5) return gramian_share<T, 5>(share);
    if (m == 6) return gramian_share<T, 6>(share);
    if (m == 7) return gramian_share<T, 7>(share);
    return gramian_share<T, 8>(share);
}

template <int kClass>
__global__ void __launch_bounds__(kThreads, 1)
    upgrad_kernel(Jacobian J, double* parts, double* gramian, Task task, int* counter) {
    extern __shared__ double shared[];
    const int m = task.problem.m, entries = m * m;
    double* part = parts + static_cast<long>(blockIdx.x) * entries;
    switch (J.dtype) {
        case 0: share_of<kClass, float>(J, m, part, shared); break;
        case 1: share_of<kClass, double>(J, m, part, shared); break;
        case 2: share_of<kClass, __nv_bfloat16>(J, m, part, shared); break;
        default: share_of<kClass, __half>(J, m, part, shared);
    }
    if (!last_block(counter)) return;
    for (int e = threadIdx.x; e < entries; e += kThreads) {
        const int i = e / m, j = e % m;
        if (i > j) continue;
        double total = 0;
        for (unsigned b = 0; b < gridDim.x; ++b) total += __ldcg(parts + static_cast<long>(b) * entries + e);
        gramian[i * m + j] = gramian[j * m + i] = total;
    }
    if (m > kRowsInOneLaunch) return;
    __syncthreads();
    const int warp = threadIdx.x >> 5, ld = row_stride(m);
    double* A = shared;
    bool ok = true;
    if (warp == 0) ok = prepare(task.problem, gramian, A);
    ok = __syncthreads_and(ok);
    double* scratch = A + static_cast<long>(m + 1) * ld + warp * (scratch_size(m, ld) + 2 * ld);
    for (int r = warp; r < task.problem.rows; r += kWarps) project_row(task, r, ok, A, scratch);
    __threadfence();
    __syncthreads();
    finish(task, ok);
}

void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <class Kernel>
void allow_shared(Kernel kernel, long bytes) {
    if (bytes > 48 * 1024) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

void launch_project(const Task& task, int* counter, cudaStream_t stream) {
    const int m = task.problem.m, rows = task.problem.rows;
    const long bytes = shared_doubles(m, 1) * sizeof(double);
    allow_shared(project_kernel, bytes);
    const int blocks = rows > 0 ? rows : 1;
    project_kernel<<<blocks, 32, bytes, stream>>>(task, counter);
    check(cudaGetLastError());
}

template <int kClass>
void launch_upgrad(const Jacobian& J, double* parts, double* gramian, const Task& task, int* counter, cudaStream_t stream) {
    const int m = task.problem.m;
    const long each = kClass == 2 ? kStage : kThreads * kColumnsAThread;
    const long wanted = (J.columns + each - 1) / each, blocks = wanted < 1 ? 1 : wanted < kBlocks ? wanted : kBlocks;
    const long solving = m <= kRowsInOneLaunch ? shared_doubles(m, kWarps) : 0;
    const long staging = kClass == 2 ? (m + 3) / 4 * 4 * (kStage + 1) : 0;
    const long bytes = (solving > staging ? solving : staging) * sizeof(double);
    allow_shared(upgrad_kernel<kClass>, bytes);
    upgrad_kernel<kClass><<<unsigned(blocks), kThreads, bytes, stream>>>(J, parts, gramian, task, counter);
    check(cudaGetLastError());
}

}  // namespace

int64_t project_scratch(int m, int rows) { return static_cast<int64_t>(m) * rows + 1; }
int64_t upgrad_scratch(int m) { return static_cast<int64_t>(kBlocks + 1) * m * m + 2; }

void project_weights_cuda(Projection p, int32_t* status, double* scratch, void* stream) {
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    int* counters = reinterpret_cast<int*>(scratch);  // blocks that are done, problems that are not
    const bool sum = p.mode == ProjectionMode::sum;
    if (sum) p.rows = p.m;
    check(cudaMemsetAsync(counters, 0, 2 * sizeof(int), on));
    launch_project({p, sum ? scratch + 1 : p.out, counters + 1, status}, counters, on);
}

void upgrad_weights_cuda(const void* rows, int dtype, int64_t columns, int64_t stride, Projection p, double* gramian,
                         int32_t* status, double* scratch, void* stream) {
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    int* counters = reinterpret_cast<int*>(scratch);  // two of the blocks, one of the problems
    const int m = p.m;
    const bool sum = p.mode == ProjectionMode::sum;
    double *each = scratch + 2, *parts = each + static_cast<int64_t>(m) * m;
    check(cudaMemsetAsync(counters, 0, 4 * sizeof(int), on));
    p.rows = sum ? m : 1;
    const Task task = {p, sum ? each : p.out, counters + 2, status};
    const Jacobian J = {rows, dtype, columns, stride};
    (m <= 4 ? launch_upgrad<0> : m <= 8 ? launch_upgrad<1> : launch_upgrad<2>)(J, parts, gramian, task, counters, on);
    if (m > kRowsInOneLaunch) launch_project(task, counters + 1, on);
}

}  // namespace movae
