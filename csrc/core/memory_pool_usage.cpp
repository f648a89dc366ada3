// The memory pool's figures, the check of its invariants, and forks.
#include "core/error.h"
#include "core/memory_pool.h"

namespace pgk {

Address MemoryPool::address_of(Id id) const {
  const std::lock_guard lock(mutex_);
  const auto entry = blocks_.find(id);
  if (entry == blocks_.end() || entry->second->is_evicted()) return 0;
  return place_of(*entry->second);
}

bool MemoryPool::is_evicted(Id id) const {
  const std::lock_guard lock(mutex_);
  const auto entry = blocks_.find(id);
  return entry != blocks_.end() && entry->second->is_evicted();
}

MemoryPool::Stats MemoryPool::stats() {
  const std::lock_guard lock(mutex_);
  settle();
  Stats stats;
  stats.quota = quota_;
  stats.used = used_;
  stats.cached = cached_;
  stats.available = quota_ - used_;
  stats.allocated_bytes = allocated_bytes_;
  stats.evicted_bytes = evicted_bytes_;
  stats.resident = handles_.existing_bytes();
  for (const auto& [bytes, list] : free_lists_) stats.free_blocks += list.size();
  stats.active_blocks = blocks_.size();
  stats.allocation_count = allocation_count_;
  stats.reuse_count = reuse_count_;
  stats.eviction_count = eviction_count_;
  return stats;
}

void MemoryPool::detach_in_child() {
  forked_ = true;
  for (const auto& [page, handle] : mapped_) {
    device_->privatise_in_child(address_ + page * arena_.page_bytes(), handle);
  }
}

void MemoryPool::check_invariants() const {
  const std::lock_guard lock(mutex_);
  arena_.check_invariants();
  std::size_t used = 0;
  std::size_t cached = 0;
  std::size_t allocated = 0;
  std::size_t evicted = 0;
  std::size_t in_arena = 0;
  const auto is_live = [&](std::uint32_t start, std::size_t bytes) {
    ++in_arena;
    return arena_.live_granules(start) * kGranule == bytes;
  };
  for (const auto& [id, block] : blocks_) {
    require(block->id == id && block->size <= block->bytes && block->bytes == class_of(block->size),
            "blocks are as large as their class");
    allocated += block->size;
    if (block->is_evicted()) {
      require(block->start == Arena::kNone && !block->is_pinned(), "evicted blocks have no place");
      require(!by_use_.contains(block->last_use), "evicted blocks are not evicted again");
      evicted += block->size;
    } else {
      require(is_live(block->start, block->bytes), "blocks have memory of their own");
      const auto entry = by_use_.find(block->last_use);
      require(entry != by_use_.end() && entry->second == block.get(), "blocks are known by use");
      used += block->bytes;
    }
  }
  require(by_use_.size() == in_arena, "only blocks in device memory are known by use");
  for (const auto& block : leaving_) {
    require(is_live(block->start, block->bytes), "freed blocks stay while they are pinned");
    used += block->bytes;
  }
  for (const auto& [bytes, list] : free_lists_) {
    require(!list.empty(), "free lists hold blocks");
    for (const Cached& block : list) {
      require(is_live(block.start, bytes) && block.serial <= released_, "cached blocks are whole");
      cached += bytes;
    }
  }
  require(in_arena == arena_.live_blocks(), "no block is lost");
  require(used == used_ && cached == cached_, "used and cached bytes are counted");
  require(allocated == allocated_bytes_ && evicted == evicted_bytes_, "asked bytes are counted");
  require(used + cached <= quota_, "used and cached bytes are within the quota");
  require(mapped_.size() == arena_.resident_pages(), "every resident page is mapped");
  require(
      mapped_.size() * arena_.page_bytes() + handles_.pooled_bytes() == handles_.existing_bytes(),
      "handles are mapped or pooled");
}

}  // namespace pgk
