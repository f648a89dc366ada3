// The stream that a thread submits its work to, as far as sessions are concerned: they switch it
// to their context's and back. How a thread keeps it is its library's business (csrc/torch).
#pragma once

#include <cstdint>
#include <memory>

#include "core/context.h"
#include "device/device.h"

namespace pgk {

class ThreadStreams {
 public:
  // What was current before; only the implementation knows what it means.
  using Saved = std::int64_t;

  ThreadStreams() = default;
  ThreadStreams(const ThreadStreams&) = delete;
  ThreadStreams& operator=(const ThreadStreams&) = delete;
  virtual ~ThreadStreams() = default;

  // Before enter(). If `ordered`, the work of the context's stream from now on starts after what
  // the thread's stream holds. Throws ErrorCode::session in the middle of a capture.
  void begin(const Context& context, bool ordered);
  // Blocks until the context's stream has done what it holds.
  void finish(const Context& context);
  // What the thread submits from now on starts after what the context's stream holds. Blocks where
  // the thread's work is done as it is submitted.
  void follow(const Context& context);

  // Whether the stream holds work that can be waited for: not if it is captured, nor if it is none.
  static bool has_work(const Context& context, StreamId stream);

  // The calling thread's stream; kNoStream if work is done as it is submitted.
  virtual StreamId current() = 0;
  // The context that the calling thread works in, or for; null if there is none.
  virtual std::shared_ptr<Context> context() = 0;
  // Makes the context's stream the calling thread's.
  virtual Saved enter(const std::shared_ptr<Context>& context) = 0;
  // Makes `saved` the calling thread's stream again; `outer` is the context it is in then.
  virtual void leave(Saved saved, const std::shared_ptr<Context>& outer) = 0;
};

}  // namespace pgk
