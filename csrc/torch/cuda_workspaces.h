// What torch keeps of contexts' memory for cuBLAS: a workspace for each pair of a handle, which is
// a thread's, and a stream. It never lets go of one by itself.
//
// A workspace can be taken back when its thread is not in the middle of an operator that uses it.
// A thread asks for it under a lock of torch's and works in the context until the operator has
// submitted its work; so under that lock a thread that works elsewhere has no use for it, and what
// was submitted is ahead of whoever gets the memory next.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_map>

#include "core/context.h"

namespace pgk {

class CudaWorkspaces {
 public:
  // Of what torch asks for now.
  static std::size_t bytes_each();
  // In bytes.
  static std::size_t bytes_of(std::uint64_t context_id);

  // The calling thread was given a block of that size.
  void note(const void* pointer);
  // Those of threads that work elsewhere; not where a graph may hold one. Returns whether any went.
  bool drop_idle(const Context& context);
  // Of a context in which nobody works any more.
  static bool drop_all(const Context& context);

 private:
  std::mutex mutex_;
  std::unordered_map<const void*, std::uint64_t> threads_;  // whose a block was, by numbers
};

}  // namespace pgk
