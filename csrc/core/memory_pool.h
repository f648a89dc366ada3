// A pool of blocks in a device's memory within a quota: freed blocks are kept for reuse, and the
// least recently used ones move to host memory when room is needed.
//
// Sizes are rounded up to a class, four to each power of two: a block occupies at most a quarter
// more than was asked for, from 2 KiB up; below, up to a granule more. The largest class is the
// quota. A freed block is kept whole in the free list of its class (cached). The quota bounds used
// and cached bytes together. If a request does not fit, cached blocks of other classes are dropped,
// the largest first: the fewest are lost, and whole pages come free. If dropping all of them does
// not suffice, blocks are evicted in the order of their last use, but only as many as are needed,
// and none if all do not suffice.
//
// Pages are mapped and unmapped as the blocks need them. Those that are partly used can hold more
// than the quota; resident says how much.
//
// A pin keeps a block where it is, and the memory of a freed one from reuse. Beyond that nobody
// knows who works with a block: so work of all streams of the device is awaited before a block is
// copied out, and before memory that was freed is reused or unmapped, unless that happened since it
// was freed. Work submitted later, to an address that was freed or evicted, is the caller's
// mistake.
//
// Thread-safe: one lock, held while the device copies.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/arena.h"
#include "core/handle_pool.h"
#include "core/types.h"
#include "device/device.h"

namespace pgk {

class MemoryPool : public std::enable_shared_from_this<MemoryPool> {
 public:
  using Id = std::uint64_t;  // never used twice

  // Addresses are free, gaps between blocks are not: see docs/architecture.md.
  static constexpr std::size_t kRangePerQuota = 3;

  // Bytes, but for the counts.
  struct Stats {
    std::size_t quota = 0;
    std::size_t used = 0;             // by blocks in device memory, each as large as its class
    std::size_t cached = 0;           // by freed blocks that are kept for reuse
    std::size_t available = 0;        // what fits without evicting: the quota less what is used
    std::size_t allocated_bytes = 0;  // asked for by blocks not freed yet, evicted ones included
    std::size_t evicted_bytes = 0;    // of these in host memory
    std::size_t resident = 0;         // physical memory of the device that the pool holds
    std::size_t free_blocks = 0;      // cached
    std::size_t active_blocks = 0;    // not freed yet, evicted ones included
    std::uint64_t allocation_count = 0;
    std::uint64_t reuse_count = 0;  // cached blocks handed out, for restores as well
    std::uint64_t eviction_count = 0;
  };

  class Pin;

  // Throws ErrorCode::invalid_value for a quota of 0 or beyond the device's capacity.
  static std::shared_ptr<MemoryPool> make(std::size_t quota, bool enable_eviction,
                                          std::shared_ptr<Device> device);
  ~MemoryPool();

  // What changes something throws ErrorCode::forked in a forked child, and what takes an Id
  // ErrorCode::invalid_value if that block was freed. ErrorCode::device means that the device
  // failed: no block and no contents are lost, and it can be tried again.

  // Throws ErrorCode::over_quota or ::device.
  Id allocate(std::size_t size);
  void free(Id id);
  // Counts as a use, as allocating, restoring and pinning do.
  void touch(Id id);
  // Nothing to do if it is evicted already. Throws ErrorCode::invalid_value if it is pinned, or
  // ErrorCode::device.
  void evict(Id id);
  // Possibly to another address. Throws ErrorCode::over_quota or ::device, and is evicted still.
  void restore(Id id);
  // Restores the block if it is evicted, and throws as that does.
  std::shared_ptr<Pin> pin(Id id);
  // Frees all blocks and gives up what was cached. Throws ErrorCode::device if work could not be
  // awaited: then the blocks are freed, but cached.
  void clear();

  std::size_t size_of(Id id) const;
  // 0 if the block is evicted or was freed.
  Address address_of(Id id) const;
  // False if it was freed.
  bool is_evicted(Id id) const;
  Stats stats();
  const std::shared_ptr<Device>& device() const { return device_; }

