#include <pybind11/stl.h>

#include <memory>

#include "device/cuda_device.h"
#include "python/bindings.h"
#include "torch/cuda_allocator.h"
#include "torch/cuda_streams.h"

namespace py = pybind11;

namespace pgk::python {

void bind_cuda(py::module_& module) {
  py::class_<CudaDevice, Device, std::shared_ptr<CudaDevice>>(module, "CudaDevice")
      .def(py::init<int, std::size_t>(), py::arg("ordinal") = 0, py::arg("capacity") = 0,
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("ordinal", &CudaDevice::ordinal)
      .def_property_readonly_static("DEFAULT_STREAM",
                                    [](const py::object&) { return CudaDevice::kDefaultStream; });

  module.def("cuda_streams", &cuda_streams, py::arg("device").none(false),
             py::return_value_policy::reference);
  module.def("cuda_allocator", &cuda_allocator);
  module.def("cuda_is_initialized",
             [] { return c10::cuda::CUDACachingAllocator::get()->initialized(); });
  module.def("install_cuda_allocator", &install_cuda_allocator);
  module.def("uninstall_cuda_allocator", &uninstall_cuda_allocator);
  module.def("serve_contexts_of", &serve_contexts_of, py::arg("manager").none(false));
  module.def("has_cuda_pools", &has_cuda_pools);
}

}  // namespace pgk::python
