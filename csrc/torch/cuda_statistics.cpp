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
      .active = {allocated - bytes_in,
                 allocated - number(totals.used) - bytes_out - number(totals.fenced)},
      .small_blocks = {number(counters.small_allocations), number(counters.small_frees)},
      .small_bytes = {number(counters.small_allocated_bytes), number(counters.small_freed_bytes)},
      .reserved = {created - bytes_in, created - number(totals.existing) - bytes_out},
      .pages = {number(counters.pages_mapped), number(counters.pages_unmapped)},
      .segments = {number(counters.pages_mapped) - segments_in,
                   number(counters.pages_unmapped) - segments_out},
      .none = {},
      .refusals = number(counters.refusals),
  };
}

void CudaStatistics::add(StatArray& array, const Flows& now, Flow Flows::* all, Flow Flows::* small,
                         const Peaks& peaks, std::int64_t away) const {
  const auto add_one = [&](StatType type, const Flow& flow, const Flow& before, std::int64_t peak,
                           std::int64_t not_here) {
    auto& stat = array[static_cast<std::size_t>(type)];
    stat.current += flow.in - flow.out - not_here;
    stat.peak = std::max(stat.current, stat.peak + peak);
    stat.allocated += flow.in - before.in;
    stat.freed += flow.out - before.out;
  };
  const auto less = [](const Flow& a, const Flow& b) { return Flow{a.in - b.in, a.out - b.out}; };
  const Flow large = less(now.*all, now.*small);
  const std::int64_t large_away = std::min(away, large.in - large.out);
  add_one(StatType::AGGREGATE, now.*all, at_reset_.*all, peaks.all, away);
  add_one(StatType::SMALL_POOL, now.*small, at_reset_.*small, peaks.small, away - large_away);
  add_one(StatType::LARGE_POOL, large, less(at_reset_.*all, at_reset_.*small), peaks.large,
          large_away);
}

void CudaStatistics::add_to(c10::CachingDeviceAllocator::DeviceStats& stats) const {
  const std::lock_guard lock(mutex_);
  const auto manager = manager_.lock();
  if (!manager) return;
  const Totals totals = manager->totals();
  const Flows now = flows(totals);
  // Segments are in both sums of peaks, at least as many as there were at the least.
  const std::int64_t in_both = number(totals.least_segment_bytes);
  const auto count = [](const Flow& flow) { return flow.in - flow.out; };
  const std::int64_t small = count(now.small_blocks);
  const Peaks blocks{count(now.blocks), small, count(now.blocks) - small};
  const Peaks bytes{number(std::min(totals.peak, totals.existing_peak)) - in_both,
                    number(totals.small_peak), number(totals.large_peak) - in_both};
  const auto all_large = [](std::int64_t peak) { return Peaks{peak, 0, peak}; };
  add(stats.allocation, now, &Flows::blocks, &Flows::small_blocks, blocks);
  add(stats.active, now, &Flows::blocks, &Flows::small_blocks, blocks);
  // So that what is allocated is never more than what is reserved: libraries subtract them.
  const auto within = [&](std::size_t away, const Flow& flow) {
    return std::min(number(away), std::max(count(flow), std::int64_t{0}));
  };
  const std::int64_t away = within(totals.used_away, now.bytes);
  add(stats.allocated_bytes, now, &Flows::bytes, &Flows::small_bytes, bytes, away);
  add(stats.requested_bytes, now, &Flows::bytes, &Flows::small_bytes, bytes, away);
  add(stats.active_bytes, now, &Flows::active, &Flows::small_bytes, bytes,
      within(totals.active_away, now.active));
  // Pages serve blocks of any size.
  add(stats.segment, now, &Flows::segments, &Flows::none, all_large(count(now.segments)));
  add(stats.reserved_bytes, now, &Flows::reserved, &Flows::none,
      all_large(number(totals.existing_peak) - in_both));
  stats.num_ooms += now.refusals - at_reset_.refusals;
  stats.num_device_alloc += now.pages.in - at_reset_.pages.in;
  stats.num_device_free += now.pages.out - at_reset_.pages.out;
}

void CudaStatistics::reset_accumulated() {
  const std::lock_guard lock(mutex_);
  if (const auto manager = manager_.lock()) at_reset_ = flows(manager->totals());
}

}  // namespace pgk
