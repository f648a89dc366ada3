// Torch's current stream and the contexts: sessions switch it, and threads without a session are
// recognised by it.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "core/session.h"
#include "device/cuda_device.h"

namespace pgk {

// For sessions of the contexts on `device`; the same object for the same device, forever.
ThreadStreams* cuda_streams(const std::shared_ptr<CudaDevice>& device);

// The calling thread's current stream on a device.
StreamId current_cuda_stream(int ordinal);

// The context that work on `stream` belongs to in a thread without a session of its own: the one
// that owns the stream; in a backward pass also the one that backward was called in, else the one
// that last began to use the stream. Null if there is none.
std::shared_ptr<Context> context_of_work(StreamId stream);

// Work on `stream`, none of the context's own, began to use its memory.
void note_use(StreamId stream, const std::shared_ptr<Context>& context);

inline cudaStream_t handle_of(StreamId stream) {
  return stream == CudaDevice::kDefaultStream ? nullptr : reinterpret_cast<cudaStream_t>(stream);
}

}  // namespace pgk
