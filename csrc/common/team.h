// Who works on one small problem: a team is one thread of the host, or a warp of the device.
//
// Its members number themselves by rank(), and for a matrix by row() and column(). All of them run the same decisions on
// the same numbers and share the writing; between a write and another member's read lies a sync().
#pragma once

#include "common/real.h"

namespace movae {

struct OneThread {
    static constexpr int rank() { return 0; }
    static constexpr int size() { return 1; }
    static constexpr int row() { return 0; }
    static constexpr int rows() { return 1; }
    static constexpr int column() { return 0; }
    static constexpr int columns() { return 1; }
    MOVAE_HD void sync() const {}
    MOVAE_HD double most(double x) const { return x; }  // the largest of all members'
    template <class Candidate>
    MOVAE_HD Candidate best(Candidate mine, bool) const {  // of all members', as better() has it
        return mine;
    }
};

#ifdef __CUDACC__
// Rows of a matrix four at a time, eight lanes to a row.
struct Warp {
    static constexpr unsigned kAll = 0xffffffffu;
    __device__ int rank() const { return threadIdx.x & 31; }
    __device__ int size() const { return 32; }
    __device__ int row() const { return rank() >> 3; }
    __device__ int rows() const { return 4; }
    __device__ int column() const { return rank() & 7; }
    __device__ int columns() const { return 8; }
    __device__ void sync() const { __syncwarp(); }
    __device__ double most(double x) const {
        for (int k = 16; k; k >>= 1) x = larger(x, __shfl_xor_sync(kAll, x, k));
        return x;
    }
    template <class Candidate>
    __device__ Candidate best(Candidate mine, bool least_index) const {
        for (int k = 16; k; k >>= 1) {
            const Candidate other = {__shfl_xor_sync(kAll, mine.value, k), __shfl_xor_sync(kAll, mine.index, k)};
            mine = better(mine, other, least_index);
        }
        return mine;
    }
};
#endif

}  // namespace movae
