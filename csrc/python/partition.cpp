#include "core/partition.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/manager.h"
#include "python/arguments.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace pgk::python {
namespace {

// What is known of a partition at one time.
struct PartitionInfo {
  std::string id;
  std::string name;
  PartitionLimits limits;
  PartitionUsage usage;
};

struct PartitionStats {
  std::size_t partition_count = 0;
  std::size_t total_memory_allocated = 0;
  double total_compute_allocated = 0;
  double total_bandwidth_allocated = 0;
  std::size_t available_memory = 0;
  double available_compute = 0;
  double available_bandwidth = 0;
};

double share_from(const char* name, const py::object& value) {
  const double share = number_from(name, value);
  if (!(share > 0 && share <= 1)) {
    throw py::value_error(std::string(name) + " must be a share above 0 and at most 1, got " +
                          py::str(value).cast<std::string>());
  }
  return share;
}

PartitionInfo info_of(const PartitionManager& manager, const std::string& id) {
  const std::shared_ptr<Partition> partition = manager.get(id);
  return {partition->id, partition->name, partition->limits,
          manager.manager()->partition_usage(*partition)};
}

std::vector<std::string> ids_of(const PartitionManager& manager) {
  std::vector<std::string> ids;
  for (const auto& partition : manager.partitions()) ids.push_back(partition->id);
  return ids;
}

PartitionStats stats_of(const PartitionManager& manager) {
  PartitionStats stats;
  for (const auto& partition : manager.partitions()) {
    ++stats.partition_count;
    stats.total_memory_allocated += partition->limits.memory.value_or(0);
    stats.total_compute_allocated += partition->limits.compute.value_or(0);
    stats.total_bandwidth_allocated += partition->limits.bandwidth.value_or(0);
  }
  stats.available_memory = manager.config().limit() - stats.total_memory_allocated;
  stats.available_compute = manager.manager()->available_compute();
  stats.available_bandwidth = std::max(1 - stats.total_bandwidth_allocated, 0.0);
  return stats;
}

// The public context or the native one.
std::shared_ptr<Context> context_from(const py::object& context) {
  const py::object native =
      py::hasattr(context, "_native") ? context.attr("_native").cast<py::object>() : context;
  if (!py::isinstance<Context>(native)) {
    const auto kind = py::type::of(context).attr("__name__").cast<std::string>();
    throw py::type_error("expected a context from create_context, got " + kind);
  }
  return native.cast<std::shared_ptr<Context>>();
}

void warn(const std::string& text) {
  if (PyErr_WarnEx(PyExc_UserWarning, text.c_str(), 1) != 0) throw py::error_already_set();
}

void bind_records(py::module_& module) {
  py::class_<PartitionLimits>(module, "PartitionLimits")
      .def(py::init<>())
      .def(
          "memory",
          [](PartitionLimits self, const py::object& bytes) {
            self.memory = bytes_from("memory", bytes);
            return self;
          },
          py::arg("bytes"))
      .def(
          "compute",
          [](PartitionLimits self, const py::object& share) {
            self.compute = share_from("compute", share);
            return self;
          },
          py::arg("share"))
      .def(
          "bandwidth",
          [](PartitionLimits self, const py::object& share) {
            self.bandwidth = share_from("bandwidth", share);
            return self;
          },
          py::arg("share"))
      .def(
          "streams",
          [](PartitionLimits self, const py::object& n) {
            const std::size_t count = bytes_from("streams", n);
            if (count == 0 || count > std::numeric_limits<std::uint32_t>::max()) {
              throw py::value_error("streams must be from 1 to 4294967295, got " +
                                    py::str(n).cast<std::string>());
            }
            self.streams = static_cast<std::uint32_t>(count);
            return self;
          },
          py::arg("n"))
      .def_readonly("memory_limit", &PartitionLimits::memory)
      .def_readonly("compute_limit", &PartitionLimits::compute)
      .def_readonly("bandwidth_limit", &PartitionLimits::bandwidth)
      .def_readonly("stream_limit", &PartitionLimits::streams);

  py::class_<PartitionUsage>(module, "PartitionUsage")
      .def_readonly("used", &PartitionUsage::used)
      .def_readonly("reserved", &PartitionUsage::resident)
      .def_readonly("evicted", &PartitionUsage::evicted)
      .def_readonly("base", &PartitionUsage::base)
      .def_readonly("sessions", &PartitionUsage::sessions)
      .def_readonly("waiting", &PartitionUsage::waiting);

  py::class_<PartitionInfo>(module, "PartitionInfo")
      .def_readonly("id", &PartitionInfo::id)
      .def_readonly("name", &PartitionInfo::name)
      .def_readonly("limits", &PartitionInfo::limits)
      .def_readonly("usage", &PartitionInfo::usage)
      .def_property_readonly("memory_limit",
                             [](const PartitionInfo& self) { return self.limits.memory; })
      .def_property_readonly("compute_limit",
                             [](const PartitionInfo& self) { return self.limits.compute; })
      .def_property_readonly("sm_count",
                             [](const PartitionInfo& self) { return self.usage.processors; })
      .def_property_readonly("contexts",
                             [](const PartitionInfo& self) { return self.usage.contexts; });

  py::class_<PartitionStats>(module, "PartitionStats")
      .def_readonly("partition_count", &PartitionStats::partition_count)
      .def_readonly("total_memory_allocated", &PartitionStats::total_memory_allocated)
      .def_readonly("total_compute_allocated", &PartitionStats::total_compute_allocated)
      .def_readonly("total_bandwidth_allocated", &PartitionStats::total_bandwidth_allocated)
      .def_readonly("available_memory", &PartitionStats::available_memory)
      .def_readonly("available_compute", &PartitionStats::available_compute)
      .def_readonly("available_bandwidth", &PartitionStats::available_bandwidth);

  py::class_<PartitionConfig>(module, "PartitionConfig")
      .def(py::init([](const py::object& total_memory, bool allow_overcommit,
                       const py::object& overcommit_ratio) {
             return PartitionConfig{bytes_from("total_memory", total_memory), allow_overcommit,
                                    number_from("overcommit_ratio", overcommit_ratio)};
           }),
           py::arg("total_memory"), py::arg("allow_overcommit").noconvert() = false,
           py::arg("overcommit_ratio") = 1.0)
      .def_readonly("total_memory", &PartitionConfig::total_memory)
      .def_readonly("allow_overcommit", &PartitionConfig::allow_overcommit)
      .def_readonly("overcommit_ratio", &PartitionConfig::overcommit_ratio);
}

}  // namespace

