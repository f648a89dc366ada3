#include "device/device.h"

#include <pybind11/stl.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "core/scope_exit.h"
#include "device/host_device.h"
#include "python/bindings.h"
#include "python/event_fd.h"

namespace py = pybind11;

namespace pgk::python {
namespace {

std::chrono::nanoseconds nanoseconds(double seconds) {
  return std::chrono::nanoseconds(static_cast<std::int64_t>(seconds * 1e9));
}

}  // namespace

void bind_device(py::module_& module) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;

  py::class_<Handle>(module, "Handle")
      .def_readonly("id", &Handle::id)
      .def_readonly("bytes", &Handle::bytes)
      .def_readonly("on_host", &Handle::on_host);

  py::class_<Fingerprint>(module, "Fingerprint")
      .def_readonly("low", &Fingerprint::low)
      .def_readonly("high", &Fingerprint::high);

  py::class_<Move>(module, "Move")
      .def(py::init([](Address address, Handle from, Handle to, std::optional<Fingerprint> known) {
             Move move;
             move.address = address;
             move.from = from;
             move.to = to;
             move.known = known;
             return move;
           }),
           py::arg("address"), py::arg("source"), py::arg("target"),
           py::arg("known") = std::nullopt)
      .def_readonly("known", &Move::known)
      .def_readonly("done", &Move::done)
      .def_readonly("copied", &Move::copied)
      .def_readonly("contents", &Move::contents);

  py::class_<Device, std::shared_ptr<Device>> device(module, "Device");
  py::enum_<Device::Call> call(device, "Call");
  for (std::size_t i = 0; i < Device::kCalls; ++i) {
    const auto value = static_cast<Device::Call>(i);
    call.value(Device::name_of(value), value);
  }

  device.def_property_readonly("name", [](const Device& self) { return self.properties().name; })
      .def_property_readonly("capacity",
                             [](const Device& self) { return self.properties().capacity; })
      .def_property_readonly("granularity",
                             [](const Device& self) { return self.properties().granularity; })
      .def_property_readonly("can_move",
                             [](const Device& self) { return self.properties().can_move; })
      .def_property_readonly("can_hold",
                             [](const Device& self) { return self.properties().can_hold; })
      .def_property_readonly("holds", [](const Device& self) { return self.properties().holds; })
      .def("create", &Device::create, py::arg("bytes"), Unlocked())
      .def("create_host", &Device::create_host, py::arg("bytes"), Unlocked())
      .def("release", &Device::release, py::arg("handle"), Unlocked())
      .def("reserve", &Device::reserve, py::arg("bytes"), py::arg("alignment"), Unlocked())
      .def("unreserve", &Device::unreserve, py::arg("address"), py::arg("bytes"), Unlocked())
      .def("map", &Device::map, py::arg("address"), py::arg("handle"), Unlocked())
      .def("unmap", &Device::unmap, py::arg("address"), py::arg("handle"), Unlocked())
      .def(
          "move",
          [](Device& self, const std::vector<Move*>& moves, double patience, bool gently) {
            std::vector<Move> all;
            for (const Move* move : moves) all.push_back(*move);
            // What was done is told also if the rest failed.
            ScopeExit tell([&] {
              for (std::size_t i = 0; i < all.size(); ++i) *moves[i] = all[i];
            });
            self.move(all, {.patience = nanoseconds(patience),
                            .are_others_at_work = [gently] { return gently; },
                            .own = {}});
          },
          py::arg("moves"), py::arg("patience") = 10.0, py::arg("gently") = false, Unlocked())
      .def("announce", &Device::announce, py::arg("stream"))
      .def(
          "drain", [](Device& self, double patience) { self.drain(nanoseconds(patience)); },
          py::arg("patience"), Unlocked())
      .def_property_readonly("processor_groups",
                             [](const Device& self) { return self.properties().processor_groups; })
      .def_property_readonly("why_undivided",
                             [](const Device& self) { return self.properties().why_undivided; })
      .def("create_stream", &Device::create_stream, py::arg("priority") = 0,
           py::arg("processors") = 0, Unlocked())
      .def("destroy_stream", &Device::destroy_stream, py::arg("stream"), Unlocked())
      .def("copy", &Device::copy, py::arg("destination"), py::arg("source"), py::arg("bytes"),
           py::arg("stream"), Unlocked())
      .def("record", &Device::record, py::arg("stream"), Unlocked())
      .def("wait", &Device::wait, py::arg("stream"), py::arg("event"), Unlocked())
      .def("synchronize_stream", &Device::synchronize_stream, py::arg("stream"), Unlocked())
      .def("synchronize_event", &Device::synchronize_event, py::arg("event"), Unlocked())
      .def("synchronize", &Device::synchronize, Unlocked())
      .def(
          "notify",
          [](Device& self, EventId event, const std::shared_ptr<EventFd>& alarm) {
            self.notify(event, [alarm] { alarm->ring(); });
          },
          py::arg("event"), py::arg("alarm").none(false), Unlocked())
      .def("is_done", &Device::is_done, py::arg("event"), Unlocked())
      .def("is_idle", &Device::is_idle, py::arg("stream"), Unlocked())
      .def("is_capturing", &Device::is_capturing, py::arg("stream"), Unlocked())
      .def("free_bytes", &Device::free_bytes, Unlocked())
      .def("inject_fault", &Device::inject_fault, py::arg("n"),
           py::arg_v("call", Device::Call::any, "Call.any"))
      .def("count", &Device::count, py::arg("call"));

  py::class_<HostDevice, Device, std::shared_ptr<HostDevice>>(module, "HostDevice")
      .def(py::init<std::size_t, std::vector<unsigned>>(), py::arg("capacity"),
           py::arg("processor_groups") = std::vector<unsigned>{})
      .def("processors", &HostDevice::processors, py::arg("stream"))
      .def("hold", &HostDevice::hold, py::arg("stream"))
      .def("let_go", &HostDevice::let_go, py::arg("stream"), Unlocked())
      .def("set_capturing", &HostDevice::set_capturing, py::arg("stream"), py::arg("capturing"))
      .def_property_readonly("refused_moves", &HostDevice::refused_moves)
      .def_property_readonly("committed_bytes", &HostDevice::committed_bytes)
      .def_property_readonly("backup_bytes", &HostDevice::backup_bytes)
      .def_property_readonly_static("GRANULARITY",
                                    [](const py::object&) { return HostDevice::kGranularity; });
}

}  // namespace pgk::python
