// The plain pair of functions, for torch.cuda.memory.CUDAPluggableAllocator with a MemPool: whole
// segments are taken from the context of the calling thread's session, for those who cannot replace
// the allocator of the process. Called under native's lock.
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>
#include <sys/types.h>

#include "core/address_table.h"
#include "core/session.h"
#include "device/cuda_device.h"
#include "torch/cuda_segments.h"

extern "C" __attribute__((visibility("default"))) void* pgk_malloc(ssize_t size, int device,
                                                                   cudaStream_t /*stream*/) {
  pgk::Context* context = pgk::current_context();
  const bool serves = context != nullptr && !context->is_on_host() &&
                      static_cast<pgk::CudaDevice&>(context->device()).ordinal() == device;
  TORCH_CHECK(serves, "pgk_malloc serves threads in a session of a context on cuda:", device,
              "; this thread is in none");
  return pgk::take_segment(*context, static_cast<std::size_t>(size));
}

extern "C" __attribute__((visibility("default"))) void pgk_free(void* pointer, ssize_t /*size*/,
                                                                int /*device*/,
                                                                cudaStream_t /*stream*/) {
  if (pgk::Context* owner = pgk::AddressTable::segment_owner_of(pointer)) {
    pgk::give_back_segment(*owner, pointer);
  }
}
