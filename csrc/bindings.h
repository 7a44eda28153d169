// What every source file of csrc/ binds into the module: one function a file.
#pragma once

#include <pybind11/pybind11.h>

void bind_combine(pybind11::module_& m);
void bind_gramian(pybind11::module_& m);
void bind_gramian_weights(pybind11::module_& m);
void bind_nearest_code(pybind11::module_& m);
void bind_project_weights(pybind11::module_& m);
void bind_quantize(pybind11::module_& m);
void bind_tc_terms(pybind11::module_& m);
