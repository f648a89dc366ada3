// How much of the time streams are held while others are at work: a third of any five milliseconds.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <deque>

namespace pgk {

class CudaPace {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr std::size_t kKinds = 3;  // of holds that differ in how long they take

  // Of which kind the next hold is. When it may begin, if it takes as long as the last of its kind.
  Clock::time_point next(Clock::time_point now, std::size_t kind) {
    kind_ = kind;
    const Clock::duration expected = std::min(last_[kind], kMost);
    Clock::duration left = kMost - expected;
    // Of the latest ones, as many as leave room for another one may lie in the window.
    for (auto hold = holds_.rbegin(); hold != holds_.rend(); ++hold) {
      const Clock::duration taken = hold->end - hold->start;
      if (taken > left) return std::max(now, hold->start + (taken - left) + kWindow - expected);
      left -= taken;
    }
    return now;
  }
  void add(Clock::time_point start, Clock::time_point end) {
    while (!holds_.empty() && end - holds_.front().end >= kWindow) holds_.pop_front();
    holds_.push_back({start, end});
    last_[kind_] = end - start;
  }

 private:
  static constexpr Clock::duration kWindow = std::chrono::milliseconds(5);
  static constexpr Clock::duration kMost = kWindow / 3;

  struct Hold {
    Clock::time_point start;
    Clock::time_point end;
  };
  std::deque<Hold> holds_;  // those that may matter
  std::array<Clock::duration, kKinds> last_{kMost, kMost, kMost};
  std::size_t kind_ = 0;
};

}  // namespace pgk
