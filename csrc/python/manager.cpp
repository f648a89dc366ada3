#include "core/manager.h"

#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/thread_streams.h"
#include "python/bindings.h"
#include "torch/cpu_allocator.h"
#include "torch/fork_guard.h"
#include "torch/host_streams.h"
#include "torch/operator_gate.h"

namespace py = pybind11;

namespace pgk::python {
namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

// Freed with the GIL, wherever the last one goes who has it.
std::shared_ptr<py::object> kept_with_gil(py::object object) {
  return {new py::object(std::move(object)), [](py::object* kept) {
            const py::gil_scoped_acquire locked;
            delete kept;
          }};
}

void bind_records(py::module_& module) {
  py::class_<Context::Counters>(module, "Counters")
      .def_readonly("allocations", &Context::Counters::allocations)
      .def_readonly("frees", &Context::Counters::frees)
      .def_readonly("growths", &Context::Counters::growths)
      .def_readonly("refusals", &Context::Counters::refusals)
      .def_readonly("pages_mapped", &Context::Counters::pages_mapped)
      .def_readonly("pages_unmapped", &Context::Counters::pages_unmapped)
      .def_readonly("allocated_bytes", &Context::Counters::allocated_bytes)
      .def_readonly("small_allocations", &Context::Counters::small_allocations)
      .def_readonly("small_frees", &Context::Counters::small_frees)
      .def_readonly("small_allocated_bytes", &Context::Counters::small_allocated_bytes)
      .def_readonly("small_freed_bytes", &Context::Counters::small_freed_bytes)
      .def_readonly("evictions", &Context::Counters::evictions)
      .def_readonly("restores", &Context::Counters::restores)
      .def_readonly("bytes_out", &Context::Counters::bytes_out)
      .def_readonly("bytes_in", &Context::Counters::bytes_in)
      .def_readonly("pages_unchanged", &Context::Counters::pages_unchanged)
      .def_readonly("move_nanoseconds", &Context::Counters::move_nanoseconds);

  py::class_<Usage>(module, "Usage")
      .def_readonly("id", &Usage::id)
      .def_readonly("name", &Usage::name)
      .def_readonly("partition", &Usage::partition)
      .def_readonly("tier", &Usage::tier)
      .def_readonly("orphan", &Usage::orphan)
      .def_readonly("used", &Usage::used)
      .def_readonly("resident", &Usage::resident)
      .def_readonly("max", &Usage::max)
      .def_readonly("base", &Usage::base)
      .def_readonly("peak", &Usage::peak)
      .def_readonly("small_peak", &Usage::small_peak)
      .def_readonly("large_peak", &Usage::large_peak)
      .def_readonly("peak_resident", &Usage::peak_resident)
      .def_readonly("fenced", &Usage::fenced)
      .def_readonly("evicted", &Usage::evicted)
      .def_readonly("available", &Usage::available)
      .def_readonly("live_blocks", &Usage::live_blocks)
      .def_readonly("sessions", &Usage::sessions)
      .def_readonly("waiting", &Usage::waiting)
      .def_readonly("counters", &Usage::counters);

  py::class_<DeviceUsage>(module, "DeviceUsage")
      .def_readonly("capacity", &DeviceUsage::capacity)
      .def_readonly("resident", &DeviceUsage::resident)
      .def_readonly("pooled", &DeviceUsage::pooled)
      .def_readonly("available", &DeviceUsage::available)
      .def_readonly("host_limit", &DeviceUsage::host_limit)
      .def_readonly("host_existing", &DeviceUsage::host_existing)
      .def_readonly("host_taken", &DeviceUsage::host_taken)
      .def_readonly("contexts", &DeviceUsage::contexts);

  py::class_<Totals>(module, "Totals")
      .def_readonly("counters", &Totals::counters)
      .def_readonly("used", &Totals::used)
      .def_readonly("peak", &Totals::peak)
      .def_readonly("fenced", &Totals::fenced)
      .def_readonly("live_blocks", &Totals::live_blocks)
      .def_readonly("pages", &Totals::pages)
      .def_readonly("existing", &Totals::existing)
      .def_readonly("existing_peak", &Totals::existing_peak)
      .def_readonly("created", &Totals::created);
}

void bind_context(py::module_& module) {
  py::class_<Context, std::shared_ptr<Context>>(module, "Context")
      .def(
          "allocate",
          [](Context& self, std::size_t bytes, std::optional<StreamId> stream) {
            return reinterpret_cast<std::uintptr_t>(
                self.allocate(bytes, stream.value_or(self.stream())));
          },
          py::arg("bytes"), py::arg("stream") = std::nullopt, Unlocked())
      .def(
          "try_allocate",
          [](Context& self, std::size_t bytes, std::optional<StreamId> stream, bool may_wait) {
            return reinterpret_cast<std::uintptr_t>(self.try_allocate(
                bytes, stream.value_or(self.stream()), may_wait ? Effort::evict : Effort::ready));
          },
          py::arg("bytes"), py::arg("stream") = std::nullopt, py::arg("may_wait") = true,
          Unlocked())
      .def(
          "free",
          [](Context& self, std::uintptr_t address) {
            self.free(reinterpret_cast<void*>(address));
          },
          py::arg("address"), Unlocked())
      .def(
          "free_after",
          [](Context& self, std::uintptr_t address, const std::vector<StreamId>& streams) {
            self.free_after(reinterpret_cast<void*>(address), streams);
          },
          py::arg("address"), py::arg("streams"), Unlocked())
      .def(
          "free_after_event",
          [](Context& self, std::uintptr_t address, EventId event) {
            self.free_after(reinterpret_cast<void*>(address), event);
          },
          py::arg("address"), py::arg("event"), Unlocked())
      .def(
          "record_use",
          [](Context& self, std::uintptr_t address, StreamId stream) {
            self.record_use(reinterpret_cast<void*>(address), stream);
          },
          py::arg("address"), py::arg("stream"), Unlocked())
      .def(
          "block_bytes",
          [](const Context& self, std::uintptr_t address) {
            return self.block_bytes(reinterpret_cast<const void*>(address));
          },
          py::arg("address"))
      .def(
          "capture_stream", [](Context& self) { return self.manager()->capture_stream(self); },
          Unlocked())
      .def("set_partition_gate", &Context::set_partition_gate, py::arg("gate"))
      .def_property_readonly("id", &Context::id)
      .def_property_readonly("name", &Context::name)
      .def_property_readonly("tier", &Context::tier)
      .def_property_readonly("yields", &Context::yields)
      .def_property_readonly("stream", &Context::stream)
      .def_property_readonly("streams", &Context::streams)
      .def_property_readonly("page_bytes", &Context::page_bytes)
      .def_property_readonly("used_bytes", &Context::used_bytes)
      .def_property_readonly("is_destroyed", &Context::is_destroyed)
      .def_property_readonly("sessions", &Context::sessions)
      .def_property_readonly("waiting", &Context::waiting)
      .def_property_readonly("is_ready", &Context::is_ready)
      .def_property_readonly("is_moving", &Context::is_moving)
      .def_property_readonly("manager", &Context::manager)
      .def_property_readonly("counters", &Context::counters);
}

}  // namespace

