// What every source file of csrc/ binds into the module: one function a file.
#pragma once

#include <pybind11/pybind11.h>
