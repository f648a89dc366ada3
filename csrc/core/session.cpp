#include "core/session.h"

#include <exception>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/scope_exit.h"
#include "core/thread_entries.h"

namespace pgk {

using detail::Entry;
using detail::registry;
using detail::Removed;
using detail::this_process;
using detail::thread_entries;
using detail::ThreadEntries;

Session::Session(std::shared_ptr<Context> context, bool ordered, bool keeps_active)
    : context_(std::move(context)),
      ordered_(ordered),
      keeps_active_(keeps_active),
      id_(registry().next_session.fetch_add(1, std::memory_order_relaxed)),
      process_(this_process()) {}

Session::~Session() {
  if (entries_.load() == 0 || process_ != this_process()) return;
  std::vector<Entry> left;
  {
    const std::lock_guard lock(registry().mutex);
    for (ThreadEntries* thread : registry().threads) {
      while (auto entry = thread->take_back(id_)) left.push_back(std::move(*entry));
    }
  }
  for (const Entry& entry : left) entry.end();
}

void Session::enter(std::shared_ptr<SessionTicket> ticket) {
  ScopeExit give_back([&] {
    if (ticket) ticket->end();
  });
  ThreadEntries& own = thread_entries();
  mend_stream();
  context_->begin_session(keeps_active_);
  try {
    begin();
    own.push(
        {.session = id_, .context = context_, .keeps_active = keeps_active_, .ticket = ticket});
    entries_.fetch_add(1, std::memory_order_relaxed);
  } catch (...) {
    if (keeps_active_) context_->end_session();
    throw;
  }
  give_back.dismiss();
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
  std::optional<Removed> here;
  {
    const std::lock_guard lock(own.mutex);
    if (const auto entry = own.find(id_); entry != own.stack.end()) here = own.remove_own(entry);
  }
  if (here) {
    here->back.take();
    entries_.fetch_sub(1, std::memory_order_relaxed);
    here->entry.end();
    return;
  }
  if (process_ != this_process()) return;
  std::optional<Entry> elsewhere;
  {
    const std::lock_guard lock(registry().mutex);
    for (ThreadEntries* other : registry().threads) {
      if ((elsewhere = other->take_back(id_))) break;
    }
  }
  if (elsewhere) {
    entries_.fetch_sub(1, std::memory_order_relaxed);
    elsewhere->end();
  }
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
