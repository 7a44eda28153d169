// Python's door to the total-correlation terms.
#include "common/bind.h"
#include "tc_terms/tc_terms.h"

namespace py = pybind11;
using namespace movae;

namespace {

template <class T>
TcInputs<T> inputs(std::uintptr_t z, std::uintptr_t mu, std::uintptr_t logvar, int64_t batch, int64_t dims, int64_t n_data,
                   bool stratified) {
    return {pointer<const T>(z), pointer<const T>(mu), pointer<const T>(logvar), batch, dims, n_data, stratified};
}

template <class T>
void forward(std::uintptr_t z, std::uintptr_t mu, std::uintptr_t logvar, std::uintptr_t log_q_z, std::uintptr_t log_prod_q_z,
             std::uintptr_t top, std::uintptr_t total, int64_t batch, int64_t dims, int64_t n_data, bool stratified,
             int threads) {
    const InstructionSet isa = chosen_isa();
    py::gil_scoped_release unlocked;
    tc_terms(inputs<T>(z, mu, logvar, batch, dims, n_data, stratified), pointer<T>(log_q_z), pointer<T>(log_prod_q_z),
             {pointer<T>(top), pointer<T>(total)}, isa, threads);
}

template <class T>
void backward(std::uintptr_t grad_q, std::uintptr_t grad_prod, std::uintptr_t z, std::uintptr_t mu, std::uintptr_t logvar,
              std::uintptr_t top, std::uintptr_t total, std::uintptr_t grad_z, std::uintptr_t grad_mu,
              std::uintptr_t grad_logvar, int64_t batch, int64_t dims, int64_t n_data, bool stratified, int threads) {
    const InstructionSet isa = chosen_isa();
    py::gil_scoped_release unlocked;
    const TcGradients<T> gradients = {pointer<const T>(grad_q), pointer<const T>(grad_prod), pointer<T>(grad_z),
                                      pointer<T>(grad_mu), pointer<T>(grad_logvar)};
    tc_terms_backward(inputs<T>(z, mu, logvar, batch, dims, n_data, stratified), {pointer<T>(top), pointer<T>(total)},
                      gradients, isa, threads);
}

}  // namespace

void bind_tc_terms(py::module_& m) {
    const char* doc = "Addresses of contiguous tensors, B, D, data-set size, stratified or not, threads.";
    m.def(
        "tc_terms_isa", [] { return name_of(vectors_of(chosen_isa())); },
        "The instruction set that tc_terms takes now: the fastest of this CPU, or the one that MOVAE_CPU_ISA names.");
    m.def("tc_terms_f32", &forward<float>, doc);
    m.def("tc_terms_f64", &forward<double>, doc);
    m.def("tc_terms_backward_f32", &backward<float>, doc);
    m.def("tc_terms_backward_f64", &backward<double>, doc);
}
