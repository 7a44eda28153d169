#include "nearest_code/kernels.h"

namespace movae {

Kernels kernels_of(InstructionSet isa) {
    const HalfToFloat widen = half_to_float(isa);
#ifdef __x86_64__
    switch (isa) {
        case InstructionSet::kAmx: return {avx512_kernels(), amx_kernels(), true, widen};
        case InstructionSet::kAvx512Bf16: return {avx512_kernels(), avx512_bf16_kernels(), false, widen};
        case InstructionSet::kAvx512: return {avx512_kernels(), nullptr, false, widen};
        case InstructionSet::kAvx2: return {avx2_kernels(), nullptr, false, widen};
        default: break;
    }
#endif
    return {portable_kernels(), nullptr, false, widen};
}

#ifndef __x86_64__
void amx_configure() {}
void amx_release() {}
#endif

}  // namespace movae
