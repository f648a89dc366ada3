// Times allocate + free through torch's own allocator interface, without Python in the loop.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
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

// Nanoseconds of each pair, the clock's own included.
std::vector<float> time_each_pair(c10::Allocator* allocator, std::size_t bytes, std::size_t pairs,
                                  std::size_t live) {
  std::vector<c10::DataPtr> blocks(live);
  for (auto& block : blocks) block = allocator->allocate(bytes);
  std::vector<float> times(pairs);
  auto start = std::chrono::steady_clock::now();
  for (std::size_t i = 0, slot = 0; i < pairs; ++i) {
    blocks[slot].clear();
    blocks[slot] = allocator->allocate(bytes);
    if (++slot == live) slot = 0;
    const auto end = std::chrono::steady_clock::now();
    times[i] = std::chrono::duration<float, std::nano>(end - start).count();
    start = end;
  }
  return times;
}

// Nanoseconds a block to make `count` of them that live together, to free all, and to make them
// again.
std::array<double, 3> time_many(c10::Allocator* allocator, std::size_t bytes, std::size_t count) {
  std::vector<c10::DataPtr> blocks(count);
  std::array<double, 3> times{};
  for (std::size_t step = 0; step < times.size(); ++step) {
    const auto start = std::chrono::steady_clock::now();
    for (auto& block : blocks) {
      if (step == 1) {
        block.clear();
      } else {
        block = allocator->allocate(bytes);
      }
    }
    const auto end = std::chrono::steady_clock::now();
    times[step] =
        std::chrono::duration<double, std::nano>(end - start).count() / static_cast<double>(count);
  }
  return times;
}

// What torch used before this package was initialized.
c10::Allocator* stock = nullptr;

// Not c10::GetAllocator(kCUDA), which does not follow torch.cuda.memory.change_current_allocator().
c10::Allocator* current(bool cuda) {
  return cuda ? at::detail::getCUDAHooks().getCUDADeviceAllocator()
              : c10::GetAllocator(c10::DeviceType::CPU);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  namespace py = pybind11;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.def("remember_stock", [](bool cuda) { stock = current(cuda); });
  module.def(
      "time_current",
      [](bool cuda, std::size_t bytes, std::size_t pairs, std::size_t live) {
        return time_pairs(current(cuda), bytes, pairs, live);
      },
      Unlocked());
  module.def(
      "time_each_current",
      [](bool cuda, std::size_t bytes, std::size_t pairs, std::size_t live) {
        return time_each_pair(current(cuda), bytes, pairs, live);
      },
      Unlocked());
  module.def(
      "time_many",
      [](bool cuda, bool in_session, std::size_t bytes, std::size_t count) {
        return time_many(in_session ? current(cuda) : stock, bytes, count);
      },
      Unlocked());
  module.def(
      "time_stock",
      [](bool /*cuda*/, std::size_t bytes, std::size_t pairs, std::size_t live) {
        return time_pairs(stock, bytes, pairs, live);
      },
      Unlocked());
}
