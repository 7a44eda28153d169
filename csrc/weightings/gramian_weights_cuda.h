// The CUDA half of the weightings: one launch of one warp, enqueued on the stream that comes in.
#pragma once

#include <cstdint>

#include "weightings/gramian_weights.h"

namespace movae {

// Device addresses in the task; scratch of weightings::scratch_size(m) doubles on the device.
void gramian_weights_cuda(const WeightingTask& task, double* scratch, void* stream);

}  // namespace movae
