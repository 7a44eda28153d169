// CUDA's language on a CPU, as much of it as csrc/**/*.cu use: the blocks of a launch run one after the other, the threads of
// a block as fibers that take turns at barriers. AddressSanitizer and ThreadSanitizer know of the fibers: to the latter
// each is a thread, and nothing but the kernel's own barriers and atomics orders what two of them do.
//
// A launch `kernel<<<grid, block, bytes, stream>>>(...)` is rewritten to emulated::launch(...), and `extern __shared__` to
// a pointer to memory of exactly that many bytes, filled with NaN; build.py does both.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __CUDACC__ 1  // the sources' own switch between host and device
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // a block at a time

using std::max;
using std::min;

struct EmulatedIndex {
    unsigned x = 0, y = 0, z = 0;
};
extern thread_local EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

enum class Order { ascending, descending, random };
extern Order order;      // of the blocks of a launch, and of the fibers between two barriers
extern long most_bytes;  // of shared memory that a block may ask for: 99 KiB on sm_86, sm_89 and sm_120

void launch(long grid, long block, long bytes, const std::function<void()>& kernel);
double* dynamic_shared();
void meet_block();
void meet_warp();
void* slot(unsigned thread);  // eight bytes of a thread of this block, for shuffles and votes
int error(bool forget);       // of a launch
bool ask_for(long bytes);     // whether a block may have so much shared memory

template <class T>
T shuffled(T value, unsigned from) {
    static_assert(sizeof(T) <= 8);
    std::memcpy(slot(threadIdx.x), &value, sizeof value);
    meet_warp();
    std::memcpy(&value, slot(from), sizeof value);
    meet_warp();  // before the slot is written again
    return value;
}

}  // namespace emulated

inline void __syncthreads() { emulated::meet_block(); }
inline void __syncwarp(unsigned = ~0u) { emulated::meet_warp(); }
inline void __threadfence() {}
inline int __syncthreads_and(int predicate) {
    std::memcpy(emulated::slot(threadIdx.x), &predicate, sizeof predicate);
    emulated::meet_block();
    int all = 1, one = 0;
    for (unsigned i = 0; i < blockDim.x; ++i) {
        std::memcpy(&one, emulated::slot(i), sizeof one);
        all &= one != 0;
    }
    emulated::meet_block();
    return all;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
    return emulated::shuffled(value, threadIdx.x ^ unsigned(lanes));
}
template <class T>
T __ldcg(const T* p) {
    return *p;
}
inline int atomicAdd(int* p, int value) { return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST); }
inline double __longlong_as_double(long long bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

typedef void* cudaStream_t;
typedef int cudaError_t;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
    std::memset(p, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return emulated::error(true); }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
    return emulated::ask_for(bytes) ? cudaSuccess : cudaErrorInvalidValue;
}
