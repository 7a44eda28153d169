// Python's door to the gated BatchNorm with swish.
#include <pybind11/stl.h>

#include <array>

#include "common/bind.h"
#include "norm_swish/norm_swish.h"

namespace py = pybind11;
using namespace movae;

namespace {

// Addresses of y, gate (0: none), weight, bias and the statistics [B, C], [B, C], [C], [C].
using Addresses = std::array<std::uintptr_t, 8>;

template <class T>
NormInputs<T> inputs(const Addresses& at, int64_t batch, int64_t pixels, int64_t channels, int64_t gate_stride, double eps,
                     bool swish) {
    return {pointer<const T>(at[0]),
            pointer<const T>(at[1]),
            pointer<const T>(at[2]),
            pointer<const T>(at[3]),
            batch,
            pixels,
            channels,
            gate_stride,
            eps,
            swish};
}
NormStatistics statistics(const Addresses& at) {
    return {pointer<double>(at[4]), pointer<double>(at[5]), pointer<double>(at[6]), pointer<double>(at[7])};
}

template <class T>
void forward(const Addresses& at, std::uintptr_t out, int64_t batch, int64_t pixels, int64_t channels, int64_t gate_stride,
             double eps, bool swish, int threads) {
    const InstructionSet isa = chosen_isa();
    py::gil_scoped_release unlocked;
    norm_swish(inputs<T>(at, batch, pixels, channels, gate_stride, eps, swish), pointer<T>(out), statistics(at), isa, threads);
}

// gradients: addresses of the incoming one, and of those of y, gate (0: none), weight and bias.
template <class T>
void backward(const Addresses& at, const std::array<std::uintptr_t, 5>& gradients, int64_t batch, int64_t pixels,
              int64_t channels, int64_t gate_stride, double eps, bool swish, int threads) {
    const InstructionSet isa = chosen_isa();
    py::gil_scoped_release unlocked;
    const NormGradients<T> g = {pointer<const T>(gradients[0]), pointer<T>(gradients[1]), pointer<T>(gradients[2]),
                                pointer<T>(gradients[3]), pointer<T>(gradients[4])};
    norm_swish_backward(inputs<T>(at, batch, pixels, channels, gate_stride, eps, swish), statistics(at), g, isa, threads);
}

}  // namespace

void bind_norm_swish(py::module_& m) {
    m.def(
        "norm_swish_isa", [] { return name_of(vectors_of(chosen_isa())); },
        "The instruction set that norm_swish takes now: the fastest of this CPU, or the one that MOVAE_CPU_ISA names.");
    const char* doc = "Addresses of contiguous tensors, channels last; B, pixels, C, gate's stride, eps, swish, threads.";
    m.def("norm_swish_f32", &forward<float>, doc);
    m.def("norm_swish_f64", &forward<double>, doc);
    m.def("norm_swish_backward_f32", &backward<float>, doc);
    m.def("norm_swish_backward_f64", &backward<double>, doc);
}
