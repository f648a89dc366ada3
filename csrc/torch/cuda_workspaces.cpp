#include "torch/cuda_workspaces.h"

#include <c10/core/Allocator.h>
#include <c10/macros/Export.h>

#include <array>
#include <functional>
#include <map>
#include <shared_mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "core/address_table.h"
#include "core/session.h"
#include "torch/cuda_forwarder.h"

// From ATen/cuda/CUDAContextLight.h, which needs the headers of cuBLAS, cuSPARSE and cuSOLVER.
#if __has_include(<cublas_v2.h>) && __has_include(<cusparse.h>) && __has_include(<cusolverDn.h>)
#include <ATen/cuda/CUDAContextLight.h>
#else
namespace at::cuda {
struct WorkspaceMapWithMutex {
#if PGK_TORCH_AT_LEAST(2, 13)
  std::map<std::tuple<void*, void*>, std::pair<at::DataPtr, size_t> > map;
#else
  std::map<std::tuple<void*, void*>, at::DataPtr> map;
#endif
  std::shared_mutex mutex;
};
TORCH_CUDA_CPP_API WorkspaceMapWithMutex& cublas_handle_stream_to_workspace();
TORCH_CUDA_CPP_API WorkspaceMapWithMutex& cublaslt_handle_stream_to_workspace();
TORCH_CUDA_CPP_API size_t getChosenWorkspaceSize();
}  // namespace at::cuda
#endif

namespace pgk {
namespace {

using Map = at::cuda::WorkspaceMapWithMutex;

// The map's values have the size beside the memory from torch 2.13 on.
at::DataPtr& data_of(at::DataPtr& data) {
  return data;
}
template <typename Size>
at::DataPtr& data_of(std::pair<at::DataPtr, Size>& entry) {
  return entry.first;
}

std::array<Map*, 2> maps() {
  return {&at::cuda::cublas_handle_stream_to_workspace(),
          &at::cuda::cublaslt_handle_stream_to_workspace()};
}

// `goes` is asked under the lock that threads ask for workspaces with.
bool drop(const Context& context, const std::function<bool(const void*)>& goes) {
  std::vector<at::DataPtr> dropped;  // freed without that lock
  for (Map* map : maps()) {
    const std::unique_lock lock(map->mutex);
    for (auto entry = map->map.begin(); entry != map->map.end();) {
      at::DataPtr& data = data_of(entry->second);
      if (AddressTable::owner_of(data.get()) == &context && goes(data.get())) {
        dropped.push_back(std::move(data));
        entry = map->map.erase(entry);
      } else {
        ++entry;
      }
    }
  }
  return !dropped.empty();
}

}  // namespace

std::size_t CudaWorkspaces::bytes_each() {
  return at::cuda::getChosenWorkspaceSize();
}

std::size_t CudaWorkspaces::bytes_of(std::uint64_t context_id) {
  std::size_t bytes = 0;
  for (Map* map : maps()) {
    const std::shared_lock lock(map->mutex);
    for (auto& [key, value] : map->map) {
      const void* pointer = data_of(value).get();
      const Context* owner = AddressTable::owner_of(pointer);
      if (owner != nullptr && !owner->is_on_host() && owner->id() == context_id) {
        bytes += owner->block_bytes(pointer);
      }
    }
  }
  return bytes;
}

void CudaWorkspaces::note(const void* pointer) {
  const std::lock_guard lock(mutex_);
  threads_[pointer] = this_thread_number();
}

bool CudaWorkspaces::drop_idle(const Context& context) {
  const std::uint64_t own = this_thread_number();
  const std::lock_guard lock(mutex_);
  return drop(context, [&](const void* pointer) {
    const auto noted = threads_.find(pointer);
    if (noted == threads_.end() || noted->second == own) return false;
    const auto contexts = contexts_of_threads();
    const auto thread = contexts.find(noted->second);
    // The handle of a thread that has ended may be another one's.
    const bool goes = thread != contexts.end() && thread->second != &context;
    if (goes) threads_.erase(noted);
    return goes;
  });
}

bool CudaWorkspaces::drop_all(const Context& context) {
  return drop(context, [](const void*) { return true; });
}

}  // namespace pgk
