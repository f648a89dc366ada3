#include "core/context.h"

#include <utility>

#include "core/manager.h"

namespace pgk {

Context::Context(std::shared_ptr<Manager> manager, ContextSpec spec, Ledger::Id account,
                 std::size_t page_bytes, std::uint32_t page_count, Address address, StreamId stream)
    : arena_(page_bytes, page_count),
      address_(address),
      spec_(std::move(spec)),
      account_(account),
      stream_(stream),
      manager_(manager) {}

void Context::require_open() const {
  if (state_ == State::open) return;
  if (state_ == State::forked) {
    throw Error(ErrorCode::forked, "context '" + name() +
                                       "' belongs to the parent process; a forked child cannot "
                                       "use it (start the process with 'spawn' instead)");
  }
  throw Error(ErrorCode::context_destroyed, "context '" + name() + "' has been destroyed");
}

void* Context::allocate(std::size_t bytes) {
  if (bytes == 0) [[unlikely]] {
    throw Error(ErrorCode::invalid_value, "a block has at least one byte");
  }
  const std::size_t granules = bytes / kGranule + (bytes % kGranule != 0);
  if (granules < Arena::kNone) [[likely]] {
    const std::lock_guard lock(mutex_);
    if (state_ != State::open) [[unlikely]]
      require_open();
    const std::uint32_t start = arena_.allocate(static_cast<std::uint32_t>(granules));
    if (start != Arena::kNone) [[likely]] {
      ++counters_.allocations;
      return reinterpret_cast<void*>(address_ + start * kGranule);
    }
  }
  const auto manager = manager_.lock();
  if (!manager) throw Error(ErrorCode::context_destroyed, "context '" + name() + "' has no device");
  return manager->allocate_slow(*this, bytes);
}

void Context::free(void* pointer) {
  std::shared_ptr<Manager> manager;
  const std::uint64_t id = account_;
  {
    const std::lock_guard lock(mutex_);
    if (state_ == State::forked) return;
    const Address offset = reinterpret_cast<Address>(pointer) - address_;
    const std::uint32_t start = offset % kGranule == 0 && offset / kGranule < Arena::kNone
                                    ? static_cast<std::uint32_t>(offset / kGranule)
                                    : Arena::kNone;
    arena_.release(start);
    ++counters_.frees;
    if (state_ == State::orphan) [[unlikely]]
      manager = manager_of_orphan_;
  }
  if (manager) [[unlikely]]
    manager->collect_orphan(id);
}

std::size_t Context::block_bytes(const void* pointer) const {
  const std::lock_guard lock(mutex_);
  const Address offset = reinterpret_cast<Address>(pointer) - address_;
  if (offset % kGranule != 0 || offset / kGranule >= Arena::kNone) return 0;
  return arena_.live_granules(static_cast<std::uint32_t>(offset / kGranule)) * kGranule;
}

void Context::begin_session() {
  const std::lock_guard lock(mutex_);
  require_open();
  ++sessions_;
}

void Context::end_session() {
  const std::lock_guard lock(mutex_);
  --sessions_;
}

std::size_t Context::used_bytes() const {
  const std::lock_guard lock(mutex_);
  return arena_.used_bytes();
}

std::size_t Context::resident_bytes() const {
  const std::lock_guard lock(mutex_);
  return arena_.resident_pages() * arena_.page_bytes();
}

bool Context::is_destroyed() const {
  const std::lock_guard lock(mutex_);
  return state_ == State::orphan;
}

std::uint32_t Context::sessions() const {
  const std::lock_guard lock(mutex_);
  return sessions_;
}

Context::Counters Context::counters() const {
  const std::lock_guard lock(mutex_);
  return counters_;
}

void Context::reset_peak() {
  const std::lock_guard lock(mutex_);
  arena_.reset_peak();
}

}  // namespace pgk
