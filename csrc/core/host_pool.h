// Host memory for evicted pages, up to a limit. Making it can take a fifth of a second for each
// gibibyte, since it is pinned; so it is kept, and made ahead of need by a thread of its own.
//
// Thread-safe, with a lock that is never held while the device makes or releases memory.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "device/device.h"

namespace pgk {

class HostPool {
 public:
  // Handles by size.
  using Counts = std::map<std::size_t, std::size_t>;

  HostPool(std::shared_ptr<Device> device, std::size_t limit);
  // What was not given back stays as it is.
  ~HostPool();

  // Nothing if the limit does not allow another one. Throws ErrorCode::device.
  std::optional<Handle> take(std::size_t bytes);
  void give_back(Handle handle);

  // How many of each size should exist. They are made in the background; what is beyond that and
  // not taken is released now.
  void aim_for(Counts counts);
  // From then on they are only made by whoever takes them. Waits for the one being made.
  void stop_making_ahead();

  std::size_t limit() const { return limit_; }
  std::size_t existing_bytes() const;
  std::size_t taken_bytes() const;

  // Around a fork. The child has no thread, and the memory is its parent's.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }
  void forget_in_child();

 private:
  struct Shelf {
    std::vector<Handle> handles;  // not taken
    std::size_t existing = 0;
    std::size_t wanted = 0;
  };

  std::optional<Handle> make(std::size_t bytes, std::unique_lock<std::mutex>& lock);
  bool release_one(std::size_t except, std::unique_lock<std::mutex>& lock);
  void make_ahead();

  std::shared_ptr<Device> device_;
  const std::size_t limit_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::size_t, Shelf> shelves_;
  std::size_t existing_bytes_ = 0;
  std::size_t making_bytes_ = 0;  // of these, what the device has not made yet
  bool behind_ = false;           // there is something to be made ahead
  bool ends_ = false;
  std::thread thread_;
};

}  // namespace pgk
