#include "torch/cuda_allocator.h"

#include <ATen/ops/empty.h>

#include "torch/cuda_decorator.h"

namespace pgk {
namespace {

using Native = caching::CUDAAllocator;

Native* native_allocator = nullptr;

std::shared_ptr<CudaDecorator> instance;

}  // namespace

std::shared_ptr<Native> cuda_allocator() {
  Native* current = caching::get();
  if (current != nullptr && current == instance.get()) return instance;
  const std::string name = current == nullptr ? "none" : current->name();
  if (name != "native" || (instance && current != native_allocator)) {
    throw Error(ErrorCode::invalid_value,
                "torch's CUDA allocator is '" + name +
                    "', but only its native one can serve contexts: check PYTORCH_ALLOC_CONF and "
                    "whoever else replaces the allocator");
  }
  if (!instance) {
    native_allocator = current;
    // Leaked: blocks are freed after static destructors have run.
    instance = *new std::shared_ptr<CudaDecorator>(std::make_shared<CudaDecorator>(current));
  }
  return instance;
}

void install_cuda_allocator() {
  caching::allocator.store(cuda_allocator().get());
  // What torch.accelerator and Storage ask for; a priority of 0 would be ignored.
  c10::SetAllocator(c10::DeviceType::CUDA, instance.get(), 1);
}

void uninstall_cuda_allocator() {
  if (!instance || caching::get() != instance.get()) return;
  instance->serve(nullptr);
  caching::allocator.store(native_allocator);
  c10::SetAllocator(c10::DeviceType::CUDA, native_allocator, 1);
}

void serve_contexts_of(const std::shared_ptr<Manager>& manager) {
  instance->serve(manager);
}

at::Tensor empty_outside(std::int64_t bytes) {
  const auto size = static_cast<std::size_t>(bytes);
  c10::DataPtr data = instance->allocate_outside(size);
  const c10::Device device = data.device();
  const c10::Storage storage(c10::Storage::use_byte_size_t(), size, std::move(data), instance.get(),
                             /*resizable=*/false);
  return at::empty({0}, at::TensorOptions(at::kByte).device(device)).set_(storage, 0, {bytes});
}

std::optional<CudaPools::Announced> take_announced_capture() {
  return CudaPools::take_announced();
}

void abandon_capture(const CudaPools::Announced& capture) {
  if (!instance) return;
  instance->drop_workspaces_of(instance->pools().abandon(capture));
  instance->pools().empty_released();
}

bool is_begun_capture(const CudaPools::Announced& capture) {
  return instance && instance->pools().is_begun(capture);
}

void leave_workspaces(StreamId stream) {
  if (instance) instance->leave(stream);
}

void drop_workspaces_of(const Context& context) {
  if (instance) instance->drop_workspaces_of(context);
}

std::size_t workspace_bytes_of(std::uint64_t context_id) {
  return CudaWorkspaces::bytes_of(context_id);
}

}  // namespace pgk
