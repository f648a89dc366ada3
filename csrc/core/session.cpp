#include "core/session.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <utility>

#include "core/error.h"
#include "core/thread_entries.h"

namespace pgk {

using detail::registry;
using detail::this_process;
using detail::thread_entries;
using detail::ThreadEntries;
using detail::WayBack;

Session::Session(std::shared_ptr<Context> context, bool ordered, bool keeps_active)
    : context_(std::move(context)),
      ordered_(ordered),
      keeps_active_(keeps_active),
      id_(registry().next_session.fetch_add(1, std::memory_order_relaxed)),
      process_(this_process()) {}

Session::~Session() {
  if (entries_.load() == 0 || process_ != this_process()) return;
  std::uint32_t left = 0;
  {
    const std::lock_guard lock(registry().mutex);
    for (ThreadEntries* thread : registry().threads) {
      while (thread->take_back(id_)) ++left;
    }
  }
  for (; left > 0 && keeps_active_; --left) context_->end_session();
}

void Session::enter() {
  ThreadEntries& own = thread_entries();
  mend_stream();
  context_->begin_session(keeps_active_);
  try {
    begin();
    own.push({.session = id_, .context = context_, .keeps_active = keeps_active_});
    entries_.fetch_add(1, std::memory_order_relaxed);
  } catch (...) {
    if (keeps_active_) context_->end_session();
    throw;
  }
}

void Session::exit() {
  mend_stream();
  std::exception_ptr failure;
  try {
    if (is_entered_here()) finish();
  } catch (const Error&) {
    failure = std::current_exception();
  }
  leave();
  if (failure) std::rethrow_exception(failure);
}

void Session::leave() {
  ThreadEntries& own = thread_entries();
  mend_stream();
  bool here = false;
  WayBack back;
  {
    const std::lock_guard lock(own.mutex);
    if (const auto entry = own.find(id_); entry != own.stack.end()) {
      here = true;
      back = own.remove_own(entry);
    }
  }
  bool elsewhere = false;
  if (!here) {
    if (process_ != this_process()) return;
    const std::lock_guard lock(registry().mutex);
    const auto& threads = registry().threads;
    elsewhere = std::any_of(threads.begin(), threads.end(),
                            [this](ThreadEntries* other) { return other->take_back(id_); });
  }
  back.take();
  if (here || elsewhere) {
    entries_.fetch_sub(1, std::memory_order_relaxed);
    if (keeps_active_) context_->end_session();
  }
  if (here) return;
  throw Error(ErrorCode::session,
              "the session of context '" + context_->name() + "' was left in a thread that had " +
                  (elsewhere ? "not entered it; the thread that had is out of it now"
                             : "not entered it, and no other has"));
}

// Own entries come and go on this thread only, but for other threads that take them back.
bool Session::is_entered_here() const {
  ThreadEntries& own = thread_entries();
  const std::lock_guard lock(own.mutex);
  return own.find(id_) != own.stack.end();
}

void Session::begin() const {
  if (ThreadStreams* streams = context_->thread_streams()) streams->begin(*context_, ordered_);
}

bool Session::has_work() const {
  ThreadStreams* streams = context_->thread_streams();
  return ordered_ && streams != nullptr && ThreadStreams::has_work(*context_, context_->stream());
}

void Session::finish() const {
  ThreadStreams* streams = context_->thread_streams();
  if (ordered_ && streams != nullptr) streams->finish(*context_);
}

void Session::follow() const {
  ThreadStreams* streams = context_->thread_streams();
  if (ordered_ && streams != nullptr) streams->follow(*context_);
}

void Session::restore_stream(ThreadStreams::Saved stream) const {
  if (ThreadStreams* streams = context_->thread_streams()) {
    Context* outer = current_context();
    streams->leave(stream, outer == nullptr ? nullptr : outer->shared_from_this());
  }
}

}  // namespace pgk
