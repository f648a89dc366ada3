#include "core/thread_entries.h"

#include <algorithm>

namespace pgk {

namespace detail {
thread_local constinit std::atomic<Context*> current_context{nullptr};
thread_local constinit std::atomic<bool> stream_is_stale{false};

// Never destroyed: threads may end after static destructors have run.
Registry& registry() {
  static auto* instance = new Registry;
  return *instance;
}

ThreadEntries& thread_entries() {
  thread_local ThreadEntries entries;
  return entries;
}

void switch_stream_back() {
  ThreadEntries& own = thread_entries();
  WayBack back;
  {
    const std::lock_guard lock(own.mutex);
    back = std::exchange(own.stale, {});
    stream_is_stale.store(false, std::memory_order_relaxed);
  }
  back.take();
}

}  // namespace detail

using detail::Entry;
using detail::registry;
using detail::ThreadEntries;

SessionTicket::List tickets_of_thread() {
  ThreadEntries& own = detail::thread_entries();
  SessionTicket::List tickets;
  const std::lock_guard lock(own.mutex);
  for (const Entry& entry : own.stack) {
    if (entry.ticket) tickets.push_back(entry.ticket);
  }
  return tickets;
}

std::uint64_t this_thread_number() {
  return detail::thread_entries().number;
}

std::unordered_map<std::uint64_t, const Context*> contexts_of_threads() {
  std::unordered_map<std::uint64_t, const Context*> contexts;
  const std::lock_guard lock(registry().mutex);
  for (const ThreadEntries* thread : registry().threads) {
    contexts.emplace(thread->number, thread->current->load(std::memory_order_relaxed));
  }
  return contexts;
}

void lock_sessions() {
  registry().mutex.lock();
  for (ThreadEntries* thread : registry().threads) thread->mutex.lock();
}

void unlock_sessions() {
  for (ThreadEntries* thread : registry().threads) thread->mutex.unlock();
  registry().mutex.unlock();
}

void forget_sessions_in_child() {
  ++registry().forks;
  std::erase_if(registry().threads, [](ThreadEntries* thread) {
    return thread->current != &detail::current_context;  // of a thread that does not exist here
  });
  for (ThreadEntries* own : registry().threads) {
    const auto first = std::find_if(own->stack.begin(), own->stack.end(),
                                    [](const Entry& entry) { return entry.streams != nullptr; });
    if (first != own->stack.end()) first->streams->leave(first->before, nullptr);
    own->stack.clear();
    own->stale = {};
  }
  detail::stream_is_stale.store(false, std::memory_order_relaxed);
  detail::current_context.store(nullptr, std::memory_order_relaxed);
}

}  // namespace pgk
