// Times allocate + free through torch's own allocator interface, without Python in the loop.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pybind11/pybind11.h>

#include <chrono>
#include <vector>

namespace {

// Nanoseconds a pair, with `live` blocks alive at any time.
double time_pairs(c10::Allocator* allocator, std::size_t bytes, std::size_t pairs,
                  std::size_t live) {
  std::vector<c10::DataPtr> blocks(live);
  for (auto& block : blocks) block = allocator->allocate(bytes);
  const auto start = std::chrono::steady_clock::now();
  for (std::size_t i = 0, slot = 0; i < pairs; ++i) {
    blocks[slot].clear();
    blocks[slot] = allocator->allocate(bytes);
    if (++slot == live) slot = 0;
  }
  const auto end = std::chrono::steady_clock::now();
  return std::chrono::duration<double, std::nano>(end - start).count() / static_cast<double>(pairs);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  namespace py = pybind11;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.def(
      "time_current",
      [](std::size_t bytes, std::size_t pairs, std::size_t live) {
        return time_pairs(c10::GetAllocator(c10::DeviceType::CPU), bytes, pairs, live);
      },
      Unlocked());
  module.def(
      "time_stock",
      [](std::size_t bytes, std::size_t pairs, std::size_t live) {
        return time_pairs(c10::GetDefaultCPUAllocator(), bytes, pairs, live);
      },
      Unlocked());
}