void bind_partition(py::module_& module) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  bind_records(module);
  py::class_<PartitionManager>(module, "PartitionManager")
      .def(py::init([](const PartitionConfig& config, std::shared_ptr<Manager> manager) {
             if (!manager) {
               manager = py::module_::import("pygpukit_torch.runtime")
                             .attr("get_or_initialize")()
                             .attr("manager")
                             .cast<std::shared_ptr<Manager>>();
             }
             return std::make_unique<PartitionManager>(config, manager);
           }),
           py::arg("config"), py::arg("manager") = py::none())
      .def(
          "create_partition",
          [](PartitionManager& self, const std::string& id, const std::string& name,
             const PartitionLimits& limits) {
            std::shared_ptr<Device> device;
            {
              const py::gil_scoped_release unlocked;
              self.create(id, name, limits);
              device = self.manager()->device();
            }
            if (limits.compute && device->properties().processor_groups.empty()) {
              warn("partition '" + id +
                   "' limits no computation: " + device->properties().why_undivided);
            }
            const py::gil_scoped_release unlocked;
            return info_of(self, id);
          },
          py::arg("id"), py::arg("name"), py::arg("limits"))
      .def("delete_partition", &PartitionManager::remove, py::arg("id"), Unlocked())
      .def(
          "assign",
          [](PartitionManager& self, const py::object& context,
             const std::optional<std::string>& id) {
            const std::shared_ptr<Context> native = context_from(context);
            const py::gil_scoped_release unlocked;
            self.assign(*native, id);
          },
          py::arg("context"), py::arg("id"))
      .def("get_partition", &info_of, py::arg("id"), Unlocked())
      .def("get", &info_of, py::arg("id"), Unlocked())
      .def_property_readonly("partition_ids", py::cpp_function(&ids_of, Unlocked()))
      .def("stats", &stats_of, Unlocked());
}

}  // namespace pgk::python