void bind_manager(py::module_& module) {
  bind_records(module);
  bind_context(module);

  py::class_<Manager, std::shared_ptr<Manager>>(module, "Manager")
      .def(py::init([](std::shared_ptr<Device> device, ThreadStreams* thread_streams,
                       std::size_t host_backup, double claim_timeout) {
             return Manager::make(
                 std::move(device), thread_streams, host_backup,
                 std::chrono::nanoseconds(static_cast<std::int64_t>(claim_timeout * 1e9)));
           }),
           py::arg("device").none(false), py::arg("thread_streams") = nullptr,
           py::arg("host_backup") = 0, py::arg("claim_timeout") = 10.0)
      .def(
          "create_context",
          [](const py::object& self, std::string name, std::size_t max, std::size_t base, Tier tier,
             std::string partition, bool yields, std::size_t max_sessions) {
            auto& manager = self.cast<Manager&>();
            std::shared_ptr<Context> context;
            {
              const py::gil_scoped_release unlocked;
              context = manager.create_context(
                  {std::move(name), max, base, tier, std::move(partition), yields, max_sessions});
            }
            // Not py::keep_alive: it crashes when an argument does not convert.
            py::object result = py::cast(context);
            py::detail::keep_alive_impl(result, self);
            return result;
          },
          py::arg("name"), py::arg("max"), py::arg("base") = 0,
          py::arg_v("tier", Tier::burstable, "Tier.burstable"), py::arg("partition") = "",
          py::arg("yields") = false, py::arg("max_sessions") = 0)
      .def("destroy_context", &Manager::destroy_context, py::arg("context").none(false), Unlocked())
      .def("resize_context", &Manager::resize_context, py::arg("context"), py::arg("max"),
           py::arg("base"), Unlocked())
      .def("evict_context", &Manager::evict_context, py::arg("context").none(false), Unlocked())
      .def("restore_context", &Manager::restore_context, py::arg("context").none(false), Unlocked())
      .def("pin", &Manager::pin, py::arg("context").none(false), Unlocked())
      .def("unpin", &Manager::unpin, py::arg("context").none(false), Unlocked())
      .def("join", &Manager::join, py::arg("context").none(false), Unlocked())
      .def_property_readonly(
          "device_holds", [](const Manager& self) { return self.device()->properties().can_hold; })
      .def("declare_consumer", &Manager::declare_consumer, py::arg("producer").none(false),
           py::arg("consumer").none(false), Unlocked())
      .def(
          "set_pressure_handler",
          [](Manager& self, py::object handler) {
            if (handler.is_none()) {
              const py::gil_scoped_release unlocked;
              self.set_pressure_handler(nullptr);
              return;
            }
            const auto kept = kept_with_gil(std::move(handler));
            const auto ask = [kept](const std::shared_ptr<Context>& context, std::size_t requested,
                                    std::size_t available) {
              const py::gil_scoped_acquire locked;
              return (*kept)(context, requested, available).cast<bool>();
            };
            const py::gil_scoped_release unlocked;
            self.set_pressure_handler(ask);
          },
          py::arg("handler"))
      .def(
          "set_reliefs",
          [](Manager& self, const std::vector<py::object>& reliefs) {
            std::vector<Reliefs::Relief> asked;
            for (const py::object& relief : reliefs) {
              asked.emplace_back([kept = kept_with_gil(relief)](bool device_is_short) {
                const py::gil_scoped_acquire locked;
                return (*kept)(device_is_short).cast<bool>();
              });
            }
            const py::gil_scoped_release unlocked;
            self.set_reliefs(std::move(asked));
          },
          py::arg("reliefs"))
      .def_property_readonly("is_divided_up", py::cpp_function(&Manager::is_divided_up, Unlocked()))
      .def("give_way", &Manager::give_way, py::arg("bytes"), Unlocked())
      .def("usage", &Manager::usage, py::arg("context"), Unlocked())
      .def("device_usage", &Manager::device_usage, Unlocked())
      .def("available", &Manager::available, Unlocked())
      .def("totals", &Manager::totals, Unlocked())
      .def("reset_peaks", py::overload_cast<>(&Manager::reset_peaks), Unlocked())
      .def("reset_peaks", py::overload_cast<Context&>(&Manager::reset_peaks), py::arg("context"),
           Unlocked())
      .def("trim", &Manager::trim, Unlocked())
      .def("stop_making_ahead", &Manager::stop_making_ahead, Unlocked())
      .def("shut_down", &Manager::shut_down, Unlocked())
      .def("check_invariants", &Manager::check_invariants, Unlocked())
      .def_property_readonly("device", &Manager::device);

  module.def("pass_gate", &pass_gate, Unlocked());
  module.def("host_streams", &host_streams, py::return_value_policy::reference);
  module.def("current_host_stream", &current_host_stream);
  module.def("install_cpu_allocator", &install_cpu_allocator);
  module.def("uninstall_cpu_allocator", &uninstall_cpu_allocator);
  module.def("guard_forks", &guard_forks, py::arg("manager").none(false));
  module.def("format_bytes", &format_bytes, py::arg("bytes"));
}

}  // namespace pgk::python
