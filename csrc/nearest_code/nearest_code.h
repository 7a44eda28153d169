// Exact nearest-codeword search on the CPU; see nearest_code.cpp for the algorithm.
#pragma once

#include "nearest_code/kernels.h"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace movae {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBfloat16 = 2, kFloat16 = 3 };

inline int64_t item_size(Dtype dtype) {
    return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// batch x spatial rows of `depth` numbers, strides in elements: [N, D] is batch 1, and [B, D, *spatial] is read
// where it lies. Row number n is (n / spatial, n % spatial).
struct RowsView {
    void* data;
    Dtype dtype;
    int64_t batch, spatial, depth;
    int64_t batch_stride, spatial_stride, depth_stride;

    int64_t rows() const { return batch * spatial; }
    int64_t offset(int64_t row) const { return row / spatial * batch_stride + row % spatial * spatial_stride; }
};

struct Codebook {  // [count, depth], contiguous
    const void* data;
    Dtype dtype;
    int64_t count, depth;
};

// Waking a thread costs what about 10^5 operations cost; a small problem is not worth it.
inline int useful_threads(int threads, int64_t operations) {
    const int64_t useful = 1 + (operations >> 17);
    return static_cast<int>(useful < threads ? useful : threads < 1 ? 1 : threads);
}

struct Isa {
    const char* name;
    const FloatKernels* exact;      // never null
    const BfloatKernels* screening;  // null: float32 screens
    bool tiles;                     // AMX: each thread configures its tiles
};

// What `name` asks for; "" takes MOVAE_CPU_ISA from the environment, else the fastest this CPU has. Throws
// std::invalid_argument for a name that is unknown or not available here.
Isa find_isa(const std::string& name);
std::vector<std::string> available_isas();

// Called once for every block of rows as soon as its indices are final, from the thread that found them.
using BlockDone = std::function<void(int64_t first_row, int rows, const int64_t* index)>;

void nearest_code(const RowsView& z, const Codebook& codebook, int64_t* index, bool exact, const Isa& isa,
                  int threads, const BlockDone& done = {});

}  // namespace movae
