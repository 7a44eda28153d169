// The Python module movae_fast._csrc. Each folder of csrc/ binds its own functions (bind.cpp); this one holds what
// `movae doctor` asks of the build and of the machine.
#include "common/bind.h"

#include <utility>
#ifdef __linux__
#include <malloc.h>
#endif

#include "common/instruction_set.h"

namespace py = pybind11;
using namespace movae;

#ifdef MOVAE_WITH_CUDA
// As cuda_runtime_api.h declares them, which nvcc finds and this file's compiler need not.
extern "C" {
int cudaDriverGetVersion(int* version);
int cudaRuntimeGetVersion(int* version);
}
#define MOVAE_STRING(...) #__VA_ARGS__
#define MOVAE_EXPANDED(...) MOVAE_STRING(__VA_ARGS__)
#endif

namespace {

#ifdef MOVAE_WITH_CUDA
// 1000 * major + 10 * minor of the newest CUDA that the driver serves (0 without a driver), and of the runtime in here.
std::pair<int, int> cuda_versions() {
    int driver = 0, runtime = 0;
    if (cudaDriverGetVersion(&driver) != 0) driver = 0;
    if (cudaRuntimeGetVersion(&runtime) != 0) runtime = 0;
    return {driver, runtime};
}
#endif

py::dict cpu_features() {
    py::dict features;
#ifdef __x86_64__
    features["avx2"] = has(InstructionSet::kAvx2);
    features["avx512"] = has(InstructionSet::kAvx512);
    features["avx512_bf16"] = has(InstructionSet::kAvx512Bf16);
    features["amx_bf16"] = has(InstructionSet::kAmx);
#endif
    return features;
}

// A step allocates and frees the same few hundred MB; by default glibc hands large blocks back to the kernel
// each time, and the next step faults them in again, page by page.
bool keep_freed_memory() {
#ifdef __GLIBC__
    constexpr int kLargestThreshold = 32 << 20;  // the most that glibc takes
    return mallopt(M_MMAP_THRESHOLD, kLargestThreshold) && mallopt(M_TRIM_THRESHOLD, 0x7fffffff);
#else
    return false;
#endif
}

py::dict build_info() {
    py::dict info;
    info["compiler"] = __VERSION__;
#ifdef _OPENMP
    info["openmp"] = _OPENMP;
#endif
#ifdef MOVAE_WITH_CUDA
    info["cuda"] = true;
#ifdef MOVAE_CUDA_ARCHITECTURES
    info["architectures"] = MOVAE_EXPANDED(MOVAE_CUDA_ARCHITECTURES);
#endif
#else
    info["cuda"] = false;
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(_csrc, m) {
    m.doc() = "movae-fast's C++ and CUDA: raw pointers, sizes and a stream come in; no torch headers.";
    m.def("cpu_features", &cpu_features, "Instruction sets this CPU and this kernel allow: name -> bool.");
    m.def("keep_freed_memory", &keep_freed_memory,
          "Let this process keep memory that it freed for its next allocations; whether the C library can.");
    m.def("build_info", &build_info,
          "How this extension was built: compiler, OpenMP version, CUDA or not, and for which architectures.");
#ifdef MOVAE_WITH_CUDA
    m.def("cuda_versions", &cuda_versions, "CUDA versions of the driver (0: none) and of the runtime built in.");
#endif
    bind_combine(m);
    bind_gramian(m);
    bind_gramian_weights(m);
    bind_nearest_code(m);
    bind_norm_swish(m);
    bind_project_weights(m);
    bind_quantize(m);
    bind_tc_terms(m);
}
