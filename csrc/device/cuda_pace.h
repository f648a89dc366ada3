// How much of the time streams are held while others are at work: a third of any five milliseconds.
#pragma once

#include <algorithm>
#include <chrono>
#include <deque>

namespace pgk {

class CudaPace {
 public:
  using Clock = std::chrono::steady_clock;

  // When a hold that takes as long as the last one may begin.
  Clock::time_point next(Clock::time_point now) const {
    Clock::duration left = kMost - std::min(last_, kMost);
    // Of the latest ones, as many as leave room for another one may lie in the window.
    for (auto hold = holds_.rbegin(); hold != holds_.rend(); ++hold) {
      const Clock::duration taken = hold->end - hold->start;
      if (taken > left) return hold->start + (taken - left) + kWindow - std::min(last_, kMost);
      left -= taken;
    }
    return now;
  }
  void add(Clock::time_point start, Clock::time_point end) {
    while (!holds_.empty() && end - holds_.front().end >= kWindow) holds_.pop_front();
    holds_.push_back({start, end});
    last_ = end - start;
  }

 private:
  static constexpr Clock::duration kWindow = std::chrono::milliseconds(5);
  static constexpr Clock::duration kMost = kWindow / 3;

  struct Hold {
    Clock::time_point start;
    Clock::time_point end;
  };
  std::deque<Hold> holds_;  // those that may matter
  Clock::duration last_{};
};

}  // namespace pgk
