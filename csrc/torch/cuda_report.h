// What torch's observers are told of a context's blocks: as native does for its own, for profilers
// and for torch's CUDA sanitizer.
#pragma once

#include <c10/core/Device.h>

#include "core/context.h"
#include "device/cuda_device.h"

namespace pgk {

inline CudaDevice& cuda_device(const Context& context) {
  return static_cast<CudaDevice&>(context.device());
}

c10::Device torch_device(const Context& context);
void report(const Context& context, void* pointer, bool allocated);

}  // namespace pgk
