#include "torch/fork_guard.h"

#include <pthread.h>

#include <mutex>
#include <utility>
#include <vector>

#include "core/refusal.h"
#include "core/session.h"
#include "core/session_queue.h"

namespace pgk {
namespace {

// Those of one kind that live, and during a fork are locked.
template <typename T>
struct Watched {
  std::vector<std::weak_ptr<T>> known;
  std::vector<std::shared_ptr<T>> locked;  // between the handlers of one fork

  void add(const std::shared_ptr<T>& one) {
    std::erase_if(known, [](const auto& other) { return other.expired(); });
    known.push_back(one);
  }
  void lock() {
    for (const auto& one : known) {
      if (auto alive = one.lock()) locked.push_back(std::move(alive));
    }
    for (const auto& one : locked) one->lock_all();
  }
  void unlock() {
    for (const auto& one : locked) one->unlock_all();
  }
  void detach() {
    for (const auto& one : locked) one->detach_in_child();
  }
};

struct Guard {
  std::mutex mutex;
  Watched<Manager> managers;
  Watched<MemoryPool> pools;
};

Guard& guard() {
  static auto* instance = new Guard;
  return *instance;
}

void before_fork() {
  guard().mutex.lock();
  lock_sessions();
  guard().managers.lock();
  guard().pools.lock();
  lock_session_queue();
  Refusals::lock();
}

void unlock() {
  Refusals::unlock();
  unlock_session_queue();
  guard().pools.unlock();
  guard().managers.unlock();
  unlock_sessions();
}

void after_fork_in_parent() {
  unlock();
  // The last reference may be ours: dropping it outside of the lock lets a destructor do as it
  // likes.
  const auto managers = std::exchange(guard().managers.locked, {});
  const auto pools = std::exchange(guard().pools.locked, {});
  guard().mutex.unlock();
}

void after_fork_in_child() {
  guard().managers.detach();
  guard().pools.detach();
  forget_sessions_in_child();
  unlock();
  guard().managers.locked.clear();
  guard().pools.locked.clear();
  guard().mutex.unlock();
}

std::unique_lock<std::mutex> handle_forks_and_lock() {
  static std::once_flag once;
  std::call_once(once,
                 [] { ::pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child); });
  return std::unique_lock(guard().mutex);
}

}  // namespace

void guard_forks(const std::shared_ptr<Manager>& manager) {
  const auto lock = handle_forks_and_lock();
  guard().managers.add(manager);
}

void guard_pool_forks(const std::shared_ptr<MemoryPool>& pool) {
  const auto lock = handle_forks_and_lock();
  guard().pools.add(pool);
}

}  // namespace pgk
