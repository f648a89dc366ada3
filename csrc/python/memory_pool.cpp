#include "core/memory_pool.h"

#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <memory>
#include <string>

#include "core/error.h"
#include "device/host_device.h"
#include "python/arguments.h"
#include "python/bindings.h"
#include "torch/fork_guard.h"
#include "torch/pool_tensor.h"

namespace py = pybind11;

namespace pgk::python {
namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

// What allocate() hands out: where a block is kept, by name.
struct PoolBlock {
  std::shared_ptr<MemoryPool> pool;
  MemoryPool::Id id;
  std::size_t size;

  MemoryPool::Id in(const MemoryPool& other) const {
    if (pool.get() != &other) {
      throw Error(ErrorCode::invalid_value,
                  "memory pool: block " + std::to_string(id) + " belongs to another pool");
    }
    return id;
  }
};

// The device of the process if it is initialized, else host memory enough for any use of the quota.
std::shared_ptr<Device> device_for(std::size_t quota) {
  const py::object runtime = py::module_::import("pygpukit_torch.runtime").attr("existing")();
  if (!runtime.is_none()) return runtime.attr("device").cast<std::shared_ptr<Device>>();
  const std::size_t whole =
      round_up(std::min(quota, HostDevice::kLargestCapacity), HostDevice::kGranularity);
  const std::size_t range = std::max(whole * MemoryPool::kRangePerQuota, HostDevice::kGranularity);
  return std::make_shared<HostDevice>(std::min(range, HostDevice::kLargestCapacity));
}

}  // namespace

void bind_memory_pool(py::module_& module) {
  py::class_<MemoryPool::Stats>(module, "PoolStats")
      .def_readonly("quota", &MemoryPool::Stats::quota)
      .def_readonly("used", &MemoryPool::Stats::used)
      .def_readonly("cached", &MemoryPool::Stats::cached)
      .def_readonly("available", &MemoryPool::Stats::available)
      .def_readonly("allocated_bytes", &MemoryPool::Stats::allocated_bytes)
      .def_readonly("evicted_bytes", &MemoryPool::Stats::evicted_bytes)
      .def_readonly("resident", &MemoryPool::Stats::resident)
      .def_readonly("free_blocks", &MemoryPool::Stats::free_blocks)
      .def_readonly("active_blocks", &MemoryPool::Stats::active_blocks)
      .def_readonly("allocation_count", &MemoryPool::Stats::allocation_count)
      .def_readonly("reuse_count", &MemoryPool::Stats::reuse_count)
      .def_readonly("eviction_count", &MemoryPool::Stats::eviction_count);

  py::class_<PoolBlock>(module, "MemoryBlock")
      .def_readonly("id", &PoolBlock::id)
      .def_readonly("size", &PoolBlock::size)
      .def_property_readonly(
          "ptr",
          py::cpp_function([](const PoolBlock& self) { return self.pool->address_of(self.id); },
                           Unlocked()))
      .def_property_readonly(
          "is_evicted",
          py::cpp_function([](const PoolBlock& self) { return self.pool->is_evicted(self.id); },
                           Unlocked()))
      .def(
          "as_tensor",
          [](const PoolBlock& self, at::ScalarType dtype) {
            if (!self.pool->device()->properties().is_host) {
              py::module_::import("torch.cuda").attr("init")();
            }
            const py::gil_scoped_release unlocked;
            return pool_tensor(*self.pool, self.id, dtype);
          },
          py::arg_v("dtype", at::kByte, "torch.uint8"));

  py::class_<MemoryPool, std::shared_ptr<MemoryPool>>(module, "MemoryPool")
      .def(py::init(
               [](const py::object& quota, bool enable_eviction, std::shared_ptr<Device> device) {
                 const std::size_t bytes = bytes_from("quota", quota);
                 if (!device) device = device_for(bytes);
                 const py::gil_scoped_release unlocked;
                 auto pool = MemoryPool::make(bytes, enable_eviction, std::move(device));
                 guard_pool_forks(pool);
                 return pool;
               }),
           py::arg("quota"), py::arg("enable_eviction").noconvert() = false,
           py::arg("device") = py::none())
      .def(
          "allocate",
          [](const std::shared_ptr<MemoryPool>& self, const py::object& size) {
            const std::size_t bytes = bytes_from("size", size);
            const py::gil_scoped_release unlocked;
            return PoolBlock{self, self->allocate(bytes), bytes};
          },
          py::arg("size"))
      .def(
          "free", [](MemoryPool& self, const PoolBlock& block) { self.free(block.in(self)); },
          py::arg("block").none(false), Unlocked())
      .def(
          "touch", [](MemoryPool& self, const PoolBlock& block) { self.touch(block.in(self)); },
          py::arg("block").none(false), Unlocked())
      .def(
          "evict", [](MemoryPool& self, const PoolBlock& block) { self.evict(block.in(self)); },
          py::arg("block").none(false), Unlocked())
      .def(
          "restore", [](MemoryPool& self, const PoolBlock& block) { self.restore(block.in(self)); },
          py::arg("block").none(false), Unlocked())
      .def("clear", &MemoryPool::clear, Unlocked())
      .def("stats", &MemoryPool::stats, Unlocked())
      .def("check_invariants", &MemoryPool::check_invariants, Unlocked())
      .def_property_readonly("device", &MemoryPool::device);
}

}  // namespace pgk::python
