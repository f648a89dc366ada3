#include "core/session.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <unordered_set>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/spin_lock.h"

namespace pgk {

namespace detail {
thread_local constinit std::atomic<Context*> current_context{nullptr};
thread_local constinit std::atomic<bool> stream_is_stale{false};
}  // namespace detail

namespace {

struct Entry {
  std::uint64_t session = 0;         // 0: a step's
  std::shared_ptr<Context> context;  // null: a step that stays in what the thread is in
  bool keeps_active = false;
  std::uint64_t step = 0;
  const void* variables = nullptr;
  ThreadStreams* streams = nullptr;  // null if it switched none
  ThreadStreams::Saved before = 0;   // the thread's stream, if it did

  void end() const {
    if (keeps_active) context->end_session();
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

struct ThreadEntries;

struct Registry {
  std::mutex mutex;  // before a thread's own
  std::unordered_set<ThreadEntries*> threads;
  std::atomic<std::uint64_t> next_session{1};
  std::atomic<std::uint64_t> next_thread{1};
  std::atomic<std::uint64_t> forks{0};
};

// Never destroyed: threads may end after static destructors have run.
Registry& registry() {
  static auto* instance = new Registry;
  return *instance;
}

std::uint64_t this_process() {
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

  // What the thread has to do itself for its stream to follow.
  WayBack remove(std::vector<Entry>::iterator entry) {
    const WayBack back{entry->streams, entry->before, nullptr};
    const auto above = std::find_if(std::next(entry), stack.end(), [&](const Entry& other) {
      return back.streams != nullptr && other.streams == back.streams;
    });
    const bool is_covered = above != stack.end();
    if (is_covered) above->before = back.saved;
    stack.erase(entry);
    follow_stack();
    if (is_covered) return {};
    return {back.streams, back.saved, innermost()};
  }

  // The same by the thread itself, which takes the way back at once: an older one is void then.
  WayBack remove_own(std::vector<Entry>::iterator entry) {
    WayBack back = remove(entry);
    if (back.streams != nullptr) {
      stale = {};
      stream_is_stale->store(false, std::memory_order_relaxed);
    }
    return back;
  }

  // The same by another thread.
  bool take_back(std::uint64_t session) {
    const std::lock_guard lock(mutex);
    const auto entry = find(session);
    if (entry == stack.end()) return false;
    WayBack back = remove(entry);
    if (back.streams != nullptr) {
      stale = std::move(back);
      stream_is_stale->store(true, std::memory_order_relaxed);
    }
    return true;
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
    Entry top;
    WayBack back;
    {
      const std::lock_guard lock(mutex);
      top = stack.back();
      back = remove_own(std::prev(stack.end()));
    }
    back.take();
    top.end();
    return top;
  }
};

ThreadEntries& thread_entries() {
  thread_local ThreadEntries entries;
  return entries;
}

}  // namespace

void detail::switch_stream_back() {
  ThreadEntries& own = thread_entries();
  WayBack back;
  {
    const std::lock_guard lock(own.mutex);
    back = std::exchange(own.stale, {});
    stream_is_stale.store(false, std::memory_order_relaxed);
  }
  back.take();
}

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

TaskEntry::TaskEntry(std::shared_ptr<Context> context, const void* task, const void* variables)
    : context_(std::move(context)),
      task_(task),
      variables_(variables),
      thread_(thread_entries().number),
      process_(this_process()) {
  context_->begin_session(true);
}

bool TaskEntry::close() {
  if (!open_.exchange(false)) return false;
  context_->end_session();
  return true;
}

bool TaskEntry::is_open_here() const {
  return open_.load(std::memory_order_relaxed) && thread_ == thread_entries().number &&
         process_ == this_process();
}

Step::Step(const void* variables, std::shared_ptr<Context> context) {
  ThreadEntries& own = thread_entries();
  mend_stream();
  number_ = ++own.steps;
  own.push({.context = std::move(context), .step = number_, .variables = variables});
}

Step::~Step() {
  ThreadEntries& own = thread_entries();
  // Gone in a forked child.
  if (own.innermost_step().step < number_) return;
  while (own.pop().step != number_) continue;
}

std::uint64_t Step::number(const void* variables) {
  const Entry step = thread_entries().innermost_step();
  return step.variables == variables ? step.step : 0;
}

ThreadStreams::Saved Step::move_to(const std::shared_ptr<Context>& context) {
  ThreadEntries& own = thread_entries();
  const std::uint64_t number = own.innermost_step().step;
  while (own.top_step() != number) own.pop();
  ThreadStreams* streams = context ? context->thread_streams() : nullptr;
  const ThreadStreams::Saved was = streams != nullptr ? streams->enter(context) : 0;
  WayBack back;
  {
    const std::lock_guard lock(own.mutex);
    Entry& step = own.stack.back();
    step.context = context;
    if (streams == nullptr) {
      back = {std::exchange(step.streams, nullptr), step.before, own.innermost()};
    } else if (step.streams == nullptr) {
      step.streams = streams;
      step.before = was;
    }
    own.follow_stack();
  }
  back.take();
  return was;
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
