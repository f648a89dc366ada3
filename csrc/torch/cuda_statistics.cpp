#include "torch/cuda_statistics.h"

#include <algorithm>

namespace pgk {
namespace {

using c10::CachingAllocator::StatArray;
using c10::CachingAllocator::StatType;

std::int64_t number(std::size_t value) {
  return static_cast<std::int64_t>(value);
}

}  // namespace

void CudaStatistics::watch(const std::shared_ptr<Manager>& manager) {
  const std::lock_guard lock(mutex_);
  manager_ = manager;
  at_reset_ = {};
}

CudaStatistics::Flows CudaStatistics::flows(const Totals& totals) {
  const Context::Counters& counters = totals.counters;
  const std::int64_t segments_in = number(counters.segments_taken);
  const std::int64_t segments_out = number(counters.segments_returned);
  const std::int64_t bytes_in = number(counters.segment_bytes_taken);
  const std::int64_t bytes_out = number(counters.segment_bytes_returned);
  const std::int64_t allocated = number(counters.allocated_bytes);
  const std::int64_t created = number(totals.created);
  return {
      .blocks = {number(counters.allocations) - segments_in, number(counters.frees) - segments_out},
      .bytes = {allocated - bytes_in, allocated - number(totals.used) - bytes_out},
      .reserved = {created - bytes_in, created - number(totals.existing) - bytes_out},
      .pages = {number(counters.pages_mapped), number(counters.pages_unmapped)},
      .segments = {number(counters.pages_mapped) - segments_in,
                   number(counters.pages_unmapped) - segments_out},
      .refusals = number(counters.refusals),
  };
}

void CudaStatistics::add(StatArray& array, const Flow& now, const Flow& at_reset,
                         std::int64_t peak) {
  // Arenas do not divide small from large; the parts must add up to the whole.
  for (const StatType type : {StatType::AGGREGATE, StatType::LARGE_POOL}) {
    auto& stat = array[static_cast<std::size_t>(type)];
    stat.current += now.in - now.out;
    stat.peak = std::max(stat.current, stat.peak + peak);
    stat.allocated += now.in - at_reset.in;
    stat.freed += now.out - at_reset.out;
  }
}

void CudaStatistics::add_to(c10::CachingDeviceAllocator::DeviceStats& stats) const {
  const std::lock_guard lock(mutex_);
  const auto manager = manager_.lock();
  if (!manager) return;
  const Totals totals = manager->totals();
  const Flows now = flows(totals);
  const std::int64_t blocks = now.blocks.in - now.blocks.out;
  // Segments are in both sums of peaks, at least as many as there were at the least.
  const std::int64_t in_both = number(totals.least_segment_bytes);
  const std::int64_t peak = number(totals.peak) - in_both;
  add(stats.allocation, now.blocks, at_reset_.blocks, blocks);
  add(stats.active, now.blocks, at_reset_.blocks, blocks);
  add(stats.segment, now.segments, at_reset_.segments, now.segments.in - now.segments.out);
  add(stats.allocated_bytes, now.bytes, at_reset_.bytes, peak);
  add(stats.requested_bytes, now.bytes, at_reset_.bytes, peak);
  Flow active = now.bytes;
  active.out -= number(totals.fenced);
  add(stats.active_bytes, active, at_reset_.bytes, peak);
  add(stats.reserved_bytes, now.reserved, at_reset_.reserved,
      number(totals.existing_peak) - in_both);
  stats.num_ooms += now.refusals - at_reset_.refusals;
  stats.num_device_alloc += now.pages.in - at_reset_.pages.in;
  stats.num_device_free += now.pages.out - at_reset_.pages.out;
}

void CudaStatistics::reset_accumulated() {
  const std::lock_guard lock(mutex_);
  if (const auto manager = manager_.lock()) at_reset_ = flows(manager->totals());
}

}  // namespace pgk
