// Which kernels to run: asked of the CPU, overridden by name.
#include "nearest_code/nearest_code.h"

#include <cstdlib>
#include <stdexcept>

namespace movae {
namespace {

// Fastest first.
std::vector<Isa> available() {
    std::vector<Isa> found;
    if (const BfloatKernels* k = amx_kernels()) found.push_back({k->name, avx512_kernels(), k, true});
    if (const BfloatKernels* k = avx512_bf16_kernels()) found.push_back({k->name, avx512_kernels(), k, false});
    for (const FloatKernels* k : {avx512_kernels(), avx2_kernels(), portable_kernels()})
        if (k) found.push_back({k->name, k, nullptr, false});
    return found;
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : available()) names.emplace_back(isa.name);
    return names;
}

Isa find_isa(const std::string& name) {
    static const std::vector<Isa> found = available();
    const char* asked = std::getenv("MOVAE_CPU_ISA");
    const std::string wanted = !name.empty() ? name : asked ? asked : "";
    if (wanted.empty()) return found.front();
    std::string names;
    for (const Isa& isa : found) {
        if (wanted == isa.name) return isa;
        names += std::string(names.empty() ? "" : ", ") + isa.name;
    }
    throw std::invalid_argument("CPU path '" + wanted + "' (argument isa, or MOVAE_CPU_ISA) is not one of this machine's: " + names);
}

}  // namespace movae
