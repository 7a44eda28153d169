// Weights from a Gramian by one warp. The matrices are small and the work is serial: one launch, and no host in it.
#include <cstdint>
#include <stdexcept>
#include <string>

#include "weightings/gramian_weights_cuda.h"

namespace movae {
namespace {

__global__ void __launch_bounds__(32) weigh_kernel(WeightingTask task, double* scratch) {
    weightings::weigh(Warp(), task, scratch);
}

}  // namespace

void gramian_weights_cuda(const WeightingTask& task, double* scratch, void* stream) {
    weigh_kernel<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(task, scratch);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

}  // namespace movae
