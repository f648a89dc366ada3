// Pages copied to host memory while work goes on that may write to them.
//
// Such a copy can be torn or out of date, so it is worth only as much as a comparison later, while
// nothing can write: if the page then has the fingerprint of what was copied, they are the same.
// For that the fingerprint must be of the very bytes that were copied. So a page is first copied
// within the device, to a buffer that nobody writes to, and fingerprint and copy are taken from
// there. (A fingerprint of the page itself could see a value that a writer changes and changes
// back, and the copy the other one.)
//
// All calls need the device's context to be current. Not thread-safe.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "device/cuda_driver.h"
#include "device/cuda_fingerprint.h"
#include "device/cuda_flags.h"
#include "device/cuda_mappings.h"
#include "device/device.h"

namespace pgk {

class CudaStaging {
 public:
  CudaStaging(const CudaDriver& driver, CUdevice ordinal, CudaMappings& mappings, CudaFlags& flags)
      : driver_(driver), ordinal_(ordinal), mappings_(mappings), flags_(flags) {}
  ~CudaStaging();
  CudaStaging(const CudaStaging&) = delete;
  CudaStaging& operator=(const CudaStaging&) = delete;

  // Makes buffers for pages of that size. False if there is no memory for any. Only while empty.
  bool make_room(std::size_t bytes);
  bool has_room(std::size_t bytes) const { return bytes <= buffer_bytes_; }
  // Whether with a page of that size more than `limit` bytes would be ahead. One page always may.
  bool is_full(std::size_t bytes, std::size_t limit) const;
  bool is_empty() const { return copies_.empty(); }

  // Begins to copy move.from, which is mapped at its address, to move.to. While nothing is held.
  void add(Move& move, const CudaFingerprint& fingerprint);
  // The one added first, once it is copied; null until then.
  Move* oldest_copied() const;
  void await_oldest() const;
  // What was copied of it.
  Fingerprint fingerprint_of_oldest() const;
  void remove_oldest();
  // Blocks until nothing is copied any more.
  void clear() noexcept;

 private:
  static constexpr std::size_t kSlots = CudaFlags::kPages;
  // One is filled while another one is emptied.
  static constexpr std::size_t kBuffers = 2;

  bool prepare();
  void release_buffers() noexcept;
  std::size_t oldest_slot() const { return (next_ - copies_.size()) % kSlots; }

  const CudaDriver& driver_;
  CUdevice ordinal_;
  CudaMappings& mappings_;
  CudaFlags& flags_;

  CUstream filling_ = nullptr;
  CUstream emptying_ = nullptr;
  std::array<CUevent, kBuffers> filled_{};  // by buffer
  std::array<CUevent, kSlots> copied_{};    // by slot
  std::vector<Handle> buffers_;
  std::size_t buffer_bytes_ = 0;
  std::deque<Move*> copies_;  // the oldest first
  std::size_t bytes_ = 0;     // of those
  std::uint64_t next_ = 0;    // how many were added ever
};

}  // namespace pgk
