// The whole vector-quantisation forward in one pass over z, and its gradients.
#pragma once

#include "nearest_code/nearest_code.h"

namespace movae {

// What flows back through z_q: to z unchanged, to z turned as z was turned into its code, or to the code itself.
enum class Gradient : int { kStraightThrough = 0, kRotation = 1, kCodebook = 2 };

struct Quantized {        // outputs; null pointers are not written
    RowsView z_q;         // as z
    int64_t* index;       // [rows]
    void* squared_error;  // [rows], float32 (float64 for float64 z), as the next two
    void* count;          // [codes]
    void* code_sum;       // [codes, depth]
};

void quantize(const RowsView& z, const Codebook& codebook, const Quantized& out, InstructionSet isa, int threads);

// |z - code|^2 of given indices. Throws std::out_of_range, as the backward, for an index outside [0, codes).
void code_error(const RowsView& z, const Codebook& codebook, const int64_t* index, void* squared_error, InstructionSet isa,
                int threads);

struct QuantizeGradient {
    RowsView grad_z_q;       // as z; data may be null: no gradient
    const void* grad_error;  // [rows] in the accumulation dtype; may be null
    Gradient through;
    RowsView grad_z;      // as z; data may be null: not wanted
    void* grad_codebook;  // [codes, depth] in the accumulation dtype; may be null
};

void quantize_backward(const RowsView& z, const Codebook& codebook, const int64_t* index, const QuantizeGradient& gradient,
                       InstructionSet isa, int threads);

}  // namespace movae
