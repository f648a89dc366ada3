// Which context the calling thread works in.
//
// Every thread has a stack of entries; the top one is current. Most are entered sessions. A session
// object may be entered many times and by many threads. Leaving takes the thread's topmost entry of
// that session out of the stack, so sessions that end out of order (two suspended generators, say)
// leave the others as they were.
//
// Where many tasks take turns on one thread, sessions belong to tasks: an entry of a TaskEntry
// lasts as long as its task likes, and each step of a task is a Step on the thread's stack.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>

#include "core/context.h"
#include "core/thread_streams.h"

namespace pgk {

class Session {
 public:
  // An ordered session hands over at its borders: see ThreadStreams::begin(), and leaving waits
  // until the context's stream is done. One that does not keep its context active lets it be
  // destroyed while it is entered.
  explicit Session(std::shared_ptr<Context> context, bool ordered = true, bool keeps_active = true);
  // Leaves wherever it is still entered.
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // `ticket` is what the context's gates have let in, and is ended when the entry is. Throws
  // ErrorCode::context_destroyed, ::forked, ::session or ::device; the thread is then where it was.
  void enter(std::shared_ptr<SessionTicket> ticket = nullptr);
  // Throws ErrorCode::session if the calling thread has not entered this session: if another one
  // has, its entry is taken back, so that it does not stay in a context it has left. Throws
  // ErrorCode::device if the work failed; the session is left all the same.
  // In a forked child it does nothing: no session survives a fork.
  void exit();
  // As exit(), without waiting for the work.
  void leave();

  bool is_entered_here() const;
  Context& context() const { return *context_; }

  // What enter() and exit() do on the device, for tasks: see ThreadStreams. If the session is not
  // ordered, only begin() does something: it refuses to enter in the middle of a capture.
  void begin() const;
  bool has_work() const;
  void finish() const;
  void follow() const;
  // Makes it the calling thread's stream, after the session was left.
  void restore_stream(ThreadStreams::Saved stream) const;

 private:
  std::shared_ptr<Context> context_;
  bool ordered_;
  bool keeps_active_;
  std::atomic<int> entries_{0};
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
  // Null where that would wait or refuse.
  static std::unique_ptr<Hold> take_if_ready(std::shared_ptr<Context> context) {
    if (!context->try_begin_session(true)) return nullptr;
    return std::unique_ptr<Hold>(new Hold(std::move(context), Begun{}));
  }
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;

 private:
  struct Begun {};
  Hold(std::shared_ptr<Context> context, Begun /*begun*/) : context_(std::move(context)) {}

  std::shared_ptr<Context> context_;
};

// That a task is in a context, whether or not it runs at the moment. Keeps the context active until
// it is closed.
class TaskEntry {
 public:
  // Throws ErrorCode::context_destroyed or ErrorCode::forked. `task` and `variables` say who
  // entered, and where that is noted; only their identities matter. `ticket` as for a Session.
  explicit TaskEntry(std::shared_ptr<Context> context, const void* task = nullptr,
                     const void* variables = nullptr,
                     std::shared_ptr<SessionTicket> ticket = nullptr);
  ~TaskEntry() { close(); }
  TaskEntry(const TaskEntry&) = delete;
  TaskEntry& operator=(const TaskEntry&) = delete;

  // False if it was closed already. From any thread.
  bool close();
  // Not after close(), nor in another thread than that which made it, nor in a forked child.
  bool is_open_here() const;
  const void* task() const { return task_; }
  const void* variables() const { return variables_; }
  const std::shared_ptr<Context>& context() const { return context_; }
  const std::shared_ptr<SessionTicket>& ticket() const { return ticket_; }

 private:
  std::shared_ptr<Context> context_;
  const void* task_;
  const void* variables_;
  std::shared_ptr<SessionTicket> ticket_;
  std::atomic<bool> open_{true};
  std::uint64_t thread_;
  std::uint64_t process_;
};

// One step of a task: from here to the end of the scope the thread works in the task's context,
// then again in what it was in. What is entered within and not left is left then.
class Step {
 public:
  // Without a context the thread stays in what it is in. `variables`, the task's, are how the step
  // is recognised.
  Step(const void* variables, std::shared_ptr<Context> context);
  ~Step();
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  // The number of the calling thread's innermost step if it has these variables, else 0.
  static std::uint64_t number(const void* variables);
  // Whether the calling thread is in one: what blocks it then holds up all tasks of its loop.
  static bool is_under_way();
  // The innermost step goes on in another context, or in what the thread was in. There must be one.
  // Returns what the thread's stream was if it is another one now, else 0.
  static ThreadStreams::Saved move_to(const std::shared_ptr<Context>& context);

 private:
  std::uint64_t number_;
};

// Those of the entries that the calling thread itself has.
SessionTicket::List tickets_of_thread();

// The calling thread's number, which no other has or gets.
std::uint64_t this_thread_number();
// The context that each thread works in, null for none, of all that live and have entered one.
std::unordered_map<std::uint64_t, const Context*> contexts_of_threads();

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
