// One execution context: its arena behind its own lock, which is all that an allocation that
// hits and every free take. What needs physical memory goes to the manager.
//
// Memory is handed out for a stream and may be reused in the order of that stream: torch's rule.
// What other streams do with it must be announced, by record_use() or by free_after(): the block
// is then kept back until an event on each of them is done.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/arena.h"
#include "core/compute_gate.h"
#include "core/error.h"
#include "core/ledger.h"
#include "core/session_queue.h"
#include "core/spin_lock.h"
#include "core/types.h"
#include "device/device.h"

namespace pgk {

class Manager;
class ThreadStreams;
struct Partition;

// How far a request goes: takes what is ready; or waits for the device's work, and has others give
// way.
enum class Effort : std::uint8_t { ready, evict };

struct ContextSpec {
  std::string name;
  std::size_t max = 0;
  std::size_t base = 0;
  Tier tier = Tier::burstable;
  std::string partition;         // its id; empty for none
  bool yields = false;           // its work waits while guaranteed contexts work
  std::size_t max_sessions = 0;  // open at a time; 0: no limit
};

class Context : public std::enable_shared_from_this<Context> {
 public:
  struct Counters {
    std::uint64_t allocations = 0;
    std::uint64_t frees = 0;
    std::uint64_t growths = 0;  // requests that needed pages
    std::uint64_t refusals = 0;
    std::uint64_t pages_mapped = 0;
    std::uint64_t pages_unmapped = 0;
    std::uint64_t allocated_bytes = 0;
    // Of these, blocks that torch counts as those of its small pool.
    std::uint64_t small_allocations = 0;
    std::uint64_t small_frees = 0;
    std::uint64_t small_allocated_bytes = 0;
    std::uint64_t small_freed_bytes = 0;
    // Of these, segments.
    std::uint64_t segments_taken = 0;
    std::uint64_t segments_returned = 0;
    std::uint64_t segment_bytes_taken = 0;
    std::uint64_t segment_bytes_returned = 0;
    std::uint64_t evictions = 0;  // times that pages of it were moved out, and back
    std::uint64_t restores = 0;
    std::uint64_t bytes_out = 0;  // copied
    std::uint64_t bytes_in = 0;
    std::uint64_t pages_unchanged = 0;  // moved out without a copy
    std::uint64_t move_nanoseconds = 0;

    std::size_t small_bytes() const { return small_allocated_bytes - small_freed_bytes; }
    std::size_t segment_bytes() const { return segment_bytes_taken - segment_bytes_returned; }
    Counters& operator+=(const Counters& other);
  };

  Context(const std::shared_ptr<Manager>& manager, ContextSpec spec, Ledger::Id account,
          std::size_t page_bytes, std::uint32_t page_count, std::uint32_t segment_pages,
          Address address, StreamId stream, ProcessorSet processors);
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // At least `bytes` (> 0), aligned to a granule, for use on `stream`. May block until work that
  // uses freed memory is done. Throws ErrorCode::out_of_memory with who, what and how much; the
  // context is then as before and usable.
  void* allocate(std::size_t bytes, StreamId stream) {
    if (void* pointer = allocate_resident(bytes, stream)) [[likely]]
      return pointer;
    return allocate_or_refuse(bytes, stream);
  }
  // As allocate(), but null where that takes more than memory which is free in the stream's order.
  void* allocate_resident(std::size_t bytes, StreamId stream);
  // As allocate(), but null instead of ErrorCode::out_of_memory; then `said`, if given, is what
  // stood in the way other than its own budget.
  void* try_allocate(std::size_t bytes, StreamId stream, Effort effort = Effort::evict,
                     std::string* said = nullptr);
  // Throws ErrorCode::invalid_value if no live block of this context starts at `pointer`.
  void free(void* pointer);
  // As free(), for a block that the present work of `streams` may still use.
  void free_after(void* pointer, std::span<const StreamId> streams);
  // The same for work on any stream, which is done with `event`. What needs the block waits for
  // that last of all.
  void free_after(void* pointer, EventId event);
  // Work that is on `stream` when the block is freed may still use it then. Nothing is noted if no
  // live block of this context starts at `pointer`. Waits for a move that is under way: see
  // Manager::join().
  void record_use(const void* pointer, StreamId stream);
  // For whoever divides segments further: counts what he takes with kNoStream and gives back.
  void count_segment(const void* pointer, bool taken);
  // How many of torch's private pools are begun that may have to serve requests of its sessions.
  std::atomic<int>& begun_pools() { return begun_pools_; }
  // The block's size, 0 if no live block of this context starts at `pointer`.
  std::size_t block_bytes(const void* pointer) const;

