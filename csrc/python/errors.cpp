#include <pybind11/stl.h>

#include "core/error.h"
#include "core/refusal.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace pgk::python {
namespace {

py::object python_class(ErrorCode code) {
  const auto ours = [](const char* name) {
    return py::module_::import("pygpukit_torch.errors").attr(name);
  };
  switch (code) {
    case ErrorCode::invalid_value:
      return py::module_::import("builtins").attr("ValueError");
    case ErrorCode::admission:
      return ours("AdmissionError");
    case ErrorCode::context_destroyed:
      return ours("ContextDestroyedError");
    case ErrorCode::busy:
      return ours("ContextBusyError");
    case ErrorCode::out_of_memory:
      return py::module_::import("torch").attr("OutOfMemoryError");
    case ErrorCode::over_quota:
      return py::module_::import("builtins").attr("MemoryError");
    case ErrorCode::device:
      return ours("DeviceError");
    case ErrorCode::forked:
      return ours("ForkError");
    case ErrorCode::session:
      return ours("SessionError");
    case ErrorCode::session_timeout:
      return ours("SessionTimeoutError");
    case ErrorCode::internal:
      break;
  }
  return ours("InvariantError");
}

}  // namespace

void bind_errors(py::module_& module) {
  py::class_<Refusal> refusal(module, "Refusal");
  py::class_<Refusal::Holder>(refusal, "Holder")
      .def_readonly("name", &Refusal::Holder::name)
      .def_readonly("tier", &Refusal::Holder::tier)
      .def_readonly("used", &Refusal::Holder::used)
      .def_readonly("resident", &Refusal::Holder::resident)
      .def_readonly("evicted", &Refusal::Holder::evicted)
      .def_readonly("base", &Refusal::Holder::base)
      .def_readonly("in_use", &Refusal::Holder::in_use)
      .def_readonly("pinned", &Refusal::Holder::pinned)
      .def_readonly("orphan", &Refusal::Holder::orphan);
  refusal.def_readonly("context", &Refusal::context)
      .def_readonly("tier", &Refusal::tier)
      .def_readonly("requested", &Refusal::requested)
      .def_readonly("used", &Refusal::used)
      .def_readonly("budget", &Refusal::budget)
      .def_readonly("available", &Refusal::available)
      .def_readonly("reason", &Refusal::reason)
      .def_readonly("holders", &Refusal::holders)
      .def_readonly("others", &Refusal::others);
  module.def("find_refusal", &Refusals::find, py::arg("text"));
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      py::set_error(python_class(error.code()), error.what());
    }
  });
}

}  // namespace pgk::python
