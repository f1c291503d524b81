#pragma once

#include <pybind11/pybind11.h>

namespace longlive {

// Adds Bank, its exceptions and crc32c to the module.
void bind_bank(pybind11::module_& m);

}  // namespace longlive
