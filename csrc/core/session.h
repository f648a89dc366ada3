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
#include <utility>
#include <vector>

#include "core/context.h"

namespace pgk {

// The stream that a thread submits its work to, as far as sessions are concerned: they switch it to
// their context's and back. Implemented where streams are a property of the thread (csrc/torch).
class ThreadStreams {
 public:
  // What was current before; only this class knows what it means.
  using Saved = std::int64_t;

  virtual ~ThreadStreams() = default;
  // Makes the context's stream the calling thread's. If `ordered`, its work from now on starts
  // after what the thread's stream holds. Throws ErrorCode::session in the middle of a capture.
  virtual Saved enter(const std::shared_ptr<Context>& context, bool ordered) = 0;
  // Makes `saved` the calling thread's stream again; `outer` is the context it is in then.
  virtual void leave(Saved saved, const std::shared_ptr<Context>& outer) = 0;
  // Blocks until the context's stream has done what it holds.
  virtual void finish(const Context& context) = 0;
};

class Session {
 public:
  // An ordered session hands over at its borders: see ThreadStreams::enter(), and leaving waits
  // until the context's stream is done. One that does not keep its context active lets it be
  // destroyed while it is entered.
  explicit Session(std::shared_ptr<Context> context, bool ordered = true, bool keeps_active = true);
  // Leaves wherever it is still entered.
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Throws ErrorCode::context_destroyed, ::forked, ::session or ::device; the thread is then where
  // it was.
  void enter();
  // Throws ErrorCode::session if the calling thread has not entered this session: if another one
  // has, its entry is taken back, so that it does not stay in a context it has left. Throws
  // ErrorCode::device if the work failed; the session is left all the same.
  // In a forked child it does nothing: no session survives a fork.
  void exit();

 private:
  std::shared_ptr<Context> context_;
  bool ordered_;
  bool keeps_active_;
  std::uint64_t id_;
  std::uint64_t process_;  // counts the forks between the first process and the session's
};

// Keeps a context active without a thread in it: for work that is still to start.
class Hold {
 public:
  // Throws ErrorCode::context_destroyed or ErrorCode::forked.
  explicit Hold(std::shared_ptr<Context> context) : context_(std::move(context)) {
    context_->begin_session(true);
  }
  ~Hold() { context_->end_session(); }
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;

 private:
  std::shared_ptr<Context> context_;
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
// Another thread has taken back an entry of this one, whose stream is still to be switched back.
extern thread_local constinit std::atomic<bool> stream_is_stale
    __attribute__((tls_model("initial-exec")));
void switch_stream_back();
}  // namespace detail

// The calling thread's context, null outside of sessions. Valid until the session is left.
inline Context* current_context() {
  return detail::current_context.load(std::memory_order_relaxed);
}

// To be called where the thread's stream is about to matter.
inline void mend_stream() {
  if (detail::stream_is_stale.load(std::memory_order_relaxed)) [[unlikely]]
    detail::switch_stream_back();
}

}  // namespace pgk