  // What an entry has to have before it begins a session: null where there are no gates, and where
  // the context refuses it. See SessionTicket.
  std::shared_ptr<SessionTicket> queue_up(const SessionTicket::List& around) {
    if (!has_gates() || !is_open()) return nullptr;
    const std::shared_ptr<Entrance> entrance(shared_from_this(), &entrance_);
    return std::make_shared<SessionTicket>(entrance, around);
  }
  bool has_gates() const { return entrance_.has_gates(); }
  // Of those who have queued up.
  std::size_t waiting() const { return entrance_.waiting(); }
  // While it has no open sessions. Null for none.
  void set_partition_gate(std::shared_ptr<SessionGate> gate) {
    entrance_.set_partition_gate(std::move(gate));
  }

  // A context with open sessions that keep it active cannot be destroyed, nor moved unless for
  // somebody's base; end_session() is for those. Neither waits for a context that grows. Beginning
  // waits for pages that move, and brings back what was evicted, as far as it is needed for an idle
  // context. Throws ErrorCode::context_destroyed, ::forked, and if pages cannot be brought back
  // ::out_of_memory or ::device.
  void begin_session(bool keeps_active) {
    if (!try_begin_session(keeps_active)) [[unlikely]]
      begin_session_slow(keeps_active);
  }
  // As begin_session(), but false where that would wait or refuse.
  bool try_begin_session(bool keeps_active);
  void end_session() {
    last_use_.store(next_use(), std::memory_order_relaxed);
    if (tier() == Tier::guaranteed) gate_->end_session();
    sessions_.fetch_sub(1, std::memory_order_acq_rel);
  }

  const std::string& name() const { return spec_.name; }
  Tier tier() const { return spec_.tier; }
  bool yields() const { return spec_.yields; }
  ComputeGate& gate() const { return *gate_; }
  std::uint64_t id() const { return account_; }
  // kNoStream once nothing is left of the context.
  StreamId stream() const { return stream_.load(std::memory_order_relaxed); }
  // Those that memory was handed out for.
  std::vector<StreamId> streams() const;
  Device& device() const { return *device_; }
  // Whether its memory is that of CPU tensors.
  bool is_on_host() const { return is_on_host_; }
  ThreadStreams* thread_streams() const { return thread_streams_; }
  std::size_t page_bytes() const { return arena_.page_bytes(); }
  std::size_t used_bytes() const;
  // Its max, as of the last change.
  std::size_t budget() const { return budget_.load(std::memory_order_relaxed); }
  std::size_t resident_bytes() const;
  bool is_open() const { return (sessions_.load(std::memory_order_acquire) & kClosed) == 0; }
  bool is_destroyed() const;
  // Whether begin_session() would not have to wait for pages.
  bool is_ready() const {
    const std::uint32_t sessions = sessions_.load(std::memory_order_acquire);
    const bool is_idle = (sessions & kCount) == 0;
    return (sessions & kMoving) == 0 && !(is_idle && (sessions & kDelayed) != 0);
  }
  std::uint32_t sessions() const { return sessions_.load(std::memory_order_acquire) & kCount; }
  // Whether pages of it are on their way.
  bool is_moving() const { return (sessions_.load(std::memory_order_acquire) & kMoving) != 0; }
  Counters counters() const;
  // Throws ErrorCode::context_destroyed if it is gone.
  std::shared_ptr<Manager> manager() const;

 private:
  friend class Manager;

  // Anything but `open` diverts from the hot path.
  enum class State : std::uint8_t { open, moving, orphan, forked };

  // What backs a page.
  struct Page {
    Handle handle;  // mapped
    // Only of resident pages: host memory that held the same when the page came back.
    std::optional<Handle> backup;
    std::optional<Fingerprint> contents;
  };

  // A freed block and the streams that must pass. An event of 0 is still to be recorded: its
  // stream was being captured. kNoStream stands for all streams.
  struct Fence {
    struct Point {
      StreamId stream = kNoStream;
      EventId event = 0;
    };
    std::uint32_t start = 0;
    std::uint32_t granules = 0;
    std::vector<Point> points;
  };
  struct Retired {
    Arena::PageRun pages;
    EventId event = 0;
  };

  // One that was made for the context; the others lie idle until they are needed again.
  struct OwnStream {
    StreamId id = kNoStream;
    ProcessorSet processors = 0;
    bool for_captures = false;
  };

