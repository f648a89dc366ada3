#include "core/error.h"
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

void bind_errors(py::module_&) {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      py::set_error(python_class(error.code()), error.what());
    }
  });
}

}  // namespace pgk::python
