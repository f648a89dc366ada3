#include "core/session.h"

#include <algorithm>
#include <mutex>
#include <unordered_set>
#include <utility>

#include "core/error.h"

namespace pgk {

namespace detail {
thread_local constinit std::atomic<Context*> current_context{nullptr};
}  // namespace detail

namespace {

struct Entry {
  std::uint64_t session;
  std::shared_ptr<Context> context;
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
  std::atomic<Context*>* current = &detail::current_context;

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
    for (const Entry& entry : left) entry.context->end_session();
  }

  // With the registry's lock.
  bool remove(std::uint64_t session) {
    const auto it = std::find_if(stack.rbegin(), stack.rend(),
                                 [=](const Entry& entry) { return entry.session == session; });
    if (it == stack.rend()) return false;
    stack.erase(std::next(it).base());
    current->store(stack.empty() ? nullptr : stack.back().context.get(), std::memory_order_relaxed);
    return true;
  }
};

ThreadEntries& thread_entries() {
  thread_local ThreadEntries entries;
  return entries;
}

}  // namespace

Session::Session(std::shared_ptr<Context> context) : context_(std::move(context)) {
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
      while (thread->remove(id_)) ++left;
    }
  }
  for (; left > 0; --left) context_->end_session();
}

void Session::enter() {
  ThreadEntries& own = thread_entries();
  context_->begin_session();
  const std::lock_guard lock(registry().mutex);
  own.stack.push_back({id_, context_});
  own.current->store(context_.get(), std::memory_order_relaxed);
}

void Session::exit() {
  ThreadEntries& own = thread_entries();
  bool here = false;
  bool elsewhere = false;
  {
    const std::lock_guard lock(registry().mutex);
    here = own.remove(id_);
    if (!here) {
      if (process_ != registry().forks) return;
      const auto& threads = registry().threads;
      elsewhere = std::any_of(threads.begin(), threads.end(),
                              [this](ThreadEntries* other) { return other->remove(id_); });
    }
  }
  if (here || elsewhere) context_->end_session();
  if (here) return;
  throw Error(ErrorCode::wrong_thread,
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
