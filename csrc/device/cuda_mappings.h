// Where handles are mapped beside the place they serve: a copy between two handles needs an address
// for the one that is mapped nowhere else, its alias. An alias stays as long as its handle, since
// handles are used again and again and mapping host memory takes longer than many a copy.
//
// All calls need the device's context to be current.
#pragma once

#include <mutex>
#include <unordered_map>

#include "device/cuda_driver.h"
#include "device/device.h"

namespace pgk {

class CudaMappings {
 public:
  explicit CudaMappings(const CudaDriver& driver) : driver_(driver) {}

  // Whose memory access is given to. Before any other call.
  void serve(CUdevice ordinal);

  // A mapping that fails leaves nothing at the address.
  CUresult map(Address address, Handle handle);
  CUresult unmap(Address address, Handle handle);

  // Not for one handle in two threads at a time. Throws ErrorCode::device.
  Address alias_of(Handle handle);
  // Before the handle is released: memory goes back to the system once it is mapped nowhere.
  void drop_alias(Handle handle);

 private:
  const CudaDriver& driver_;
  CUmemAccessDesc access_{};
  std::mutex mutex_;
  std::unordered_map<std::uint64_t, Address> aliases_;  // by the handle's id
};

}  // namespace pgk
