// Python's door to the codebook search.
#include <pybind11/stl.h>

#include "common/bind.h"
#include "nearest_code/nearest_code.h"

namespace py = pybind11;
using namespace movae;

void bind_nearest_code(py::module_& m) {
    py::class_<RowsView>(m, "RowsView",
                         "Rows of z where they lie: [batch, spatial] rows of depth numbers, strides in elements.")
        .def(py::init([](std::uintptr_t data, int dtype, int64_t batch, int64_t spatial, int64_t depth, int64_t batch_stride,
                         int64_t spatial_stride, int64_t depth_stride) {
            return RowsView{pointer<void>(data), static_cast<Dtype>(dtype), batch, spatial, depth, batch_stride, spatial_stride,
                            depth_stride};
        }));
    py::class_<Codebook>(m, "Codebook", "A contiguous [count, depth] codebook.")
        .def(py::init([](std::uintptr_t data, int dtype, int64_t count, int64_t depth) {
            return Codebook{pointer<const void>(data), static_cast<Dtype>(dtype), count, depth};
        }));
    m.def(
        "nearest_code",
        [](const RowsView& z, const Codebook& codebook, std::uintptr_t index, bool exact, int threads) {
            const InstructionSet isa = chosen_isa();
            py::gil_scoped_release unlocked;
            nearest_code(z, codebook, pointer<int64_t>(index), exact, isa, threads);
        },
        py::arg("z"), py::arg("codebook"), py::arg("index"), py::arg("exact"), py::arg("threads"),
        "Writes the index of every row's nearest code.");
    m.def(
        "nearest_code_isa", [] { return name_of(chosen_isa()); },
        "The instruction set that nearest_code takes now: the fastest of this CPU, or the one that MOVAE_CPU_ISA names.");
    m.def(
        "nearest_code_isas",
        [] {
            std::vector<std::string> names;
            for (const InstructionSet isa : available_isas()) names.emplace_back(name_of(isa));
            return names;
        },
        "Every instruction set that nearest_code can take on this CPU, fastest first.");
}
