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
  X(cuDeviceGetAttribute)              \
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
  X(cuMemAlloc)                        \
  X(cuMemFree)                         \
  X(cuMemHostAlloc)                    \
  X(cuMemFreeHost)                     \
  X(cuMemcpyAsync)                     \
  X(cuMemcpyPeerAsync)                 \
  X(cuStreamCreateWithPriority)        \
  X(cuStreamDestroy)                   \
  X(cuStreamIsCapturing)               \
  X(cuStreamEndCapture)                \
  X(cuStreamQuery)                     \
  X(cuStreamSynchronize)               \
  X(cuStreamWaitEvent)                 \
  X(cuStreamBatchMemOp)                \
  X(cuEventCreate)                     \
  X(cuEventDestroy)                    \
  X(cuEventRecord)                     \
  X(cuEventQuery)                      \
  X(cuEventSynchronize)                \
  X(cuModuleLoadData)                  \
  X(cuModuleUnload)                    \
  X(cuModuleGetFunction)               \
  X(cuLaunchKernel)                    \
  X(cuGraphDestroy)

// Those that not every driver has, with the version of the driver API that brought them.
#define PGK_CUDA_LATER_FUNCTIONS(X)     \
  X(cuDeviceGetDevResource, 12040)      \
  X(cuDevSmResourceSplitByCount, 12040) \
  X(cuDevResourceGenerateDesc, 12040)   \
  X(cuGreenCtxCreate, 12040)            \
  X(cuGreenCtxStreamCreate, 12050)      \
  X(cuCtxRecordEvent, 12050)            \
  X(cuCtxWaitEvent, 12050)

namespace pgk {

struct CudaDriver {
  // Throws ErrorCode::device if there is no driver, or one that lacks a function.
  static const CudaDriver& get();

  // Throws ErrorCode::device with the driver's name of the error unless `result` is success.
  void check(CUresult result, const char* call, std::size_t bytes = 0) const;

#define PGK_DECLARE(name) decltype(&::name) name##_fn = nullptr;
  PGK_CUDA_FUNCTIONS(PGK_DECLARE)
#undef PGK_DECLARE
  // Null where the driver lacks it.
#define PGK_DECLARE(name, version) decltype(&::name) name##_fn = nullptr;
  PGK_CUDA_LATER_FUNCTIONS(PGK_DECLARE)
#undef PGK_DECLARE
};

// A device's context, and relaxed capture mode, for the calling thread.
class CudaScope {
 public:
  CudaScope(const CudaDriver& driver, CUcontext context) : driver_(driver) {
    driver_.check(driver_.cuCtxPushCurrent_fn(context), "cuCtxPushCurrent");
    driver_.cuThreadExchangeStreamCaptureMode_fn(&mode_);
  }
  CudaScope(const CudaScope&) = delete;
  CudaScope& operator=(const CudaScope&) = delete;
  ~CudaScope() {
    CUcontext popped = nullptr;
    driver_.cuThreadExchangeStreamCaptureMode_fn(&mode_);
    driver_.cuCtxPopCurrent_fn(&popped);
  }

 private:
  const CudaDriver& driver_;
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

}  // namespace pgk
