// The parts of the native module. Bindings only, but for event_loop: tasks exist in Python alone.
#pragma once

#include <pybind11/pybind11.h>

namespace pgk::python {

void bind_errors(pybind11::module_& module);
void bind_device(pybind11::module_& module);
// Only in builds for a CUDA torch.
void bind_cuda(pybind11::module_& module);
void bind_core(pybind11::module_& module);
void bind_manager(pybind11::module_& module);
void bind_memory_pool(pybind11::module_& module);
void bind_partition(pybind11::module_& module);
void bind_admission(pybind11::module_& module);
void bind_session_queue(pybind11::module_& module);
void bind_session(pybind11::module_& module);
void bind_event_loop(pybind11::module_& module);

}  // namespace pgk::python
