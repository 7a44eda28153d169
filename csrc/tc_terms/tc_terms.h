// log q(z) and sum_d log q(z_d) of the aggregate posterior, forward and backward, on the host. T is float or double.
#pragma once

#include <cstdint>

#include "common/instruction_set.h"

namespace movae {

template <class T>
struct TcInputs {
    const T *z, *mu, *logvar;  // [B, D], contiguous
    int64_t batch, dims;
    int64_t n_data;   // size of the data set
    bool stratified;  // minibatch-stratified sampling, else minibatch-weighted
};

// [B, D + 1]: of each dimension and, last, of the joint, the largest log density and the sum of exp(. - largest).
template <class T>
struct TcSums {
    T *top, *total;
};

template <class T>
struct TcGradients {
    const T *log_q_z, *log_prod_q_z;  // [B], incoming
    T *z, *mu, *logvar;               // [B, D], outgoing
};

// Writes the terms [B] and the sums that the backward reads.
template <class T>
void tc_terms(const TcInputs<T>& in, T* log_q_z, T* log_prod_q_z, const TcSums<T>& sums, InstructionSet isa, int threads);

template <class T>
void tc_terms_backward(const TcInputs<T>& in, const TcSums<T>& sums, const TcGradients<T>& g, InstructionSet isa, int threads);

}  // namespace movae
