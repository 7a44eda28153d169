// What the bind.cpp of every op share, and what they define for module.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

// What lies at an address that Python hands over.
template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void bind_combine(pybind11::module_& m);
void bind_gramian(pybind11::module_& m);
void bind_gramian_weights(pybind11::module_& m);
void bind_nearest_code(pybind11::module_& m);
void bind_norm_swish(pybind11::module_& m);
void bind_project_weights(pybind11::module_& m);
void bind_quantize(pybind11::module_& m);
void bind_tc_terms(pybind11::module_& m);
