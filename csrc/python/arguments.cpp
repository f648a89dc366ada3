#include "python/arguments.h"

#include <string>

namespace py = pybind11;

namespace pgk::python {
namespace {

[[noreturn]] void refuse_type(const char* name, const char* wanted, const py::object& value) {
  const auto kind = py::type::of(value).attr("__name__").cast<std::string>();
  throw py::type_error(std::string(name) + " must be " + wanted + ", got " + kind);
}

}  // namespace

std::size_t bytes_from(const char* name, const py::object& value) {
  if (PyBool_Check(value.ptr()) || !PyLong_Check(value.ptr())) refuse_type(name, "an int", value);
  if (value < py::int_(0)) {
    throw py::value_error(std::string(name) + " must be positive, got " +
                          py::str(value).cast<std::string>());
  }
  const std::size_t bytes = PyLong_AsSize_t(value.ptr());
  if (PyErr_Occurred()) PyErr_Clear();
  return bytes;
}

double number_from(const char* name, const py::object& value) {
  if (PyBool_Check(value.ptr()) || !(PyLong_Check(value.ptr()) || PyFloat_Check(value.ptr()))) {
    refuse_type(name, "a number", value);
  }
  const double number = PyFloat_AsDouble(value.ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return number;
}

}  // namespace pgk::python
