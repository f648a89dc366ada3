#include "python/bindings.h"

PYBIND11_MODULE(native, module) {
  module.doc() = "The C++ side of pygpukit_torch.";
  pgk::python::bind_errors(module);
  pgk::python::bind_event_loop(module);
  pgk::python::bind_device(module);
#ifdef PGK_WITH_CUDA
  pgk::python::bind_cuda(module);
#endif
  pgk::python::bind_core(module);
  pgk::python::bind_memory_pool(module);
  pgk::python::bind_admission(module);
  pgk::python::bind_session_queue(module);
  pgk::python::bind_session(module);
  pgk::python::bind_manager(module);
  pgk::python::bind_partition(module);
}
