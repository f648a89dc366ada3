// Forwards the whole interface of torch's CUDA allocator to the native one, except for what a
// decorator has to decide itself. A function that a new torch adds without a default is a compile
// error here.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>
#include <torch/headeronly/version.h>

#include <memory>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#define PGK_TORCH_AT_LEAST(major, minor) \
  (TORCH_VERSION_MAJOR > (major) ||      \
   (TORCH_VERSION_MAJOR == (major) && TORCH_VERSION_MINOR >= (minor)))

namespace pgk {

namespace caching = c10::cuda::CUDACachingAllocator;

class CudaForwarder : public caching::CUDAAllocator {
 public:
  explicit CudaForwarder(caching::CUDAAllocator* native) : native_(native) {}

  void copy_data(void* destination, const void* source, std::size_t bytes) const override {
    native_->copy_data(destination, source, bytes);
  }
  int getPoolUseCount(c10::DeviceIndex device, c10::MempoolId_t id) override {
    return native_->getPoolUseCount(device, id);
  }
  void setNoSplit(c10::DeviceIndex device, c10::MempoolId_t id) override {
    native_->setNoSplit(device, id);
  }
  bool checkPoolLiveAllocations(c10::DeviceIndex device, c10::MempoolId_t id,
                                const std::unordered_set<void*>& expected) override {
    return native_->checkPoolLiveAllocations(device, id, expected);
  }
  std::shared_ptr<caching::AllocatorState> getCheckpointState(c10::DeviceIndex device,
                                                              c10::MempoolId_t id) override {
    return native_->getCheckpointState(device, id);
  }
  void init(int device_count) override { native_->init(device_count); }
  bool initialized() override { return native_->initialized(); }
  double getMemoryFraction(c10::DeviceIndex device) override {
    return native_->getMemoryFraction(device);
  }
  void setMemoryFraction(double fraction, c10::DeviceIndex device) override {
    native_->setMemoryFraction(fraction, device);
  }
  std::vector<caching::StreamSegmentSize> getExpandableSegmentSizes(
      c10::DeviceIndex device) override {
    return native_->getExpandableSegmentSizes(device);
  }
  void enable(bool value) override { native_->enable(value); }
  bool isEnabled() const override { return native_->isEnabled(); }
  caching::SnapshotInfo snapshot(c10::MempoolId_t id, bool include_traces) override {
    return native_->snapshot(id, include_traces);
  }
  std::shared_ptr<void> getIpcDevPtr(std::string handle) override {
    return native_->getIpcDevPtr(std::move(handle));
  }
  bool isHistoryEnabled() override { return native_->isHistoryEnabled(); }
  void recordHistory(bool enabled, caching::CreateContextFn recorder, std::size_t entries,
                     caching::RecordContext when, bool clear,
                     const std::vector<std::string>& skip) override {
    native_->recordHistory(enabled, recorder, entries, when, clear, skip);
  }
  void recordAnnotation(const std::vector<std::pair<std::string, std::string>>& data) override {
    native_->recordAnnotation(data);
  }
  void pushCompileContext(std::string& data) override { native_->pushCompileContext(data); }
  void popCompileContext() override { native_->popCompileContext(); }
  void setUserMetadata(const std::string& data) override { native_->setUserMetadata(data); }
  std::string getUserMetadata() override { return native_->getUserMetadata(); }
  void attachAllocatorTraceTracker(caching::AllocatorTraceTracker tracker) override {
    native_->attachAllocatorTraceTracker(std::move(tracker));
  }
  void enablePeerAccess(c10::DeviceIndex device, c10::DeviceIndex other) override {
    native_->enablePeerAccess(device, other);
  }
#if PGK_TORCH_AT_LEAST(2, 12)
  void attachOomRejectionObserver(caching::OomRejectionObserver observer) override {
    native_->attachOomRejectionObserver(std::move(observer));
  }
#endif
#if PGK_TORCH_AT_LEAST(2, 13)
  void markCaptureBegin(c10::DeviceIndex device) override { native_->markCaptureBegin(device); }
  void markCaptureEnd(c10::DeviceIndex device) override { native_->markCaptureEnd(device); }
  std::shared_ptr<c10::GatheredContext> getContextForPointer(const void* pointer) override {
    return native_->getContextForPointer(pointer);
  }
  c10::DataPtr allocateWithAddress(std::size_t bytes, void* address) override {
    return taken_over(native_->allocateWithAddress(bytes, address));
  }
#endif
#if PGK_TORCH_AT_LEAST(2, 14)
  bool supportsUserMetadata() override { return native_->supportsUserMetadata(); }
  void annotateMemory(const void* pointer, const std::string& data) override {
    native_->annotateMemory(pointer, data);
  }
#endif

 protected:
  // Hands out what native made as our own.
  virtual c10::DataPtr taken_over(c10::DataPtr data) const = 0;

  caching::CUDAAllocator* const native_;
};

}  // namespace pgk
