// Python's door to the weightings: on the host here, on CUDA in gramian_weights.cu.
#include "common/bind.h"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "weightings/gramian_weights.h"

#ifdef MOVAE_WITH_CUDA
#include "weightings/gramian_weights_cuda.h"
#endif

namespace py = pybind11;
using namespace movae;

namespace {

WeightingTask task_of(int method, int m, std::uintptr_t G, std::uintptr_t pref, std::uintptr_t order, double a, double b,
                      int64_t iterations, std::uintptr_t out) {
    return {static_cast<Method>(method),
            m,
            pointer<const double>(G),
            pointer<const double>(pref),
            pointer<const int64_t>(order),
            a,
            b,
            iterations,
            pointer<double>(out)};
}

// Each row of the orders has to name every row once.
void check_orders(const int64_t* order, int64_t m) {
    for (int64_t i = 0; order && i < m; ++i) {
        std::vector<char> met(m);
        for (int64_t k = 0; k < m; ++k) {
            const int64_t j = order[i * m + k];
            if (j < 0 || j >= m || met[j])
                throw std::invalid_argument("gramian_weights: order[" + std::to_string(i) + "] must be a permutation of 0.." +
                                            std::to_string(m - 1) + "; it has " + std::to_string(j) + " at " +
                                            std::to_string(k));
            met[j] = 1;
        }
    }
}

void run(int method, int m, std::uintptr_t G, std::uintptr_t pref, std::uintptr_t order, double a, double b, int64_t iterations,
         std::uintptr_t out) {
    py::gil_scoped_release unlocked;
    check_orders(pointer<const int64_t>(order), m);
    std::vector<double> scratch(weightings::scratch_size(m));
    weightings::weigh(OneThread(), task_of(method, m, G, pref, order, a, b, iterations, out), scratch.data());
}

}  // namespace

void bind_gramian_weights(py::module_& m) {
    m.def("gramian_weights", &run,
          "Method, m; addresses of the Gramian [m, m] float64, of the preference [m] or 0, of the orders [m, m] int64 or 0; "
          "two parameters, iterations; address of the weights [m] float64.");
#ifdef MOVAE_WITH_CUDA
    m.def("gramian_weights_scratch_cuda", [](int m) { return weightings::scratch_size(m); }, "Doubles of scratch for m.");
    m.def(
        "gramian_weights_cuda",
        [](int method, int m, std::uintptr_t G, std::uintptr_t pref, std::uintptr_t order, double a, double b,
           int64_t iterations, std::uintptr_t out, std::uintptr_t scratch, std::uintptr_t stream) {
            gramian_weights_cuda(task_of(method, m, G, pref, order, a, b, iterations, out), pointer<double>(scratch),
                                 pointer<void>(stream));
        },
        "As gramian_weights, with device addresses, scratch and a stream.");
#endif
}
