#include "torch/cuda_workspaces.h"

#include <c10/core/Allocator.h>
#include <c10/macros/Export.h>

#include <algorithm>
#include <array>
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
struct cublasContext;
namespace at::cuda {
struct WorkspaceMapWithMutex {
#if PGK_TORCH_AT_LEAST(2, 13)
  std::map<std::tuple<void*, void*>, std::pair<at::DataPtr, size_t>> map;
#else
  std::map<std::tuple<void*, void*>, at::DataPtr> map;
#endif
  std::shared_mutex mutex;
};
TORCH_CUDA_CPP_API WorkspaceMapWithMutex& cublas_handle_stream_to_workspace();
TORCH_CUDA_CPP_API WorkspaceMapWithMutex& cublaslt_handle_stream_to_workspace();
TORCH_CUDA_CPP_API size_t getChosenWorkspaceSize();
#if PGK_TORCH_AT_LEAST(2, 12)
TORCH_CUDA_CPP_API cublasContext* getCurrentCUDABlasHandle(bool setup = true);
#else
TORCH_CUDA_CPP_API cublasContext* getCurrentCUDABlasHandle();
#endif
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

struct Noted {
  std::vector<std::weak_ptr<Context>> contexts;
};
thread_local Noted noted;

bool is_of(const void* pointer, const Context& context) {
  return AddressTable::owner_of(pointer) == &context ||
         AddressTable::segment_owner_of(pointer) == &context;
}

// `goes` is asked for keys of handle and stream, under the lock that threads ask for workspaces
// with; what went is freed without it.
template <typename Goes>
void drop(const Context& context, const Goes& goes) {
  std::vector<at::DataPtr> dropped;
  for (Map* map : maps()) {
    const std::unique_lock lock(map->mutex);
    for (auto entry = map->map.begin(); entry != map->map.end();) {
      at::DataPtr& data = data_of(entry->second);
      if (is_of(data.get(), context) && goes(entry->first)) {
        dropped.push_back(std::move(data));
        entry = map->map.erase(entry);
      } else {
        ++entry;
      }
    }
  }
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

void CudaWorkspaces::note(const std::shared_ptr<Context>& context) {
  std::erase_if(noted.contexts, [&](const auto& known) {
    const auto alive = known.lock();
    return !alive || alive == context;
  });
  noted.contexts.push_back(context);
  has_noted_ = true;
}

std::shared_ptr<Context> CudaWorkspaces::take_short_of_memory(StreamId stream) {
  for (auto known = noted.contexts.begin(); known != noted.contexts.end(); ++known) {
    auto context = known->lock();
    if (!context || context->stream() != stream) continue;
    if (context->used_bytes() <= context->budget() / 2) return nullptr;
    noted.contexts.erase(known);
    has_noted_ = !noted.contexts.empty();
    return context;
  }
  return nullptr;
}

void CudaWorkspaces::drop_own(const Context& context) {
#if PGK_TORCH_AT_LEAST(2, 12)
  const void* handle = at::cuda::getCurrentCUDABlasHandle(/*setup=*/false);
#else
  const void* handle = at::cuda::getCurrentCUDABlasHandle();
#endif
  const auto stream = context.stream();
  drop(context, [&](const std::tuple<void*, void*>& key) {
    return std::get<0>(key) == handle && reinterpret_cast<StreamId>(std::get<1>(key)) == stream;
  });
}

void CudaWorkspaces::drop_all(const Context& context) {
  drop(context, [&](const std::tuple<void*, void*>&) {
    const auto contexts = contexts_of_threads();
    return std::none_of(contexts.begin(), contexts.end(),
                        [&](const auto& entry) { return entry.second == &context; });
  });
}

}  // namespace pgk
