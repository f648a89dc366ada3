// What torch keeps of contexts' memory for cuBLAS: a workspace for each pair of a handle, which is
// a thread's, and a stream. It never lets go of one by itself.
//
// Nobody can tell from outside whether a thread is in the middle of an operator that has a
// workspace. The thread itself is not when it leaves a session. So a thread gives its own up when
// it leaves a context that is short of memory, and all go when nobody works in the context any
// more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/context.h"

namespace pgk {

class CudaWorkspaces {
 public:
  // Of what torch asks for now.
  static std::size_t bytes_each();
  // In bytes.
  static std::size_t bytes_of(std::uint64_t context_id);

  // The calling thread was given a block of that size, in a session and on the context's own
  // stream.
  static void note(const std::shared_ptr<Context>& context);
  // Whether the calling thread has noted any.
  static bool has_noted() { return has_noted_; }
  // The context among the noted ones whose own stream this is, once; null if there is none, or it
  // has memory to spare.
  static std::shared_ptr<Context> take_short_of_memory(StreamId stream);
  // The calling thread's own on its current stream, which is the context's, outside of operators.
  static void drop_own(const Context& context);
  // All, unless a thread works in the context: then they stay.
  static void drop_all(const Context& context);

 private:
  static inline thread_local bool has_noted_ = false;
};

}  // namespace pgk