  Address address_of(std::uint32_t page) const { return address_ + page * arena_.page_bytes(); }
  void* allocate_or_refuse(std::size_t bytes, StreamId stream);
  std::uint32_t granule_of(const void* pointer) const {
    const Address offset = reinterpret_cast<Address>(pointer) - address_;
    return offset % kGranule == 0 && offset / kGranule < Arena::kNone
               ? static_cast<std::uint32_t>(offset / kGranule)
               : Arena::kNone;
  }
  void require_open() const;
  // Lets no session in from now on. False if there are open ones.
  bool close();
  std::optional<Arena::Lane> find_lane(StreamId stream) const;
  Arena::Lane lane_for(StreamId stream);
  template <typename Release>
  void free_by(const Release& release);
  void release(std::uint32_t start, std::span<const StreamId> streams,
               std::optional<EventId> of_all = std::nullopt);
  bool settle_fences();
  void settle_fence_of(std::uint32_t granules);
  bool is_past(Fence::Point& point);
  std::optional<EventId> awaited_event() const;
  std::optional<EventId> event_of_all() const;
  std::size_t retired_bytes() const;
  // With the manager's lock.
  std::size_t device_pages() const { return arena_.resident_pages() - evicted_pages_; }
  // The numbers of pages with live bytes, evicted or resident. With the context's lock, too.
  std::vector<std::uint32_t> live_pages(bool evicted) const;
  // Resident pages without a live byte, retired ones included.
  std::size_t idle_device_pages() const;
  // The one that it has now.
  const OwnStream& own_stream() const;
  void count_session() {
    if (tier() == Tier::guaranteed) gate_->begin_session();
  }
  void begin_session_slow(bool keeps_active);
  static std::uint64_t next_use() { return uses_of_all_.fetch_add(1, std::memory_order_relaxed); }
  void* finish_allocation(std::uint32_t start, std::size_t granules) {
    const std::size_t bytes = granules * kGranule;
    ++counters_.allocations;
    counters_.allocated_bytes += bytes;
    if (bytes <= kSmallBlock) {
      ++counters_.small_allocations;
      counters_.small_allocated_bytes += bytes;
      small_peak_ = std::max(small_peak_, counters_.small_bytes());
    } else {
      large_peak_ = std::max(large_peak_, arena_.used_bytes() - counters_.small_bytes());
    }
    return reinterpret_cast<void*>(address_ + start * kGranule);
  }

  void count_free(std::uint32_t granules) {
    ++counters_.frees;
    const std::size_t bytes = granules * kGranule;
    if (bytes > kSmallBlock) return;
    ++counters_.small_frees;
    counters_.small_freed_bytes += bytes;
  }
  void reset_peaks();

  // As in torch, c10/cuda/CUDACachingAllocator.cpp.
  static constexpr std::size_t kSmallBlock = MiB;
  // Among how many fences a request looks for a block of its own size.
  static constexpr std::ptrdiff_t kFencesAsked = 8;

  // How many are open, whether another may be, and what it has to wait for.
  static constexpr std::uint32_t kClosed = std::uint32_t{1} << 31;
  static constexpr std::uint32_t kMoving = std::uint32_t{1} << 30;
  static constexpr std::uint32_t kEvicted = std::uint32_t{1} << 29;
  static constexpr std::uint32_t kYields = std::uint32_t{1} << 28;     // once it is idle
  static constexpr std::uint32_t kMisplaced = std::uint32_t{1} << 27;  // needs another stream
  static constexpr std::uint32_t kJoins = std::uint32_t{1} << 26;      // what it consumes is moving
  static constexpr std::uint32_t kDelayed = kEvicted | kYields | kMisplaced | kJoins;
  static constexpr std::uint32_t kCount = kJoins - 1;
  std::atomic<std::uint32_t> sessions_{0};
  // In the order of use, of all contexts.
  static inline std::atomic<std::uint64_t> uses_of_all_{1};
  std::atomic<std::uint64_t> last_use_{next_use()};
  std::atomic<int> begun_pools_{0};
  std::atomic<std::size_t> budget_;
  const bool is_on_host_;
  const std::shared_ptr<ComputeGate> gate_;
  Entrance entrance_;

  mutable SpinLock mutex_;
  Arena arena_;
  Address address_;
  State state_ = State::open;
  Counters counters_;
  std::vector<StreamId> lanes_;                          // the stream of each lane of the arena
  std::map<std::uint32_t, std::vector<StreamId>> uses_;  // of live blocks, as recorded
  std::vector<Fence> fences_;
  // Since the peaks were reset.
  std::size_t least_segment_bytes_ = 0;
  std::size_t small_peak_ = 0;
  std::size_t large_peak_ = 0;
  // Below: only with the manager's lock, except for what never changes.
  ContextSpec spec_;
  Ledger::Id account_;
  std::atomic<StreamId> stream_;  // one of these
  std::vector<OwnStream> own_streams_;
  std::shared_ptr<Partition> partition_;
  std::shared_ptr<Device> device_;
  ThreadStreams* thread_streams_;
  std::map<std::uint32_t, Page> pages_;  // all that are not holes
  std::uint32_t evicted_pages_ = 0;
  std::uint32_t pins_ = 0;
  std::uint32_t waiting_ = 0;                      // claims that wait until it is idle
  std::uint32_t joins_ = 0;                        // contexts that move and that it consumes
  std::vector<std::weak_ptr<Context>> consumers_;  // declared, since the last time it was idle
  std::vector<Retired> retired_;
  std::weak_ptr<Manager> manager_;
  // Set while an orphan: its last free needs the manager.
  std::shared_ptr<Manager> manager_of_orphan_;
};

}  // namespace pgk
