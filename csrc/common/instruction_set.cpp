// Which instruction sets there are is asked of the CPU, and the choice overridden by name.
#include "common/instruction_set.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#ifdef __x86_64__
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace movae {
namespace {

#ifdef __x86_64__
bool has_amx() {
#if defined(MOVAE_EMULATE_AMX)  // the tests' (nearest_code/amx.cpp)
    return true;
#elif defined(__linux__)
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
    constexpr uint32_t kBf16 = 1u << 22, kTile = 1u << 24;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
    // The kernel grants tile state to a process that asks (arch_prctl ARCH_REQ_XCOMP_PERM, component 18).
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

}  // namespace

const char* name_of(InstructionSet isa) {
    switch (isa) {
        case InstructionSet::kAmx: return "amx";
        case InstructionSet::kAvx512Bf16: return "avx512_bf16";
        case InstructionSet::kAvx512: return "avx512";
        case InstructionSet::kAvx2: return "avx2";
        default: return "portable";
    }
}

bool has(InstructionSet isa) {
    if (isa == InstructionSet::kPortable) return true;
#ifdef __x86_64__
    __builtin_cpu_init();
    switch (isa) {
        case InstructionSet::kAmx: return has(InstructionSet::kAvx512Bf16) && has_amx();
        case InstructionSet::kAvx512Bf16: return has(InstructionSet::kAvx512) && __builtin_cpu_supports("avx512bf16");
        case InstructionSet::kAvx512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        default: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    }
#else
    return false;
#endif
}

const std::vector<InstructionSet>& available_isas() {
    static const std::vector<InstructionSet> found = [] {
        std::vector<InstructionSet> isas;
        for (int k = static_cast<int>(InstructionSet::kAmx); k >= 0; --k)
            if (has(static_cast<InstructionSet>(k))) isas.push_back(static_cast<InstructionSet>(k));
        return isas;
    }();
    return found;
}

InstructionSet isa_named(const std::string& name) {
    if (name.empty() || name == "auto") return available_isas().front();
    std::string names;
    for (const InstructionSet isa : available_isas()) {
        if (name == name_of(isa)) return isa;
        names += std::string(names.empty() ? "" : ", ") + name_of(isa);
    }
    throw std::invalid_argument("MOVAE_CPU_ISA: '" + name +
                                "' is not an instruction set that this machine has; those are: " + names);
}

InstructionSet chosen_isa() {
    const char* asked = std::getenv("MOVAE_CPU_ISA");
    return isa_named(asked ? asked : "");
}

}  // namespace movae
