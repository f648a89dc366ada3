// Arguments whose mistakes deserve a better text than pybind11's.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <cstddef>
#include <string>

namespace pgk::python {

inline std::string type_name(const pybind11::object& value) {
  return pybind11::type::of(value).attr("__name__").cast<std::string>();
}

// More than a size_t holds is as much as it holds: too much in any case.
inline std::size_t bytes_from(const char* name, const pybind11::object& value) {
  if (PyBool_Check(value.ptr()) || !PyLong_Check(value.ptr())) {
    throw pybind11::type_error(std::string(name) + " must be an int, got " + type_name(value));
  }
  if (value < pybind11::int_(0)) {
    throw pybind11::value_error(std::string(name) + " must be positive, got " +
                                pybind11::str(value).cast<std::string>());
  }
  const std::size_t bytes = PyLong_AsSize_t(value.ptr());
  if (PyErr_Occurred()) PyErr_Clear();
  return bytes;
}

// An int that no double holds is infinite.
inline double number_from(const char* name, const pybind11::object& value) {
  if (PyBool_Check(value.ptr()) || !(PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr()))) {
    throw pybind11::type_error(std::string(name) + " must be an int or a float, got " +
                               type_name(value));
  }
  const double number = PyFloat_AsDouble(value.ptr());
  if (!PyErr_Occurred()) return number;
  PyErr_Clear();
  return value < pybind11::int_(0) ? -HUGE_VAL : HUGE_VAL;
}

}  // namespace pgk::python
