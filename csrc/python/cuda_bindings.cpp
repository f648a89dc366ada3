#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <utility>

#include "device/cuda_device.h"
#include "python/bindings.h"
#include "torch/cuda_allocator.h"
#include "torch/cuda_streams.h"

namespace py = pybind11;

namespace pgk::python {

namespace {

// What torch announced as a capture, with the graph that is to have it.
class Capture {
 public:
  explicit Capture(CudaPools::Announced announced) : announced_(std::move(announced)) {}
  // Only one that its graph has left behind: one that was ended is the graph's to release.
  ~Capture() {
    if (announced_ && is_begun_capture(*announced_)) abandon();
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;

  static std::unique_ptr<Capture> take_announced() {
    auto announced = take_announced_capture();
    return announced ? std::make_unique<Capture>(std::move(*announced)) : nullptr;
  }
  bool goes_on() const { return announced_ && announced_->on->is_capturing(announced_->stream); }
  void finish() { announced_.reset(); }
  void abandon() {
    if (announced_) abandon_capture(*std::exchange(announced_, std::nullopt));
  }

 private:
  std::optional<CudaPools::Announced> announced_;
};

}  // namespace

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
  module.def("drop_workspaces_of", py::overload_cast<const Context&>(&pgk::drop_workspaces_of),
             py::arg("context"), py::call_guard<py::gil_scoped_release>());
  module.def("workspace_bytes_of", &workspace_bytes_of, py::arg("id"),
             py::call_guard<py::gil_scoped_release>());

  module.def("empty_outside", &empty_outside, py::arg("bytes"),
             py::call_guard<py::gil_scoped_release>());

  // Abandoned unless it is finished.
  py::class_<Capture>(module, "Capture")
      .def_static("take_announced", &Capture::take_announced)
      .def_property_readonly("goes_on", &Capture::goes_on)
      .def("finish", &Capture::finish)
      .def("abandon", &Capture::abandon);
}

}  // namespace pgk::python
