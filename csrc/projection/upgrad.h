// The CUDA half of the Gramian's projection. Everything is enqueued on the stream that comes in; nothing is read on the host.
#pragma once

#include <cstdint>

#include "projection/project_weights.h"

namespace movae {

constexpr int kMostRows = 64;         // rows of a Jacobian that the tableau in shared memory is laid out for
constexpr int kRowsInOneLaunch = 16;  // up to here the block that finishes the Gramian solves it, too

// Scratch, in doubles; `rows` are the problems: m of them for a sum.
int64_t project_scratch(int m, int rows);
int64_t upgrad_scratch(int m);

// All addresses of the projection are of the device, and so are status (one int32) and scratch.
void project_weights_cuda(Projection p, int32_t* status, double* scratch, void* stream);

// The same from the rows [m, columns] of a Jacobian, for one vector; `gramian` is written, too. dtype as Dtype in common/dtype.h.
void upgrad_weights_cuda(const void* rows, int dtype, int64_t columns, int64_t stride, Projection p, double* gramian,
                         int32_t* status, double* scratch, void* stream);

}  // namespace movae
