// Python's door to the Gramian of a Jacobian's rows and to their weighted sum.
#include "common/bind.h"
#ifdef __linux__
#include <sys/mman.h>
#endif
#include "gramian/gramian.h"

namespace py = pybind11;
using namespace movae;

namespace {

Rows view(std::uintptr_t rows, int dtype, int64_t m, int64_t columns, int64_t stride) {
    return {pointer<const void>(rows), static_cast<Dtype>(dtype), m, columns, stride};
}

void run_gramian(std::uintptr_t rows, int dtype, int64_t m, int64_t columns, int64_t stride, std::uintptr_t out, int threads) {
    const InstructionSet isa = chosen_isa();
    py::gil_scoped_release unlocked;
    gramian(view(rows, dtype, m, columns, stride), pointer<double>(out), isa, threads);
}

void run_combine(std::uintptr_t rows, int dtype, int64_t m, int64_t columns, int64_t stride, std::uintptr_t weights,
                 std::uintptr_t out, int threads) {
    const InstructionSet isa = chosen_isa();
    py::gil_scoped_release unlocked;
    combine(view(rows, dtype, m, columns, stride), pointer<const double>(weights), pointer<void>(out), isa, threads);
}

// A large result is written once, to memory that the process has just been given: with pages of 4 KiB the faults take
// several times as long as the sum itself. Advice only; without huge pages nothing changes.
void prefer_huge_pages(std::uintptr_t address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t kPage = std::uintptr_t(2) << 20;
    const std::uintptr_t first = (address + kPage - 1) / kPage * kPage, last = (address + bytes) / kPage * kPage;
    if (first < last) madvise(pointer<void>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

void bind_gramian(py::module_& m) {
    m.def("gramian", &run_gramian, "Address of rows, dtype, m, P, row stride; address of [m, m] float64; threads.");
}

void bind_combine(py::module_& m) {
    m.def("combine", &run_combine,
          "Address of rows, dtype, m, P, row stride; addresses of the weights [m] float64 and of [P]; threads.");
    m.def("prefer_huge_pages", &prefer_huge_pages, "Address and bytes of fresh memory that will be written whole.");
}
