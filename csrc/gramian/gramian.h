// Inner products of a Jacobian's rows in float64, and the rows' weighted sum, on the host.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/instruction_set.h"

namespace movae {

struct Rows {
    const void* data;
    Dtype dtype;
    int64_t m, columns, stride;  // stride: from one row to the next, in items; a row is contiguous
};

// out [m, m] float64, symmetric to the last bit. The order of summation depends on m, columns and the instruction set alone.
void gramian(const Rows& rows, double* out, InstructionSet isa, int threads);

// out [columns] in the rows' dtype: weights @ rows, added up in float32 (float64 for float64 rows), one row after another.
void combine(const Rows& rows, const double* weights, void* out, InstructionSet isa, int threads);

}  // namespace movae
