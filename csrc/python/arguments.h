// Arguments whose type and range are checked with an error that names them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>

namespace pgk::python {

// More than a size_t holds is as much as it holds: too much in any case. Throws TypeError or
// ValueError.
std::size_t bytes_from(const char* name, const pybind11::object& value);
// A number, no bool. Throws TypeError.
double number_from(const char* name, const pybind11::object& value);

}  // namespace pgk::python
