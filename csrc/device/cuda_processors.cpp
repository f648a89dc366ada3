#include "device/cuda_processors.h"

#include <algorithm>

#include "core/error.h"

namespace pgk {
namespace {

constexpr std::size_t kMostGroups = 64;  // bits of a ProcessorSet

}  // namespace

void CudaProcessors::divide(CUdevice device) {
  device_ = device;
#define PGK_REQUIRE(name, version)                              \
  if (driver_.name##_fn == nullptr) {                           \
    why_undivided_ = "the driver has no " #name " (CUDA 12.5)"; \
    return;                                                     \
  }
  PGK_CUDA_LATER_FUNCTIONS(PGK_REQUIRE)
#undef PGK_REQUIRE
  try {
    CUdevResource all{};
    driver_.check(driver_.cuDeviceGetDevResource_fn(device, &all, CU_DEV_RESOURCE_TYPE_SM),
                  "cuDeviceGetDevResource");
    // The smallest groups there can be, unless they are more than can be told apart.
    const unsigned smallest = std::max(all.sm.minSmPartitionSize, 1U);
    unsigned size = smallest;
    while (all.sm.smCount / size >= kMostGroups) size += smallest;
    unsigned count = all.sm.smCount / size;
    groups_.resize(count);
    CUdevResource rest{};
    driver_.check(
        driver_.cuDevSmResourceSplitByCount_fn(groups_.data(), &count, &all, &rest, 0, size),
        "cuDevSmResourceSplitByCount");
    groups_.resize(count);
    if (rest.type == CU_DEV_RESOURCE_TYPE_SM && rest.sm.smCount > 0) groups_.push_back(rest);
    for (const CUdevResource& group : groups_) sizes_.push_back(group.sm.smCount);
  } catch (const Error& error) {
    groups_.clear();
    why_undivided_ = error.what();
  }
}

CUgreenCtx CudaProcessors::context_of(ProcessorSet set) {
  const auto known = contexts_.find(set);
  if (known != contexts_.end()) return known->second;
  std::vector<CUdevResource> chosen;
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    if ((set >> i & 1) != 0) chosen.push_back(groups_[i]);
  }
  CUdevResourceDesc description{};
  driver_.check(driver_.cuDevResourceGenerateDesc_fn(&description, chosen.data(),
                                                     static_cast<unsigned>(chosen.size())),
                "cuDevResourceGenerateDesc");
  CUgreenCtx context{};
  driver_.check(
      driver_.cuGreenCtxCreate_fn(&context, description, device_, CU_GREEN_CTX_DEFAULT_STREAM),
      "cuGreenCtxCreate");
  contexts_.emplace(set, context);
  return context;
}

CUstream CudaProcessors::create_stream(ProcessorSet set, int priority) {
  CUstream stream = nullptr;
  driver_.check(
      driver_.cuGreenCtxStreamCreate_fn(&stream, context_of(set), CU_STREAM_NON_BLOCKING, priority),
      "create_stream");
  return stream;
}

}  // namespace pgk
