// Python's door to the projection, and on CUDA to the Gramian and the projection in one launch.
#include "common/bind.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "projection/project_weights.h"

#ifdef MOVAE_WITH_CUDA
#include "projection/upgrad.h"
#endif

namespace py = pybind11;
using namespace movae;

namespace {

void run_project(std::uintptr_t gramian, int m, std::uintptr_t given, int rows, int mode, bool by_diagonal, double norm_eps,
                 double reg_eps, std::uintptr_t out, std::uintptr_t status, int threads) {
    const InstructionSet isa = chosen_isa();
    py::gil_scoped_release unlocked;
    std::vector<double> mean;
    if (given == 0) mean.assign(m, 1.0 / m);
    *pointer<int32_t>(status) =
        project({pointer<const double>(gramian), m, by_diagonal, norm_eps, reg_eps, static_cast<ProjectionMode>(mode),
                 given ? pointer<const double>(given) : mean.data(), rows, pointer<double>(out)},
                isa, threads);
}

#ifdef MOVAE_WITH_CUDA
void check_scratch(int64_t given, int64_t needed) {
    if (given < needed)
        throw std::invalid_argument("scratch of " + std::to_string(given) + " doubles, " + std::to_string(needed) +
                                    " are needed");
}
#endif

}  // namespace

void bind_project_weights(py::module_& m) {
    m.def("project_weights", &run_project,
          "Address of the Gramian [m, m] float64, m; address of u or b [rows, m], rows, mode (0 rows, 1 sum, 2 multipliers), "
          "or, for a "
          "sum, of the preference [m]; 0 is 1/m each; whether the regulariser is relative to the diagonal, norm_eps, reg_eps; "
          "addresses of the result and of the int32 status; threads.");
#ifdef MOVAE_WITH_CUDA
    m.def("project_scratch_cuda", &project_scratch, "Doubles of scratch for m, rows (m for a sum).");
    m.def(
        "project_weights_cuda",
        [](std::uintptr_t gramian, int m, std::uintptr_t given, int rows, int mode, bool by_diagonal, double norm_eps,
           double reg_eps, std::uintptr_t out, std::uintptr_t status, std::uintptr_t scratch, int64_t scratch_doubles,
           std::uintptr_t stream) {
            const auto kind = static_cast<ProjectionMode>(mode);
            check_scratch(scratch_doubles, project_scratch(m, kind == ProjectionMode::sum ? m : rows));
            project_weights_cuda({pointer<const double>(gramian), m, by_diagonal, norm_eps, reg_eps, kind,
                                  pointer<const double>(given), rows, pointer<double>(out)},
                                 pointer<int32_t>(status), pointer<double>(scratch), pointer<void>(stream));
        },
        "As project_weights, with device addresses, scratch, its size in doubles, and a stream.");
    m.def("upgrad_scratch_cuda", &upgrad_scratch, "Doubles of scratch for m.");
    m.def(
        "upgrad_weights_cuda",
        [](std::uintptr_t rows, int dtype, int m, int64_t columns, int64_t stride, std::uintptr_t pref, bool sum,
           bool by_diagonal, double norm_eps, double reg_eps, std::uintptr_t weights, std::uintptr_t gramian,
           std::uintptr_t status, std::uintptr_t scratch, int64_t scratch_doubles, std::uintptr_t stream) {
            check_scratch(scratch_doubles, upgrad_scratch(m));
            const auto kind = sum ? ProjectionMode::sum : ProjectionMode::rows;
            upgrad_weights_cuda(pointer<const void>(rows), dtype, columns, stride,
                                {pointer<const double>(gramian), m, by_diagonal, norm_eps, reg_eps, kind,
                                 pointer<const double>(pref), 1, pointer<double>(weights)},
                                pointer<double>(gramian), pointer<int32_t>(status), pointer<double>(scratch),
                                pointer<void>(stream));
        },
        "Device addresses of rows [m, P], of the preference [m] and of the results, scratch, its size in doubles, and a "
        "stream.");
#endif
}
