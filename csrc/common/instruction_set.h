// Which instruction set the CPU's ops are computed with: the fastest that it has, or the one that MOVAE_CPU_ISA names.
#pragma once

#include <string>
#include <vector>

// Loops over registers: unrolled before the compiler decides what lives in memory.
#define MOVAE_UNROLL _Pragma("GCC unroll 16")

namespace movae {

// From the slowest to the fastest. The last two differ from avx512 in the codebook search's bfloat16 products alone.
enum class InstructionSet { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

const char* name_of(InstructionSet isa);  // as MOVAE_CPU_ISA spells it

// Whether this CPU, and for AMX the kernel of its operating system, allows it.
bool has(InstructionSet isa);

// All that it has, the fastest first.
const std::vector<InstructionSet>& available_isas();

// The one of that name; "" and "auto" take the fastest. Throws std::invalid_argument for a name that is unknown or not
// available here.
InstructionSet isa_named(const std::string& name);

// What MOVAE_CPU_ISA names now: the variable is read at every call.
InstructionSet chosen_isa();

// The vectors that it comes with: kPortable, kAvx2 or kAvx512.
inline InstructionSet vectors_of(InstructionSet isa) { return isa < InstructionSet::kAvx512 ? isa : InstructionSet::kAvx512; }

}  // namespace movae
