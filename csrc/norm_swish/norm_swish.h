// BatchNorm of a gated map and the swish behind it, forward and backward, on the host. T is float or double.
#pragma once

#include <cstdint>

#include "common/instruction_set.h"

namespace movae {

template <class T>
struct NormInputs {
    const T* y;              // [B, pixels, C], contiguous: a map whose channels come last
    const T* gate;           // [B, C], with gate_stride 0 [C], or null: every gate is 1
    const T *weight, *bias;  // [C]
    int64_t batch, pixels, channels;
    int64_t gate_stride;  // from an example's gates to the next one's: C or 0
    double eps;           // added to the variance
    bool swish;           // whether x sigmoid(x) follows
};

// What the backward reads, written by the forward.
struct NormStatistics {
    double *mean, *squares;      // [B, C] of y over an example's pixels: mean, and sum of squared distances from it
    double *all_mean, *all_var;  // [C] of gate * y over the batch, the variance biased
};

template <class T>
struct NormGradients {
    const T* out;                 // [B, pixels, C], incoming
    T *y, *gate, *weight, *bias;  // outgoing, shaped as the inputs; gate null where the inputs' is
};

template <class T>
void norm_swish(const NormInputs<T>& in, T* out, const NormStatistics& statistics, InstructionSet isa, int threads);

template <class T>
void norm_swish_backward(const NormInputs<T>& in, const NormStatistics& statistics, const NormGradients<T>& g,
                         InstructionSet isa, int threads);

}  // namespace movae
