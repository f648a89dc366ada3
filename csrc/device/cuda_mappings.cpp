#include "device/cuda_mappings.h"

namespace pgk {

void CudaMappings::serve(CUdevice ordinal) {
  access_.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access_.location.id = ordinal;
  access_.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
}

CUresult CudaMappings::map(Address address, Handle handle) {
  CUresult result = driver_.cuMemMap_fn(address, handle.bytes, 0, handle.id, 0);
  if (result != CUDA_SUCCESS) return result;
  result = driver_.cuMemSetAccess_fn(address, handle.bytes, &access_, 1);
  if (result != CUDA_SUCCESS) driver_.cuMemUnmap_fn(address, handle.bytes);
  return result;
}

CUresult CudaMappings::unmap(Address address, Handle handle) {
  return driver_.cuMemUnmap_fn(address, handle.bytes);
}

Address CudaMappings::alias_of(Handle handle) {
  {
    const std::lock_guard lock(mutex_);
    const auto it = aliases_.find(handle.id);
    if (it != aliases_.end()) return it->second;
  }
  CUdeviceptr address = 0;
  driver_.check(driver_.cuMemAddressReserve_fn(&address, handle.bytes, 0, 0, 0), "alias (reserve)",
                handle.bytes);
  const CUresult result = map(address, handle);
  if (result != CUDA_SUCCESS) driver_.cuMemAddressFree_fn(address, handle.bytes);
  driver_.check(result, "alias (map)", handle.bytes);
  const std::lock_guard lock(mutex_);
  aliases_.emplace(handle.id, address);
  return address;
}

void CudaMappings::drop_alias(Handle handle) {
  Address address = 0;
  {
    const std::lock_guard lock(mutex_);
    const auto it = aliases_.find(handle.id);
    if (it == aliases_.end()) return;
    address = it->second;
  }
  driver_.check(unmap(address, handle), "alias (unmap)", handle.bytes);
  {
    const std::lock_guard lock(mutex_);
    aliases_.erase(handle.id);
  }
  // Should it fail, only addresses are lost.
  driver_.cuMemAddressFree_fn(address, handle.bytes);
}

}  // namespace pgk
