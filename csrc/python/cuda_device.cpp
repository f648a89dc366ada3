#include "device/cuda_device.h"

#include <memory>

#include "python/bindings.h"

namespace py = pybind11;

namespace pgk::python {

void bind_cuda_device(py::module_& module) {
  py::class_<CudaDevice, Device, std::shared_ptr<CudaDevice>>(module, "CudaDevice")
      .def(py::init<int, std::size_t>(), py::arg("ordinal") = 0, py::arg("capacity") = 0,
           py::call_guard<py::gil_scoped_release>())
      .def("native_stream", &CudaDevice::native_stream, py::arg("stream"));
}

}  // namespace pgk::python
