// The CUDA driver's functions, looked up at run time: nothing links against libcuda, so the same
// build imports on a machine without a driver and says there what is missing.
#pragma once

#include <cuda.h>

#include <cstddef>

// Without their version suffix; the types below are those that cuda.h gives to the plain names.
#define PGK_CUDA_FUNCTIONS(X)          \
  X(cuInit)                            \
  X(cuGetErrorName)                    \
  X(cuDeviceGet)                       \
  X(cuDeviceGetName)                   \
  X(cuDeviceTotalMem)                  \
  X(cuDevicePrimaryCtxRetain)          \
  X(cuDevicePrimaryCtxRelease)         \
  X(cuCtxGetCurrent)                   \
  X(cuCtxPushCurrent)                  \
  X(cuCtxPopCurrent)                   \
  X(cuCtxGetStreamPriorityRange)       \
  X(cuCtxSynchronize)                  \
  X(cuThreadExchangeStreamCaptureMode) \
  X(cuMemGetAllocationGranularity)     \
  X(cuMemCreate)                       \
  X(cuMemRelease)                      \
  X(cuMemAddressReserve)               \
  X(cuMemAddressFree)                  \
  X(cuMemMap)                          \
  X(cuMemSetAccess)                    \
  X(cuMemUnmap)                        \
  X(cuMemGetInfo)                      \
  X(cuMemcpyAsync)                     \
  X(cuMemcpyPeerAsync)                 \
  X(cuStreamCreateWithPriority)        \
  X(cuStreamIsCapturing)               \
  X(cuStreamQuery)                     \
  X(cuStreamSynchronize)               \
  X(cuStreamWaitEvent)                 \
  X(cuEventCreate)                     \
  X(cuEventRecord)                     \
  X(cuEventQuery)                      \
  X(cuEventSynchronize)

namespace pgk {

struct CudaDriver {
  // Throws ErrorCode::device if there is no driver, or one that lacks a function.
  static const CudaDriver& get();

  // Throws ErrorCode::device with the driver's name of the error unless `result` is success.
  void check(CUresult result, const char* call, std::size_t bytes = 0) const;

#define PGK_DECLARE(name) decltype(&::name) name##_fn = nullptr;
  PGK_CUDA_FUNCTIONS(PGK_DECLARE)
#undef PGK_DECLARE
};

}  // namespace pgk
