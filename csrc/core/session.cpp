#include "core/session.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <unordered_set>
#include <utility>

#include "core/error.h"

namespace pgk {

namespace detail {
thread_local constinit std::atomic<Context*> current_context{nullptr};
thread_local constinit std::atomic<bool> stream_is_stale{false};
}  // namespace detail

namespace {

struct Entry {
  std::uint64_t session = 0;
  std::shared_ptr<Context> context;
  bool keeps_active = true;
  ThreadStreams::Saved before = 0;  // the thread's stream, for contexts that switch it

  void begin() const { context->begin_session(keeps_active); }
  void end() const {
    if (keeps_active) context->end_session();
  }
};

// How a thread gets back the stream that it had before it entered a session.
struct WayBack {
  ThreadStreams* streams = nullptr;
  ThreadStreams::Saved saved = 0;
  std::shared_ptr<Context> outer;

  void take() const {
    if (streams != nullptr) streams->leave(saved, outer);
  }
};

struct ThreadEntries;

// One lock for all stacks: sessions are entered a few thousand times a second at most, and only
// the owner of a stack waits for nobody else in practice.
struct Registry {
  std::mutex mutex;
  std::unordered_set<ThreadEntries*> threads;
  std::uint64_t next_session = 1;
  std::uint64_t forks = 0;
};

// Never destroyed: threads may end after static destructors have run.
Registry& registry() {
  static auto* instance = new Registry;
  return *instance;
}

struct ThreadEntries {
  std::vector<Entry> stack;
  WayBack stale;  // where stream_is_stale
  std::atomic<Context*>* current = &detail::current_context;
  std::atomic<bool>* stream_is_stale = &detail::stream_is_stale;

  ThreadEntries() {
    const std::lock_guard lock(registry().mutex);
    registry().threads.insert(this);
  }
  // A thread that ends inside sessions leaves them.
  ~ThreadEntries() {
    std::vector<Entry> left;
    {
      const std::lock_guard lock(registry().mutex);
      registry().threads.erase(this);
      left.swap(stack);
    }
    // Destructors of other thread-locals may still allocate.
    current->store(nullptr, std::memory_order_relaxed);
    for (const Entry& entry : left) entry.end();
  }

  // With the registry's lock.
  auto find(std::uint64_t session) {
    const auto it = std::find_if(stack.rbegin(), stack.rend(),
                                 [=](const Entry& entry) { return entry.session == session; });
    return it == stack.rend() ? stack.end() : std::prev(it.base());
  }

  // With the registry's lock. What the thread has to do itself for its stream to follow.
  WayBack remove(std::vector<Entry>::iterator entry) {
    WayBack back;
    if (const auto above = std::next(entry); above != stack.end()) {
      above->before = entry->before;
      stack.erase(entry);
    } else {
      back.streams = entry->context->thread_streams();
      back.saved = entry->before;
      stack.pop_back();
      if (!stack.empty()) back.outer = stack.back().context;
    }
    current->store(stack.empty() ? nullptr : stack.back().context.get(), std::memory_order_relaxed);
    return back;
  }

  // The same by another thread.
  bool take_back(std::uint64_t session) {
    const auto entry = find(session);
    if (entry == stack.end()) return false;
    WayBack back = remove(entry);
    if (back.streams != nullptr) {
      stale = std::move(back);
      stream_is_stale->store(true, std::memory_order_relaxed);
    }
    return true;
  }
};

ThreadEntries& thread_entries() {
  thread_local ThreadEntries entries;
  return entries;
}

}  // namespace

void detail::switch_stream_back() {
  WayBack back;
  {
    const std::lock_guard lock(registry().mutex);
    back = std::exchange(thread_entries().stale, {});
    stream_is_stale.store(false, std::memory_order_relaxed);
  }
  back.take();
}

Session::Session(std::shared_ptr<Context> context, bool ordered, bool keeps_active)
    : context_(std::move(context)), ordered_(ordered), keeps_active_(keeps_active) {
  const std::lock_guard lock(registry().mutex);
  id_ = registry().next_session++;
  process_ = registry().forks;
}

Session::~Session() {
  std::uint32_t left = 0;
  {
    const std::lock_guard lock(registry().mutex);
    if (process_ != registry().forks) return;
    for (ThreadEntries* thread : registry().threads) {
      while (thread->take_back(id_)) ++left;
    }
  }
  for (; left > 0 && keeps_active_; --left) context_->end_session();
}

void Session::enter() {
  ThreadEntries& own = thread_entries();
  mend_stream();
  Entry entry{id_, context_, keeps_active_};
  entry.begin();
  try {
    if (ThreadStreams* streams = context_->thread_streams()) {
      entry.before = streams->enter(context_, ordered_);
    }
  } catch (...) {
    entry.end();
    throw;
  }
  const std::lock_guard lock(registry().mutex);
  if (own.stream_is_stale->exchange(false)) {
    // The session that was current on the way here has been taken back meanwhile.
    entry.before = std::exchange(own.stale, {}).saved;
  }
  own.stack.push_back(std::move(entry));
  own.current->store(context_.get(), std::memory_order_relaxed);
}

void Session::exit() {
  ThreadEntries& own = thread_entries();
  mend_stream();
  // Own entries come and go on this thread only, but for other threads that take them back.
  const auto is_here = [&] {
    const std::lock_guard lock(registry().mutex);
    return own.find(id_) != own.stack.end();
  };
  std::exception_ptr failure;
  if (ThreadStreams* streams = context_->thread_streams(); ordered_ && streams && is_here()) {
    try {
      streams->finish(*context_);
    } catch (const Error&) {
      failure = std::current_exception();
    }
  }
  bool here = false;
  bool elsewhere = false;
  WayBack back;
  {
    const std::lock_guard lock(registry().mutex);
    if (const auto entry = own.find(id_); entry != own.stack.end()) {
      here = true;
      back = own.remove(entry);
    } else {
      if (process_ != registry().forks) return;
      const auto& threads = registry().threads;
      elsewhere = std::any_of(threads.begin(), threads.end(),
                              [this](ThreadEntries* other) { return other->take_back(id_); });
    }
  }
  back.take();
  if ((here || elsewhere) && keeps_active_) context_->end_session();
  if (failure) std::rethrow_exception(failure);
  if (here) return;
  throw Error(ErrorCode::session,
              "the session of context '" + context_->name() + "' was left in a thread that had " +
                  (elsewhere ? "not entered it; the thread that had is out of it now"
                             : "not entered it, and no other has"));
}

void lock_sessions() {
  registry().mutex.lock();
}

void unlock_sessions() {
  registry().mutex.unlock();
}

void forget_sessions_in_child() {
  ++registry().forks;
  std::erase_if(registry().threads, [](ThreadEntries* thread) {
    thread->stack.clear();
    return thread->current != &detail::current_context;  // of a thread that does not exist here
  });
  detail::current_context.store(nullptr, std::memory_order_relaxed);
}

}  // namespace pgk
