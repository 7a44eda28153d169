// Exact nearest-codeword search on the CPU; nearest_code.cpp has the algorithm.
#pragma once

#include <cstdint>
#include <functional>

#include "common/dtype.h"
#include "common/instruction_set.h"

namespace movae {

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

// Called once for every block of rows as soon as its indices are final, from the thread that found them.
using BlockDone = std::function<void(int64_t first_row, int rows, const int64_t* index)>;

void nearest_code(const RowsView& z, const Codebook& codebook, int64_t* index, bool exact, InstructionSet isa, int threads,
                  const BlockDone& done = {});

}  // namespace movae