  // For the fork guard only: the lock before a fork, and in the child afterwards memory of its own
  // and a pool that refuses to be used.
  void lock_all() { mutex_.lock(); }
  void unlock_all() { mutex_.unlock(); }
  void detach_in_child();

  // Throws ErrorCode::internal.
  void check_invariants() const;

 private:
  struct Block {
    Id id = 0;
    std::size_t size = 0;   // as asked for
    std::size_t bytes = 0;  // of its class
    std::uint32_t start = Arena::kNone;
    std::uint64_t last_use = 0;
    std::atomic<std::uint32_t> pins{0};   // raised with the lock held, lowered without it
    std::unique_ptr<std::byte[]> backup;  // the contents while evicted

    bool is_evicted() const { return backup != nullptr; }
    bool is_pinned() const { return pins.load(std::memory_order_acquire) > 0; }
  };
  struct Cached {
    std::uint32_t start = 0;
    std::uint64_t serial = 0;  // of its release; 0 if no work can use it
  };

  using FreeLists = std::map<std::size_t, std::deque<Cached>>;  // by class, none of them empty

  MemoryPool(std::size_t quota, bool enable_eviction, std::shared_ptr<Device> device);

  std::size_t class_of(std::size_t size) const;

  // With the lock.
  void require_usable() const;
  Block& find(Id id) const;
  Address place_of(const Block& block) const { return address_ + block.start * kGranule; }
  void use(Block& block);
  void bring_back(Block& block);
  void free_block(std::unique_ptr<Block> block);
  void settle();
  std::uint32_t obtain(const Block& block);
  std::uint32_t take_cached(std::size_t bytes);
  void give_back(std::uint32_t start, std::size_t bytes, bool may_be_in_use = true);
  void make_room(const Block& block);
  [[noreturn]] void refuse(const Block& block, std::size_t evictable) const;
  void evict_all(const std::vector<Block*>& victims);
  void transfer(Address destination, Address source, std::size_t bytes);
  void await_work_since(std::uint64_t serial);
  std::uint32_t carve(std::size_t bytes);
  std::uint32_t grow(std::uint32_t granules);
  void drop(FreeLists::iterator list);
  void drop_all();
  void trim();

  mutable std::mutex mutex_;
  bool forked_ = false;
  const std::size_t quota_;
  const bool enable_eviction_;
  const std::shared_ptr<Device> device_;
  HandlePool handles_;
  Arena arena_;
  Address address_ = 0;
  StreamId stream_ = 0;
  std::map<std::uint32_t, Handle> mapped_;  // by page

  std::unordered_map<Id, std::unique_ptr<Block>> blocks_;
  std::map<std::uint64_t, Block*> by_use_;       // of blocks_, those in device memory
  std::vector<std::unique_ptr<Block>> leaving_;  // freed, but pinned
  FreeLists free_lists_;

  std::size_t used_ = 0;
  std::size_t cached_ = 0;
  std::size_t allocated_bytes_ = 0;
  std::size_t evicted_bytes_ = 0;
  Id next_id_ = 1;
  std::uint64_t clock_ = 0;     // counts uses
  std::uint64_t released_ = 0;  // the last release's serial
  std::uint64_t awaited_ = 0;   // all work was awaited after this release
  std::uint64_t allocation_count_ = 0;
  std::uint64_t reuse_count_ = 0;
  std::uint64_t eviction_count_ = 0;
};

// Holds a block where it is, and its pool.
class MemoryPool::Pin {
 public:
  Pin(std::shared_ptr<MemoryPool> pool, Block& block);
  ~Pin() { block_.pins.fetch_sub(1, std::memory_order_release); }
  Pin(const Pin&) = delete;
  Pin& operator=(const Pin&) = delete;

  Address address() const { return address_; }
  std::size_t size() const { return size_; }

 private:
  std::shared_ptr<MemoryPool> pool_;
  Block& block_;
  Address address_;
  std::size_t size_;
};

}  // namespace pgk
