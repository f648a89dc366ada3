// The streams on which work may use a device's memory. They come to be known as contexts make them
// and as whoever allocates, frees or announces a use names them; there is no way back, but for
// streams that have ceased to exist.
//
// Thread-safe, with a lock that is held over nothing: it may be taken while streams are held.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

namespace pgk {

using StreamId = std::uint64_t;

// Not a stream: memory that is asked for with it is idle, nobody's work may still use it. It is a
// segment, for others to divide, and lies in the range's upper zone.
inline constexpr StreamId kNoStream = 0;

class KnownStreams {
 public:
  void add(StreamId stream) {
    if (stream == kNoStream) return;
    // Whoever names a stream mostly names it again.
    thread_local struct {
      std::uint64_t version = 0;
      StreamId stream = kNoStream;
    } last;
    if (last.stream == stream && last.version == version_.load(std::memory_order_acquire)) return;
    const std::lock_guard lock(mutex_);
    const auto place = std::lower_bound(streams_.begin(), streams_.end(), stream);
    if (place == streams_.end() || *place != stream) streams_.insert(place, stream);
    last = {version_.load(std::memory_order_relaxed), stream};
  }
  void remove(StreamId stream) {
    const std::lock_guard lock(mutex_);
    version_.store(next_version(), std::memory_order_release);
    std::erase(streams_, stream);
  }
  std::vector<StreamId> all() const {
    const std::lock_guard lock(mutex_);
    return streams_;
  }

 private:
  // No two devices ever have the same.
  static std::uint64_t next_version() {
    static std::atomic<std::uint64_t> next{1};
    return next.fetch_add(1, std::memory_order_relaxed);
  }

  mutable std::mutex mutex_;
  std::vector<StreamId> streams_;                       // sorted
  std::atomic<std::uint64_t> version_{next_version()};  // another one whenever a stream goes
};

}  // namespace pgk
