#include "torch/cpu_allocator.h"

#include <c10/util/Exception.h>

#include <tuple>

#include "core/address_table.h"
#include "core/error.h"
#include "core/session.h"
#include "torch/memory_profiling.h"

namespace pgk {
namespace {

c10::Allocator* stock = nullptr;
c10::DeleterFnPtr stock_delete = nullptr;

// The one deleter of every pointer that leaves the allocator, so that raw_deleter() is true of
// all of them: the address tells whose it is.
void delete_block(void* pointer) {
  if (Context* owner = AddressTable::owner_of(pointer)) {
    if (profiler_sees_free()) [[unlikely]]
      tell_profiler(*owner, pointer, /*allocated=*/false, c10::kCPU);
    owner->free(pointer);
  } else {
    stock_delete(pointer);
  }
}

class CpuAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    Context* context = current_context();
    if (context == nullptr || !context->is_on_host() || bytes == 0) {
      return allocate_outside(bytes);
    }
    void* pointer = nullptr;
    try {
      pointer = context->allocate(bytes, context->stream());
    } catch (const Error& error) {
      // Of a session that let its context be destroyed.
      if (error.code() == ErrorCode::context_destroyed) return allocate_outside(bytes);
      TORCH_CHECK_WITH(OutOfMemoryError, error.code() != ErrorCode::out_of_memory, error.what());
      throw;
    }
    if (profiler_sees_allocation()) [[unlikely]]
      tell_profiler(*context, pointer, /*allocated=*/true, c10::kCPU);
    return {pointer, pointer, &delete_block, c10::kCPU};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &delete_block; }

  void copy_data(void* destination, const void* source, std::size_t bytes) const override {
    stock->copy_data(destination, source, bytes);
  }

 private:
  static c10::DataPtr allocate_outside(std::size_t bytes) {
    c10::DataPtr data = stock->allocate(bytes);
    // Fails only for a pointer that does not come from plain allocation; it keeps its deleter.
    std::ignore = data.compare_exchange_deleter(stock_delete, &delete_block);
    return data;
  }
};

CpuAllocator& instance() {
  static auto* allocator = new CpuAllocator;  // tensors may be freed after static destructors
  return *allocator;
}

}  // namespace

void install_cpu_allocator() {
  c10::Allocator* current = c10::GetAllocator(c10::DeviceType::CPU);
  if (current == &instance()) return;
  TORCH_CHECK(current->raw_deleter() != nullptr,
              "the CPU allocator that is installed cannot free raw pointers");
  TORCH_CHECK(stock == nullptr || stock == current,
              "another CPU allocator was installed since pygpukit_torch was initialized before");
  stock = current;
  stock_delete = current->raw_deleter();
  c10::SetAllocator(c10::DeviceType::CPU, &instance());
}

void uninstall_cpu_allocator() {
  if (c10::GetAllocator(c10::DeviceType::CPU) == &instance()) {
    c10::SetAllocator(c10::DeviceType::CPU, stock);
  }
}

}  // namespace pgk
