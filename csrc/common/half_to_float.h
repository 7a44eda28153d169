// Many halves to float32, by the CPU's own conversion where it has one.
#pragma once

#include <cstdint>

#include "common/instruction_set.h"

namespace movae {

// out [n] <- x [n], exactly.
using HalfToFloat = void (*)(const uint16_t* x, float* out, int64_t n);

HalfToFloat half_to_float(InstructionSet isa);

}  // namespace movae
