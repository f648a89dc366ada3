#include "torch/fork_guard.h"

#include <pthread.h>

#include <mutex>
#include <vector>

#include "core/session.h"

namespace pgk {
namespace {

struct Guard {
  std::mutex mutex;
  std::vector<std::weak_ptr<Manager>> managers;
  std::vector<std::shared_ptr<Manager>> locked;  // between the handlers of one fork
};

Guard& guard() {
  static auto* instance = new Guard;
  return *instance;
}

void before_fork() {
  guard().mutex.lock();
  lock_sessions();
  for (const auto& manager : guard().managers) {
    if (auto alive = manager.lock()) guard().locked.push_back(std::move(alive));
  }
  for (const auto& manager : guard().locked) manager->lock_all();
}

void unlock() {
  for (const auto& manager : guard().locked) manager->unlock_all();
  unlock_sessions();
}

void after_fork_in_parent() {
  unlock();
  // The last reference may be ours: dropping it outside of the lock lets a manager's destructor
  // do as it likes.
  std::vector<std::shared_ptr<Manager>> done;
  done.swap(guard().locked);
  guard().mutex.unlock();
}

void after_fork_in_child() {
  for (const auto& manager : guard().locked) manager->detach_in_child();
  forget_sessions_in_child();
  unlock();
  guard().locked.clear();
  guard().mutex.unlock();
}

}  // namespace

void guard_forks(const std::shared_ptr<Manager>& manager) {
  static std::once_flag once;
  std::call_once(once,
                 [] { ::pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child); });
  const std::lock_guard lock(guard().mutex);
  std::erase_if(guard().managers, [](const auto& known) { return known.expired(); });
  guard().managers.push_back(manager);
}

}  // namespace pgk
