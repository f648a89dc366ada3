#include "core/memory_pool.h"

#include <algorithm>
#include <bit>
#include <iterator>
#include <new>
#include <utility>

#include "core/error.h"
#include "core/scope_exit.h"

namespace pgk {

std::shared_ptr<MemoryPool> MemoryPool::make(std::size_t quota, bool enable_eviction,
                                             std::shared_ptr<Device> device) {
  const Device::Properties& properties = device->properties();
  if (quota == 0 || quota > properties.capacity) {
    throw Error(ErrorCode::invalid_value,
                "memory pool: a quota of " + format_bytes(quota) + " is not between 1 B and the " +
                    format_bytes(properties.capacity) + " of device '" + properties.name + "'");
  }
  return std::shared_ptr<MemoryPool>(new MemoryPool(quota, enable_eviction, std::move(device)));
}

MemoryPool::MemoryPool(std::size_t quota, bool enable_eviction, std::shared_ptr<Device> device)
    : quota_(quota),
      enable_eviction_(enable_eviction),
      device_(std::move(device)),
      handles_(*device_),
      arena_(device_->properties().granularity,
             static_cast<std::uint32_t>(kRangePerQuota *
                                        round_up(quota, device_->properties().granularity) /
                                        device_->properties().granularity)) {
  const std::size_t range = arena_.page_count() * arena_.page_bytes();
  address_ = device_->reserve(range, arena_.page_bytes());
  ScopeExit unreserve([&] { device_->unreserve(address_, range); });
  stream_ = device_->create_stream(0);
  unreserve.dismiss();
}

MemoryPool::~MemoryPool() {
  if (forked_) return;  // the physical memory is the parent's
  // There is no later occasion: what fails is tried once more, and else left to the device.
  const auto done = [](const auto& step) {
    for (int attempt = 0; attempt < 2; ++attempt) {
      try {
        step();
        return true;
      } catch (const Error&) {
      }
    }
    return false;
  };
  // Work that may use the memory could not be awaited: it must stay.
  if (!done([&] { device_->synchronize(); })) return;
  done([&] { device_->destroy_stream(stream_); });
  std::erase_if(mapped_, [&](const auto& entry) {
    const auto& [page, handle] = entry;
    if (!done([&] { device_->unmap(address_ + page * arena_.page_bytes(), handle); })) return false;
    handles_.give_back(handle);
    return true;
  });
  handles_.trim();
  handles_.trim();  // for the one that the device may have refused
  if (mapped_.empty()) {
    done([&] { device_->unreserve(address_, arena_.page_count() * arena_.page_bytes()); });
  }
}

// Four classes to each power of two, none finer than a granule, and none beyond the quota.
std::size_t MemoryPool::class_of(std::size_t size) const {
  const std::size_t largest = quota_ / kGranule * kGranule;
  const std::size_t rounded = round_up(size, std::max(kGranule, std::bit_ceil(size) / 8));
  return size <= largest ? std::min(rounded, largest) : rounded;
}

// What callers do with blocks --------------------------------------------------------------------

void MemoryPool::require_usable() const {
  if (forked_) {
    throw Error(ErrorCode::forked,
                "this process is a forked child of the one that made the memory pool, and cannot "
                "use it");
  }
}

MemoryPool::Block& MemoryPool::find(Id id) const {
  require_usable();
  const auto entry = blocks_.find(id);
  if (entry == blocks_.end()) {
    throw Error(ErrorCode::invalid_value,
                "memory pool: block " + std::to_string(id) + " was freed already");
  }
  return *entry->second;
}

MemoryPool::Id MemoryPool::allocate(std::size_t size) {
  if (size == 0) {
    throw Error(ErrorCode::invalid_value, "memory pool: size must be positive, got 0");
  }
  auto block = std::make_unique<Block>();
  const std::lock_guard lock(mutex_);
  require_usable();
  settle();
  block->size = size;
  if (size > quota_) refuse(*block, 0);
  block->bytes = class_of(size);
  block->start = obtain(*block);
  block->id = next_id_++;
  use(*block);
  allocated_bytes_ += size;
  ++allocation_count_;
  const Id id = block->id;
  blocks_.emplace(id, std::move(block));
  return id;
}

void MemoryPool::free(Id id) {
  const std::lock_guard lock(mutex_);
  find(id);
  free_block(std::move(blocks_.extract(id).mapped()));
}

void MemoryPool::free_block(std::unique_ptr<Block> block) {
  allocated_bytes_ -= block->size;
  if (block->is_evicted()) {
    evicted_bytes_ -= block->size;
    return;
  }
  by_use_.erase(block->last_use);
  if (block->is_pinned()) {
    leaving_.push_back(std::move(block));
  } else {
    give_back(block->start, block->bytes);
  }
}

// Takes in what was freed while it was pinned, and is no longer.
void MemoryPool::settle() {
  std::erase_if(leaving_, [&](const std::unique_ptr<Block>& block) {
    if (block->is_pinned()) return false;
    give_back(block->start, block->bytes);
    return true;
  });
}

void MemoryPool::touch(Id id) {
  const std::lock_guard lock(mutex_);
  Block& block = find(id);
  if (!block.is_evicted()) use(block);
}

void MemoryPool::use(Block& block) {
  by_use_.erase(block.last_use);
  block.last_use = ++clock_;
  by_use_.emplace(block.last_use, &block);
}

void MemoryPool::evict(Id id) {
  const std::lock_guard lock(mutex_);
  Block& block = find(id);
  if (block.is_evicted()) return;
  if (block.is_pinned()) {
    throw Error(ErrorCode::invalid_value, "memory pool: block " + std::to_string(id) +
                                              " cannot be evicted as long as a tensor uses it");
  }
  evict_all({&block});
  drop(free_lists_.find(block.bytes));
  trim();
}

void MemoryPool::restore(Id id) {
  const std::lock_guard lock(mutex_);
  settle();
  bring_back(find(id));
}

void MemoryPool::bring_back(Block& block) {
  if (block.is_evicted()) {
    const std::uint32_t start = obtain(block);
    ScopeExit undo([&] { give_back(start, block.bytes); });
    transfer(address_ + start * kGranule, reinterpret_cast<Address>(block.backup.get()),
             block.size);
    undo.dismiss();
    block.start = start;
    block.backup.reset();
    evicted_bytes_ -= block.size;
  }
  use(block);
}

std::shared_ptr<MemoryPool::Pin> MemoryPool::pin(Id id) {
  const std::lock_guard lock(mutex_);
  settle();
  Block& block = find(id);
  bring_back(block);
  return std::make_shared<Pin>(shared_from_this(), block);
}

MemoryPool::Pin::Pin(std::shared_ptr<MemoryPool> pool, Block& block)
    : pool_(std::move(pool)), block_(block), address_(pool_->place_of(block)), size_(block.size) {
  block_.pins.fetch_add(1, std::memory_order_relaxed);
}

void MemoryPool::clear() {
  const std::lock_guard lock(mutex_);
  require_usable();
  settle();
  for (auto& [id, block] : std::exchange(blocks_, {})) free_block(std::move(block));
  drop_all();
  trim();
}

std::size_t MemoryPool::size_of(Id id) const {
  const std::lock_guard lock(mutex_);
  return find(id).size;
}

// Room -------------------------------------------------------------------------------------------

// Memory for the block, within the quota.
std::uint32_t MemoryPool::obtain(const Block& block) {
  std::uint32_t start = take_cached(block.bytes);
  if (start == Arena::kNone) {
    make_room(block);
    start = take_cached(block.bytes);  // an evicted block's
  }
  if (start == Arena::kNone) {
    const bool drops = used_ + cached_ + block.bytes > quota_;
    while (used_ + cached_ + block.bytes > quota_) drop(std::prev(free_lists_.end()));
    start = carve(block.bytes);
    if (drops) trim();
  }
  used_ += block.bytes;
  return start;
}

// The oldest of its class, because the work that used it is the likeliest to have been awaited.
std::uint32_t MemoryPool::take_cached(std::size_t bytes) {
  const auto list = free_lists_.find(bytes);
  if (list == free_lists_.end()) return Arena::kNone;
  const Cached cached = list->second.front();
  await_work_since(cached.serial);
  list->second.pop_front();
  if (list->second.empty()) free_lists_.erase(list);
  cached_ -= bytes;
  ++reuse_count_;
  return cached.start;
}

void MemoryPool::give_back(std::uint32_t start, std::size_t bytes, bool may_be_in_use) {
  free_lists_[bytes].push_back({start, may_be_in_use ? ++released_ : 0});
  used_ -= bytes;
  cached_ += bytes;
}

void MemoryPool::await_work_since(std::uint64_t serial) {
  if (serial <= awaited_) return;
  device_->synchronize();
  awaited_ = released_;
}

// Evicts what must go so that the block fits once enough of the cached ones are dropped.
void MemoryPool::make_room(const Block& block) {
  std::size_t evictable = 0;
  std::vector<Block*> victims;
  for (auto next = by_use_.begin(); used_ - evictable + block.bytes > quota_; ++next) {
    if (!enable_eviction_ || next == by_use_.end()) refuse(block, evictable);
    if (next->second->is_pinned()) continue;
    victims.push_back(next->second);
    evictable += next->second->bytes;
  }
  if (!victims.empty()) evict_all(victims);
}

void MemoryPool::refuse(const Block& block, std::size_t evictable) const {
  throw Error(ErrorCode::over_quota,
              "memory pool on device '" + device_->properties().name + "': a block of " +
                  format_bytes(block.size) +
                  (block.bytes > block.size ? " (" + format_bytes(block.bytes) + " rounded up)"
                                            : std::string()) +
                  " does not fit: " + format_bytes(used_) + " of the quota of " +
                  format_bytes(quota_) + " are used" +
                  (enable_eviction_
                       ? ", " + format_bytes(evictable) + " of it by blocks that can be evicted"
                       : std::string(", and eviction is not enabled")));
}

// One after the other: those before a failure are evicted, the others as they were.
void MemoryPool::evict_all(const std::vector<Block*>& victims) {
  device_->synchronize();
  awaited_ = released_;
  for (Block* block : victims) {
    std::unique_ptr<std::byte[]> backup;
    try {
      backup = std::make_unique_for_overwrite<std::byte[]>(block->size);
    } catch (const std::bad_alloc&) {
      throw Error(ErrorCode::device, "memory pool: no host memory to evict a block of " +
                                         format_bytes(block->size) + " to");
    }
    transfer(reinterpret_cast<Address>(backup.get()), place_of(*block), block->size);
    block->backup = std::move(backup);
    by_use_.erase(block->last_use);
    give_back(std::exchange(block->start, Arena::kNone), block->bytes, false);
    evicted_bytes_ += block->size;
    ++eviction_count_;
  }
}

void MemoryPool::transfer(Address destination, Address source, std::size_t bytes) {
  device_->copy(destination, source, bytes, stream_);
  try {
    device_->synchronize_stream(stream_);
  } catch (const Error&) {
    // The copy may still run, and neither end may be given up before it is over.
    device_->synchronize_stream(stream_);
  }
}

// Pages ------------------------------------------------------------------------------------------

std::uint32_t MemoryPool::carve(std::size_t bytes) {
  const auto granules = static_cast<std::uint32_t>(bytes / kGranule);
  std::uint32_t start = arena_.allocate(granules);
  if (start != Arena::kNone) return start;
  const std::size_t held = handles_.existing_bytes();
  try {
    return grow(granules);
  } catch (const Error&) {
    // The device, or the range, may be short of what is only cached here.
    drop_all();
    start = arena_.allocate(granules);
    trim();
    if (start == Arena::kNone && handles_.existing_bytes() >= held) throw;
  }
  return start != Arena::kNone ? start : grow(granules);
}

std::uint32_t MemoryPool::grow(std::uint32_t granules) {
  const auto plan = arena_.plan_growth(granules);
  if (!plan) {
    throw Error(ErrorCode::over_quota,
                "memory pool: no gap between its blocks is as large as the " +
                    format_bytes(granules * kGranule) + " asked for");
  }
  ScopeExit tidy([&] { trim(); });
  for (std::uint32_t page = plan->first; page < plan->first + plan->count; ++page) {
    const Handle handle = handles_.take(arena_.page_bytes());
    ScopeExit put_back([&] { handles_.give_back(handle); });
    device_->map(address_ + page * arena_.page_bytes(), handle);
    put_back.dismiss();
    mapped_.emplace(page, handle);
    arena_.add_pages({page, 1});
  }
  tidy.dismiss();
  return arena_.allocate(granules);
}

// Gives up the oldest block of a list.
void MemoryPool::drop(FreeLists::iterator list) {
  const Cached cached = list->second.front();
  await_work_since(cached.serial);
  arena_.release(cached.start);
  list->second.pop_front();
  cached_ -= list->first;
  if (list->second.empty()) free_lists_.erase(list);
}

void MemoryPool::drop_all() {
  while (!free_lists_.empty()) drop(std::prev(free_lists_.end()));
}

// Unmaps pages that are wholly free. Where the device refuses they stay free, until the next time.
void MemoryPool::trim() {
  for (const Arena::FreeRun& run : arena_.free_runs()) {
    arena_.retire(run);
    std::uint32_t unmapped = 0;
    try {
      for (; unmapped < run.pages.count; ++unmapped) {
        const auto page = mapped_.find(run.pages.first + run.pages.count - unmapped - 1);
        device_->unmap(address_ + page->first * arena_.page_bytes(), page->second);
        handles_.give_back(page->second);
        mapped_.erase(page);
      }
    } catch (const Error&) {
    }
    arena_.finish_retirement(run.pages, unmapped);
  }
  handles_.trim();
}

}  // namespace pgk
