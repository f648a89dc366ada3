#include "torch/pool_tensor.h"

#include <ATen/ops/from_blob.h>

#include <string>

#include "core/error.h"

namespace pgk {

at::Tensor pool_tensor(MemoryPool& pool, MemoryPool::Id block, at::ScalarType dtype) {
  const std::size_t item = c10::elementSize(dtype);
  const std::size_t size = pool.size_of(block);
  if (size % item != 0) {
    throw Error(ErrorCode::invalid_value, "memory pool: a block of " + std::to_string(size) +
                                              " bytes does not hold whole items of " +
                                              std::to_string(item) + " bytes");
  }
  using Owner = std::shared_ptr<MemoryPool::Pin>;
  auto owner = std::make_unique<Owner>(pool.pin(block));
  void* data = reinterpret_cast<void*>((*owner)->address());
  const Device::Properties& properties = pool.device()->properties();
  const c10::Device device =
      properties.is_host ? c10::Device(c10::DeviceType::CPU) : c10::Device(properties.name);
  return at::for_blob(data, {static_cast<std::int64_t>(size / item)})
      .context(owner.release(), [](void* pin) { delete static_cast<Owner*>(pin); })
      .target_device(device)
      .options(at::TensorOptions(dtype).device(device))
      .make_tensor();
}

}  // namespace pgk
