#include "core/host_pool.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <utility>

#include "core/error.h"

namespace pgk {

HostPool::HostPool(std::shared_ptr<Device> device, std::size_t limit)
    : device_(std::move(device)), limit_(limit) {}

HostPool::~HostPool() {
  stop_making_ahead();
  for (auto& [bytes, shelf] : shelves_) {
    for (const Handle& handle : shelf.handles) {
      try {
        device_->release(handle);
      } catch (const Error&) {
        // The process keeps it; nobody is left to try again.
      }
    }
  }
}

void HostPool::stop_making_ahead() {
  {
    const std::lock_guard lock(mutex_);
    ends_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

std::optional<Handle> HostPool::take(std::size_t bytes) {
  std::unique_lock lock(mutex_);
  Shelf& shelf = shelves_[bytes];
  if (shelf.handles.empty()) return make(bytes, lock);
  const Handle handle = shelf.handles.back();
  shelf.handles.pop_back();
  return handle;
}

std::optional<Handle> HostPool::make(std::size_t bytes, std::unique_lock<std::mutex>& lock) {
  while (existing_bytes_ + bytes > limit_) {
    if (!release_one(bytes, lock)) return std::nullopt;
  }
  Shelf& shelf = shelves_[bytes];
  existing_bytes_ += bytes;
  making_bytes_ += bytes;
  ++shelf.existing;
  lock.unlock();
  try {
    const Handle handle = device_->create_host(bytes);
    lock.lock();
    making_bytes_ -= bytes;
    return handle;
  } catch (...) {
    lock.lock();
    making_bytes_ -= bytes;
    existing_bytes_ -= bytes;
    --shelf.existing;
    throw;
  }
}

// One that is not taken, of another size. False if there is none, or the device refuses.
bool HostPool::release_one(std::size_t except, std::unique_lock<std::mutex>& lock) {
  for (auto& [bytes, shelf] : shelves_) {
    if (bytes == except || shelf.handles.empty()) continue;
    const Handle handle = shelf.handles.back();
    shelf.handles.pop_back();
    lock.unlock();
    bool released = true;
    try {
      device_->release(handle);
    } catch (const Error&) {
      released = false;
    }
    lock.lock();
    if (!released) {
      shelf.handles.push_back(handle);
      return false;
    }
    --shelf.existing;
    existing_bytes_ -= bytes;
    return true;
  }
  return false;
}

void HostPool::give_back(Handle handle) {
  const std::lock_guard lock(mutex_);
  shelves_[handle.bytes].handles.push_back(handle);
}

void HostPool::aim_for(Counts counts) {
  std::unique_lock lock(mutex_);
  for (auto& [bytes, shelf] : shelves_) shelf.wanted = 0;
  std::size_t allowed = limit_;
  for (const auto& [bytes, count] : counts) {
    Shelf& shelf = shelves_[bytes];
    shelf.wanted = std::min(count, allowed / bytes);
    allowed -= shelf.wanted * bytes;
  }
  std::vector<Handle> surplus;
  for (auto& [bytes, shelf] : shelves_) {
    while (shelf.existing > shelf.wanted && !shelf.handles.empty()) {
      surplus.push_back(shelf.handles.back());
      shelf.handles.pop_back();
      --shelf.existing;
      existing_bytes_ -= bytes;
    }
  }
  // Memory that is made when it is touched has no cost that could be paid ahead.
  behind_ = !device_->properties().is_host;
  if (behind_ && !ends_ && !thread_.joinable()) thread_ = std::thread(&HostPool::make_ahead, this);
  changed_.notify_all();
  lock.unlock();
  for (const Handle& handle : surplus) {
    try {
      device_->release(handle);
    } catch (const Error&) {
      lock.lock();
      ++shelves_[handle.bytes].existing;
      existing_bytes_ += handle.bytes;
      shelves_[handle.bytes].handles.push_back(handle);
      lock.unlock();
    }
  }
}

void HostPool::make_ahead() {
  std::unique_lock lock(mutex_);
  while (!ends_) {
    changed_.wait(lock, [this] { return behind_ || ends_; });
    bool made = false;
    for (auto& [bytes, shelf] : shelves_) {
      // Not at the cost of what others have made.
      if (ends_ || shelf.existing >= shelf.wanted || existing_bytes_ + bytes > limit_) continue;
      try {
        const std::optional<Handle> handle = make(bytes, lock);
        if (!handle) continue;
        shelf.handles.push_back(*handle);
        made = true;
      } catch (const std::exception&) {
        // Whoever needs it makes it himself, and hears why that fails.
      }
    }
    if (!made) behind_ = false;
  }
}

void HostPool::forget_in_child() {
  if (thread_.joinable()) thread_.detach();
  shelves_.clear();
  // The thread that waits there does not exist here, and a destructor would wait for it.
  std::construct_at(&changed_);
}

std::size_t HostPool::existing_bytes() const {
  const std::lock_guard lock(mutex_);
  return existing_bytes_;
}

std::size_t HostPool::taken_bytes() const {
  const std::lock_guard lock(mutex_);
  std::size_t bytes = existing_bytes_ - making_bytes_;
  for (const auto& [size, shelf] : shelves_) bytes -= size * shelf.handles.size();
  return bytes;
}

}  // namespace pgk
