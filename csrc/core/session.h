// Which context the calling thread works in.
//
// Every thread has a stack of entered sessions; the top one is current. A session object may be
// entered many times and by many threads. Leaving takes the thread's topmost entry of that
// session out of the stack, so sessions that end out of order (two suspended generators, say)
// leave the others as they were.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/context.h"

namespace pgk {

class Session {
 public:
  explicit Session(std::shared_ptr<Context> context);
  // Leaves wherever it is still entered.
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Throws ErrorCode::context_destroyed or ErrorCode::forked.
  void enter();
  // Throws ErrorCode::wrong_thread if the calling thread has not entered this session: if another
  // one has, its entry is taken back, so that it does not stay in a context it has left.
  // In a forked child it does nothing: no session survives a fork.
  void exit();

 private:
  std::shared_ptr<Context> context_;
  std::uint64_t id_;
  std::uint64_t process_;  // counts the forks between the first process and the session's
};

// For the fork guard only.
void lock_sessions();
void unlock_sessions();
void forget_sessions_in_child();

namespace detail {
// Read by every allocation: initial-exec costs no call. Atomic because another thread may take
// back an entry (see Session::exit).
extern thread_local constinit std::atomic<Context*> current_context
    __attribute__((tls_model("initial-exec")));
}  // namespace detail

// The calling thread's context, null outside of sessions. Valid until the session is left.
inline Context* current_context() {
  return detail::current_context.load(std::memory_order_relaxed);
}

}  // namespace pgk
