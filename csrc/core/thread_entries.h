// The stacks of sessions and steps, one for each thread: what session.cpp and task_step.cpp work
// on.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_set>
#include <utility>
#include <vector>

#include "core/session.h"
#include "core/spin_lock.h"

namespace pgk::detail {

struct Entry {
  std::uint64_t session = 0;         // 0: a step's
  std::shared_ptr<Context> context;  // null: a step that stays in what the thread is in
  bool keeps_active = false;
  std::uint64_t step = 0;
  const void* variables = nullptr;
  ThreadStreams* streams = nullptr;  // null if it switched none
  ThreadStreams::Saved before = 0;   // the thread's stream, if it did
  std::shared_ptr<SessionTicket> ticket = nullptr;

  // Without a lock.
  void end() const {
    if (keeps_active) context->end_session();
    if (ticket) [[unlikely]]
      ticket->end();
  }
};

// How a thread gets back the stream that it had before an entry.
struct WayBack {
  ThreadStreams* streams = nullptr;
  ThreadStreams::Saved saved = 0;
  std::shared_ptr<Context> outer;

  void take() const {
    if (streams != nullptr) streams->leave(saved, outer);
  }
};

struct Removed {
  Entry entry;
  WayBack back;
};

struct ThreadEntries;

struct Registry {
  std::mutex mutex;  // before a thread's own
  std::unordered_set<ThreadEntries*> threads;
  std::atomic<std::uint64_t> next_session{1};
  std::atomic<std::uint64_t> next_thread{1};
  std::atomic<std::uint64_t> forks{0};
};

Registry& registry();

inline std::uint64_t this_process() {
  return registry().forks.load(std::memory_order_relaxed);
}

// Only its own thread adds entries; others may take some back.
struct ThreadEntries {
  SpinLock mutex;
  std::vector<Entry> stack;
  WayBack stale;  // where stream_is_stale
  std::uint64_t steps = 0;
  std::uint64_t number = registry().next_thread.fetch_add(1);  // an address could come again
  std::atomic<Context*>* current = &detail::current_context;
  std::atomic<bool>* stream_is_stale = &detail::stream_is_stale;

  ThreadEntries() {
    const std::lock_guard lock(registry().mutex);
    registry().threads.insert(this);
  }
  // A thread that ends inside sessions leaves them.
  ~ThreadEntries() {
    {
      const std::lock_guard lock(registry().mutex);
      registry().threads.erase(this);
    }
    // Destructors of other thread-locals may still allocate.
    current->store(nullptr, std::memory_order_relaxed);
    stream_is_stale->store(false, std::memory_order_relaxed);
    for (const Entry& entry : stack) entry.end();
  }

  // An empty entry if there is none.
  Entry innermost_step() {
    const std::lock_guard lock(mutex);
    const auto step = std::find_if(stack.rbegin(), stack.rend(),
                                   [](const Entry& entry) { return entry.step != 0; });
    return step == stack.rend() ? Entry{} : *step;
  }

  // 0 if what is on top is not a step's. There must be something.
  std::uint64_t top_step() {
    const std::lock_guard lock(mutex);
    return stack.back().step;
  }

  // With the lock, up to remove().

  std::shared_ptr<Context> innermost() const {
    const auto entry = std::find_if(stack.rbegin(), stack.rend(),
                                    [](const Entry& entry) { return entry.context != nullptr; });
    return entry == stack.rend() ? nullptr : entry->context;
  }

  void follow_stack() { current->store(innermost().get(), std::memory_order_relaxed); }

  auto find(std::uint64_t session) {
    const auto it = std::find_if(stack.rbegin(), stack.rend(),
                                 [=](const Entry& entry) { return entry.session == session; });
    return it == stack.rend() ? stack.end() : std::prev(it.base());
  }

  // The entry is still to be ended, and the thread has to take the way back itself.
  Removed remove(std::vector<Entry>::iterator entry) {
    Removed removed{std::move(*entry), {}};
    const Entry& gone = removed.entry;
    const auto above = std::find_if(std::next(entry), stack.end(), [&](const Entry& other) {
      return gone.streams != nullptr && other.streams == gone.streams;
    });
    const bool is_covered = above != stack.end();
    if (is_covered) above->before = gone.before;
    stack.erase(entry);
    follow_stack();
    if (!is_covered) removed.back = {gone.streams, gone.before, innermost()};
    return removed;
  }

  // The same by the thread itself, which takes the way back at once: an older one is void then.
  Removed remove_own(std::vector<Entry>::iterator entry) {
    Removed removed = remove(entry);
    if (removed.back.streams != nullptr) {
      stale = {};
      stream_is_stale->store(false, std::memory_order_relaxed);
    }
    return removed;
  }

  // The same by another thread. Only the entry is left to be ended.
  std::optional<Entry> take_back(std::uint64_t session) {
    const std::lock_guard lock(mutex);
    const auto entry = find(session);
    if (entry == stack.end()) return std::nullopt;
    Removed removed = remove(entry);
    if (removed.back.streams != nullptr) {
      stale = std::move(removed.back);
      stream_is_stale->store(true, std::memory_order_relaxed);
    }
    return std::move(removed.entry);
  }

  void push(Entry entry) {
    {
      const std::lock_guard lock(mutex);
      stack.reserve(stack.size() + 1);
    }
    if (entry.context) entry.streams = entry.context->thread_streams();
    if (entry.streams != nullptr) entry.before = entry.streams->enter(entry.context);
    const std::lock_guard lock(mutex);
    if (entry.streams != nullptr && stream_is_stale->exchange(false)) {
      // The session that was current on the way here has been taken back meanwhile.
      entry.before = std::exchange(stale, {}).saved;
    }
    if (entry.context) current->store(entry.context.get(), std::memory_order_relaxed);
    stack.push_back(std::move(entry));
  }

  // Takes the topmost entry off. There must be one.
  Entry pop() {
    mend_stream();
    Removed top;
    {
      const std::lock_guard lock(mutex);
      top = remove_own(std::prev(stack.end()));
    }
    top.back.take();
    top.entry.end();
    return std::move(top.entry);
  }
};

// The calling thread's.
ThreadEntries& thread_entries();

}  // namespace pgk::detail
