// Python's door to quantize and its gradients.
#include "common/bind.h"
#include "quantize/quantize.h"

namespace py = pybind11;
using namespace movae;

void bind_quantize(py::module_& m) {
    m.def(
        "quantize",
        [](const RowsView& z, const Codebook& codebook, const RowsView& z_q, std::uintptr_t index, std::uintptr_t squared_error,
           std::uintptr_t count, std::uintptr_t code_sum, int threads) {
            const InstructionSet isa = chosen_isa();
            const Quantized out = {z_q, pointer<int64_t>(index), pointer<void>(squared_error), pointer<void>(count),
                                   pointer<void>(code_sum)};
            py::gil_scoped_release unlocked;
            quantize(z, codebook, out, isa, threads);
        },
        py::arg("z"), py::arg("codebook"), py::arg("z_q"), py::arg("index"), py::arg("squared_error"), py::arg("count"),
        py::arg("code_sum"), py::arg("threads"),
        "Nearest code, its copy, the squared error, and each code's row count and row sum.");
    m.def(
        "code_error",
        [](const RowsView& z, const Codebook& codebook, std::uintptr_t index, std::uintptr_t squared_error, int threads) {
            const InstructionSet isa = chosen_isa();
            py::gil_scoped_release unlocked;
            code_error(z, codebook, pointer<const int64_t>(index), pointer<void>(squared_error), isa, threads);
        },
        py::arg("z"), py::arg("codebook"), py::arg("index"), py::arg("squared_error"), py::arg("threads"),
        "Squared distance of every row to the code it is given.");
    m.def(
        "quantize_backward",
        [](const RowsView& z, const Codebook& codebook, std::uintptr_t index, const RowsView& grad_z_q,
           std::uintptr_t grad_error, int through, const RowsView& grad_z, std::uintptr_t grad_codebook, int threads) {
            const InstructionSet isa = chosen_isa();
            const QuantizeGradient gradient = {grad_z_q, pointer<const void>(grad_error), static_cast<Gradient>(through),
                                               grad_z, pointer<void>(grad_codebook)};
            py::gil_scoped_release unlocked;
            quantize_backward(z, codebook, pointer<const int64_t>(index), gradient, isa, threads);
        },
        py::arg("z"), py::arg("codebook"), py::arg("index"), py::arg("grad_z_q"), py::arg("grad_error"), py::arg("through"),
        py::arg("grad_z"), py::arg("grad_codebook"), py::arg("threads"),
        "Gradients of quantize; a null pointer stands for a gradient that is absent or not wanted.");
}
