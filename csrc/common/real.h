// Float64 arithmetic that the host's and the device's code share.
#pragma once

// Before a function of both. One source serves them: csrc/projection/solver.h, csrc/weightings/gramian_weights.h.
#ifdef __CUDACC__
#define MOVAE_HD __host__ __device__ __forceinline__
#else
#define MOVAE_HD inline
#endif

namespace movae {

constexpr double kEps = 2.220446049250313e-16;  // from 1 to the next number

MOVAE_HD double magnitude(double x) { return x < 0 ? -x : x; }
MOVAE_HD double larger(double a, double b) { return a > b ? a : b; }
MOVAE_HD bool finite(double x) { return magnitude(x) <= 1.7976931348623157e308; }

}  // namespace movae
