#include "core/context.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "core/manager.h"

namespace pgk {

Context::Counters& Context::Counters::operator+=(const Counters& other) {
  allocations += other.allocations;
  frees += other.frees;
  growths += other.growths;
  refusals += other.refusals;
  pages_mapped += other.pages_mapped;
  pages_unmapped += other.pages_unmapped;
  allocated_bytes += other.allocated_bytes;
  small_allocations += other.small_allocations;
  small_frees += other.small_frees;
  small_allocated_bytes += other.small_allocated_bytes;
  small_freed_bytes += other.small_freed_bytes;
  segments_taken += other.segments_taken;
  segments_returned += other.segments_returned;
  segment_bytes_taken += other.segment_bytes_taken;
  segment_bytes_returned += other.segment_bytes_returned;
  evictions += other.evictions;
  restores += other.restores;
  bytes_out += other.bytes_out;
  bytes_in += other.bytes_in;
  pages_unchanged += other.pages_unchanged;
  move_nanoseconds += other.move_nanoseconds;
  return *this;
}

Context::Context(const std::shared_ptr<Manager>& manager, ContextSpec spec, Ledger::Id account,
                 std::size_t page_bytes, std::uint32_t page_count, std::uint32_t segment_pages,
                 Address address, StreamId stream, ProcessorSet processors)
    : budget_(spec.max),
      is_on_host_(manager->device()->properties().is_host),
      gate_(manager->compute_gate()),
      entrance_(spec.name, spec.tier, spec.max_sessions),
      arena_(page_bytes, page_count, page_count - segment_pages),
      address_(address),
      lanes_{stream},
      spec_(std::move(spec)),
      account_(account),
      stream_(stream),
      own_streams_{{stream, processors, false}},
      device_(manager->device()),
      thread_streams_(manager->thread_streams()),
      manager_(manager) {}

void Context::require_open() const {
  if (state_ == State::open || state_ == State::moving) return;
  if (state_ == State::forked) {
    throw Error(ErrorCode::forked, "context '" + name() +
                                       "' belongs to the parent process; a forked child cannot "
                                       "use it (start the process with 'spawn' instead)");
  }
  throw Error(ErrorCode::context_destroyed, "context '" + name() + "' has been destroyed");
}

std::optional<Arena::Lane> Context::find_lane(StreamId stream) const {
  for (std::size_t lane = 0; lane < lanes_.size(); ++lane) {
    if (lanes_[lane] == stream) return static_cast<Arena::Lane>(lane);
  }
  return std::nullopt;
}

Arena::Lane Context::lane_for(StreamId stream) {
  if (const auto lane = find_lane(stream)) return *lane;
  device_->announce(stream);
  const Arena::Lane lane = arena_.add_lane(stream == kNoStream);
  lanes_.push_back(stream);
  return lane;
}

void* Context::allocate_resident(std::size_t bytes, StreamId stream) {
  if (bytes == 0) [[unlikely]] {
    throw Error(ErrorCode::invalid_value, "a block has at least one byte");
  }
  const std::size_t granules = bytes / kGranule + (bytes % kGranule != 0);
  if (granules >= Arena::kNone) [[unlikely]]
    return nullptr;
  const std::lock_guard lock(mutex_);
  if (state_ != State::open) [[unlikely]] {
    require_open();
    return nullptr;
  }
  Arena::Lane lane = 0;
  if (stream != this->stream()) [[unlikely]] {
    const auto found = find_lane(stream);
    if (!found) return nullptr;
    lane = *found;
  }
  if (!fences_.empty()) [[unlikely]]
    settle_fence_of(static_cast<std::uint32_t>(granules));
  const std::uint32_t start = arena_.allocate(static_cast<std::uint32_t>(granules), lane);
  return start == Arena::kNone ? nullptr : finish_allocation(start, granules);
}

void* Context::try_allocate(std::size_t bytes, StreamId stream, Effort effort, std::string* said) {
  if (void* pointer = allocate_resident(bytes, stream)) return pointer;
  return manager()->allocate_slow(*this, bytes, stream, effort, said);
}

void* Context::allocate_or_refuse(std::size_t bytes, StreamId stream) {
  std::string said;
  if (void* pointer = manager()->allocate_slow(*this, bytes, stream, Effort::evict, &said)) {
    return pointer;
  }
  manager()->refuse(*this, bytes, said);
}

std::shared_ptr<Manager> Context::manager() const {
  auto manager = manager_.lock();
  if (!manager) throw Error(ErrorCode::context_destroyed, "context '" + name() + "' has no device");
  return manager;
}

void Context::free(void* pointer) {
  {
    const std::lock_guard lock(mutex_);
    if (state_ == State::open && uses_.empty()) [[likely]] {
      count_free(arena_.release(granule_of(pointer)));
      return;
    }
  }
  free_after(pointer, {});
}

void Context::free_after(void* pointer, std::span<const StreamId> streams) {
  free_by([&] {
    for (const StreamId stream : streams) device_->announce(stream);
    release(granule_of(pointer), streams);
  });
}

void Context::free_after(void* pointer, EventId event) {
  free_by([&] { release(granule_of(pointer), {}, event); });
}

template <typename Release>
void Context::free_by(const Release& release) {
  std::shared_ptr<Manager> manager;
  const std::uint64_t id = account_;
  {
    const std::lock_guard lock(mutex_);
    if (state_ == State::forked) return;
    release();
    if (state_ == State::orphan) manager = manager_of_orphan_;
  }
  if (manager) manager->collect_orphan(id);
}

// Fences -----------------------------------------------------------------------------------------

void Context::record_use(const void* pointer, StreamId stream) {
  {
    const std::lock_guard lock(mutex_);
    const std::uint32_t start = granule_of(pointer);
    if (state_ == State::forked || stream == kNoStream) return;
    device_->announce(stream);
    if (arena_.live_granules(start) != 0 && lanes_[arena_.lane_of(start)] != stream) {
      std::vector<StreamId>& uses = uses_[start];
      if (std::find(uses.begin(), uses.end(), stream) == uses.end()) uses.push_back(stream);
    }
  }
  if (is_moving()) [[unlikely]]
    if (const auto manager = manager_.lock()) manager->join(*this);
}

void Context::release(std::uint32_t start, std::span<const StreamId> streams,
                      std::optional<EventId> of_all) {
  if (arena_.live_granules(start) == 0) {
    arena_.release(start);  // says what is wrong
    return;
  }
  const StreamId own = lanes_[arena_.lane_of(start)];
  Fence fence{start, 0, {}};
  const auto add = [&](StreamId stream) {
    Fence::Point point{stream, 0};
    if (stream != own && !is_past(point)) fence.points.push_back(point);
  };
  if (const auto uses = uses_.find(start); uses != uses_.end()) {
    std::for_each(uses->second.begin(), uses->second.end(), add);
    uses_.erase(uses);
  }
  std::for_each(streams.begin(), streams.end(), add);
  if (of_all && !device_->is_done(*of_all)) fence.points.push_back({kNoStream, *of_all});
  if (fence.points.empty()) {
    count_free(arena_.release(start));
  } else {
    Fence& kept = fences_.emplace_back(std::move(fence));
    kept.granules = arena_.fence(start);
    count_free(kept.granules);
  }
}

// Whether the stream has done what it held when the point was first looked at. A device that
// fails here leaves the point to the next attempt.
bool Context::is_past(Fence::Point& point) {
  try {
    if (point.event == 0) {
      if (device_->is_capturing(point.stream)) return false;
      if (device_->is_idle(point.stream)) return true;
      point.event = device_->record(point.stream);
    }
    return device_->is_done(point.event);
  } catch (const Error&) {
    return false;
  }
}

// Returns whether any block came free.
bool Context::settle_fences() {
  const auto settled = std::erase_if(fences_, [this](Fence& fence) {
    std::erase_if(fence.points, [this](Fence::Point& point) { return is_past(point); });
    if (fence.points.empty()) arena_.unfence(fence.start);
    return fence.points.empty();
  });
  return settled > 0;
}

// One block of that size that has been passed, of few: whoever asks for one gets it back.
void Context::settle_fence_of(std::uint32_t granules) {
  const auto end = fences_.begin() + std::min<std::ptrdiff_t>(std::ssize(fences_), kFencesAsked);
  for (auto fence = fences_.begin(); fence != end; ++fence) {
    if (fence->granules != granules) continue;
    std::erase_if(fence->points, [this](Fence::Point& point) { return is_past(point); });
    if (!fence->points.empty()) continue;
    arena_.unfence(fence->start);
    // There may be many, and this is on the way of a hit.
    if (fence + 1 != fences_.end()) *fence = std::move(fences_.back());
    fences_.pop_back();
    return;
  }
}

// An event that memory of this context waits for.
std::optional<EventId> Context::awaited_event() const {
  for (const Retired& retired : retired_) return retired.event;
  for (const Fence& fence : fences_) {
    for (const Fence::Point& point : fence.points) {
      if (point.event != 0 && point.stream != kNoStream) return point.event;
    }
  }
  return std::nullopt;
}

// The same, where all streams have to pass.
std::optional<EventId> Context::event_of_all() const {
  for (const Fence& fence : fences_) {
    for (const Fence::Point& point : fence.points) {
      if (point.stream == kNoStream && point.event != 0) return point.event;
    }
  }
  return std::nullopt;
}

std::size_t Context::retired_bytes() const {
  std::size_t pages = 0;
  for (const Retired& retired : retired_) pages += retired.pages.count;
  return pages * arena_.page_bytes();
}

std::vector<std::uint32_t> Context::live_pages(bool evicted) const {
  std::vector<std::uint32_t> numbers;
  const std::vector<Arena::PageRun> idle = arena_.idle_runs();
  auto run = idle.begin();
  for (const auto& [number, page] : pages_) {
    while (run != idle.end() && run->first + run->count <= number) ++run;
    const bool is_idle = run != idle.end() && run->first <= number;
    if (page.handle.on_host == evicted && !is_idle) numbers.push_back(number);
  }
  return numbers;
}

std::size_t Context::idle_device_pages() const {
  std::size_t count = 0;
  for (const Arena::PageRun& run : arena_.idle_runs()) {
    count += run.count;
    auto page = evicted_pages_ == 0 ? pages_.end() : pages_.lower_bound(run.first);
    for (; page != pages_.end() && page->first < run.first + run.count; ++page) {
      count -= page->second.handle.on_host ? 1 : 0;
    }
  }
  return count;
}

const Context::OwnStream& Context::own_stream() const {
  return *std::find_if(own_streams_.begin(), own_streams_.end(),
                       [this](const OwnStream& own) { return own.id == stream_; });
}

std::vector<StreamId> Context::streams() const {
  const std::lock_guard lock(mutex_);
  std::vector<StreamId> streams;
  std::copy_if(lanes_.begin(), lanes_.end(), std::back_inserter(streams),
               [](StreamId stream) { return stream != kNoStream; });
  return streams;
}

// Figures ----------------------------------------------------------------------------------------

std::size_t Context::block_bytes(const void* pointer) const {
  const std::lock_guard lock(mutex_);
  return arena_.live_granules(granule_of(pointer)) * kGranule;
}

void Context::count_segment(const void* pointer, bool taken) {
  const std::lock_guard lock(mutex_);
  const std::size_t bytes = arena_.live_granules(granule_of(pointer)) * kGranule;
  if (taken) {
    ++counters_.segments_taken;
    counters_.segment_bytes_taken += bytes;
  } else {
    ++counters_.segments_returned;
    counters_.segment_bytes_returned += bytes;
    least_segment_bytes_ = std::min(least_segment_bytes_, counters_.segment_bytes());
  }
}

bool Context::try_begin_session(bool keeps_active) {
  std::uint32_t sessions = sessions_.load(std::memory_order_acquire);
  do {
    const bool is_idle = (sessions & kCount) == 0;
    if ((sessions & (kClosed | kMoving)) != 0 || (is_idle && (sessions & kDelayed) != 0)) {
      return false;
    }
  } while (keeps_active &&
           !sessions_.compare_exchange_weak(sessions, sessions + 1, std::memory_order_acq_rel));
  if (keeps_active) count_session();
  last_use_.store(next_use(), std::memory_order_relaxed);
  return true;
}

void Context::begin_session_slow(bool keeps_active) {
  {
    const std::lock_guard lock(mutex_);
    require_open();
  }
  manager()->admit(*this, keeps_active);
}

bool Context::close() {
  std::uint32_t sessions = sessions_.load(std::memory_order_acquire);
  do {
    if ((sessions & ~kDelayed) != 0) return false;
  } while (
      !sessions_.compare_exchange_weak(sessions, sessions | kClosed, std::memory_order_acq_rel));
  return true;
}

std::size_t Context::used_bytes() const {
  const std::lock_guard lock(mutex_);
  return arena_.used_bytes();
}

std::size_t Context::resident_bytes() const {
  const std::lock_guard lock(mutex_);
  return (arena_.resident_pages() - evicted_pages_) * arena_.page_bytes();
}

bool Context::is_destroyed() const {
  const std::lock_guard lock(mutex_);
  return state_ == State::orphan;
}

Context::Counters Context::counters() const {
  const std::lock_guard lock(mutex_);
  return counters_;
}

void Context::reset_peaks() {
  arena_.reset_peak();
  least_segment_bytes_ = counters_.segment_bytes();
  small_peak_ = counters_.small_bytes();
  large_peak_ = arena_.used_bytes() - small_peak_;
}

}  // namespace pgk
