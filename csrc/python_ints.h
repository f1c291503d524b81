// Python integers in arguments of the module's functions.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace longlive {

// Anything with __index__ (int, numpy integers, integer tensors of one element). Unlike pybind11's own conversion, an
// error names the argument.
inline std::int64_t to_int64(pybind11::handle value, const std::string& name) {
  const auto number = pybind11::reinterpret_steal<pybind11::object>(PyNumber_Index(value.ptr()));
  if (!number) {
    PyErr_Clear();
    throw pybind11::type_error(name + " must be an integer, got " + std::string(pybind11::repr(value)) + " (" +
                               std::string(pybind11::str(pybind11::type::handle_of(value).attr("__name__"))) + ")");
  }
  int overflow = 0;
  const long long result = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (overflow != 0) {
    throw std::invalid_argument(name + " must fit into 64 bits, got " + std::string(pybind11::repr(number)));
  }
  return result;
}

// From `least` to `most`, both allowed.
inline std::int64_t to_int64(pybind11::handle value, const std::string& name, std::int64_t least, std::int64_t most) {
  const std::int64_t result = to_int64(value, name);
  if (result < least || result > most) {
    throw std::invalid_argument(name + " must be in " + std::to_string(least) + " .. " + std::to_string(most) +
                                ", got " + std::to_string(result));
  }
  return result;
}

// An address or a handle of the driver: 64 bits without a sign.
inline std::uintptr_t to_address(pybind11::handle value, const std::string& name) {
  const auto number = pybind11::reinterpret_steal<pybind11::object>(PyNumber_Index(value.ptr()));
  if (!number) {
    PyErr_Clear();
    throw pybind11::type_error(name + " must be an integer, got " + std::string(pybind11::repr(value)));
  }
  const unsigned long long result = PyLong_AsUnsignedLongLong(number.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw std::invalid_argument(name + " must be in 0 .. 2^64 - 1, got " + std::string(pybind11::repr(number)));
  }
  return static_cast<std::uintptr_t>(result);
}

}  // namespace longlive
