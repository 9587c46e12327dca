// Every kernel of every table by itself, for tests and for measuring the machine.
#pragma once

#include <pybind11/pybind11.h>

namespace kt {

// Adds the submodule `single` with one function per row of KT_KERNELS.
void bind_single_kernels(pybind11::module_& m);

}  // namespace kt
