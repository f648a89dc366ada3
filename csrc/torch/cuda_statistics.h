// What torch's statistics say of contexts: native's figures and theirs in one, nothing counted
// twice.
#pragma once

#include <c10/core/CachingDeviceAllocator.h>

#include <memory>
#include <mutex>

#include "core/manager.h"

namespace pgk {

class CudaStatistics {
 public:
  void watch(const std::shared_ptr<Manager>& manager);
  // Adds the contexts' figures to native's, which hold the segments that contexts provide already.
  // Peaks are added up: exact as long as one of the parties works at a time, never below the peak
  // of the sum.
  void add_to(c10::CachingDeviceAllocator::DeviceStats& stats) const;
  void reset_accumulated();

 private:
  // What came and went since the beginning; the difference is what there is.
  struct Flow {
    std::int64_t in = 0;
    std::int64_t out = 0;
  };
  struct Flows {
    Flow blocks;
    Flow bytes;
    Flow active;        // bytes, what is fenced included
    Flow small_blocks;  // of these
    Flow small_bytes;
    Flow reserved;  // bytes
    Flow pages;
    Flow segments;  // pages, which stand for the segments that native lists as well
    Flow none;
    std::int64_t refusals = 0;
  };
  struct Peaks {
    std::int64_t all = 0;
    std::int64_t small = 0;
    std::int64_t large = 0;
  };
  static Flows flows(const Totals& totals);
  // `small` is a part of `all`; the rest is large. `away` is not on the device now.
  void add(c10::CachingAllocator::StatArray& array, const Flows& now, Flow Flows::* all,
           Flow Flows::* small, const Peaks& peaks, std::int64_t away = 0) const;

  mutable std::mutex mutex_;
  std::weak_ptr<Manager> manager_;
  Flows at_reset_;
};

}  // namespace pgk
