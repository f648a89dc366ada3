// Ties contexts, ledger, handle pool and device together, and owns the lock of every slow path:
// creating and destroying contexts, and mapping pages for requests that miss.
//
// Lock order: manager, then one context; a second context's lock is only ever taken by the
// holder of the manager's. No Python runs and no GIL is taken under either, and nobody waits for
// the device's work under them: pages that work may still use are retired, and whoever needs them
// waits without a lock and comes back.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/context.h"
#include "core/handle_pool.h"
#include "core/ledger.h"
#include "device/device.h"

namespace pgk {

// Bytes throughout.
struct Usage {
  std::uint64_t id = 0;
  std::string name;
  Tier tier = Tier::burstable;
  bool orphan = false;
  std::size_t used = 0;
  std::size_t resident = 0;
  std::size_t max = 0;
  std::size_t base = 0;
  std::size_t peak = 0;
  std::size_t available = 0;  // what the context could allocate in addition now
  std::uint32_t live_blocks = 0;
  std::uint32_t sessions = 0;
};

// Sums over all contexts, those that are gone included.
struct Totals {
  Context::Counters counters;
  std::size_t used = 0;                 // segments included
  std::size_t peak = 0;                 // sum of the contexts' peaks: at least the peak of the sum
  std::size_t least_segment_bytes = 0;  // since the peaks were reset: at most the least sum
  std::size_t fenced = 0;               // freed, but other streams may still use it
  std::size_t live_blocks = 0;
  std::size_t pages = 0;
  std::size_t existing = 0;  // physical memory, reservations included
  std::size_t existing_peak = 0;
  std::size_t created = 0;  // physical memory, since the beginning
};

struct DeviceUsage {
  std::size_t capacity = 0;
  std::size_t resident = 0;   // held by contexts, orphans included
  std::size_t pooled = 0;     // physical memory kept for reuse and for reservations
  std::size_t available = 0;  // the largest guarantee that would be admitted
  std::vector<Usage> contexts;
};

class Manager : public std::enable_shared_from_this<Manager> {
 public:
  // `thread_streams` is what sessions of its contexts switch; it lives forever.
  static std::shared_ptr<Manager> make(std::shared_ptr<Device> device,
                                       ThreadStreams* thread_streams = nullptr);
  // Contexts with live blocks stay, with the device, so that the blocks stay valid.
  ~Manager();

  // Throws ErrorCode::invalid_value, ::admission or ::device; nothing has changed then.
  std::shared_ptr<Context> create_context(const ContextSpec& spec);
  // Throws ErrorCode::busy while sessions are open. The memory of live blocks stays with the
  // orphaned context until they are freed.
  void destroy_context(Context& context);
  // Throws as create_context; also ErrorCode::invalid_value if live blocks hold more than `max`.
  void resize_context(Context& context, std::size_t max, std::size_t base);

  // Throws ErrorCode::context_destroyed if nothing of the context is left.
  Usage usage(const Context& context) const;
  DeviceUsage device_usage() const;
  Totals totals() const;
  // All peaks start again from what is used now.
  void reset_peaks();
  // Gives free pages and pooled handles that no reservation needs back to the device, once the
  // work that may use them is done. Returns the bytes given back.
  std::size_t trim();
  const std::shared_ptr<Device>& device() const { return device_; }
  ThreadStreams* thread_streams() const { return thread_streams_; }

  // For Context only: what its hot path could not do. Null if it cannot be had.
  void* allocate_slow(Context& context, std::size_t bytes, StreamId stream, bool may_wait,
                      std::string* device_said);
  void collect_orphan(std::uint64_t id);
  // Counts a request that could not be had, and throws its ErrorCode::out_of_memory.
  [[noreturn]] void refuse(Context& context, std::size_t bytes, const std::string& device_said);

  // For the fork guard only: all locks before a fork, and in the child afterwards memory of its
  // own and contexts that refuse to be used.
  void lock_all();
  void unlock_all();
  void detach_in_child();

  // Throws ErrorCode::internal. Takes all locks.
  void check_invariants() const;

 private:
  Manager(std::shared_ptr<Device> device, ThreadStreams* thread_streams);

  void validate(const ContextSpec& spec) const;
  std::size_t page_bytes_for(std::size_t max) const;
  void require_usable() const;
  template <typename Step>
  auto on_behalf_of(const std::string& name, Step step);

  void until_settled(const std::function<std::optional<EventId>()>& step);

  // With the manager's lock; those that name a context need its lock too.
  std::uint32_t obtain(Context& context, std::uint32_t granules, Arena::Lane lane);
  std::optional<EventId> awaited_event(const Context& context, std::uint32_t granules,
                                       Arena::Lane lane) const;
  bool grow(Context& context, std::uint32_t granules, Arena::Lane lane);
  bool adopt_lanes(Context& context, Arena::Lane lane);
  void map_pages(Context& context, Arena::PageRun pages, Arena::Lane lane);
  void give_up_pages(Context& context, std::size_t count, Arena::Lane requester = 0,
                     std::optional<Arena::PageRun> beside = std::nullopt);
  void unmap_retired(Context& context, Arena::PageRun run);
  void collect_retired(Context& context);
  void collect_all_retired();
  std::optional<EventId> first_retired() const;
  void reclaim(std::size_t goal, const Context* except);
  void drop_reservation(Context& context);
  bool dismantle(Context& orphan);
  void collect_orphans();
  void set_reserved_pages(const Context& context, std::size_t base_before, std::size_t base_after);
  std::size_t unfilled_pages(const Context& context, std::size_t base) const;
  void require_live(const Context& context) const;

  Usage usage_of(const Context& context, std::size_t protected_bytes,
                 std::size_t unprotected_bytes) const;
  std::size_t protected_bytes(const Context& context) const;
  std::size_t unprotected_bytes(std::size_t protected_bytes) const;
  std::vector<Context*> all() const;

  mutable std::mutex mutex_;
  std::shared_ptr<Device> device_;
  ThreadStreams* thread_streams_;
  Ledger ledger_;
  HandlePool pool_;
  std::vector<std::shared_ptr<Context>> contexts_;
  std::vector<std::shared_ptr<Context>> orphans_;
  // What the device refused in the operation under way, for the error that may come of it.
  std::string device_said_;
  Context::Counters gone_;          // of contexts of which nothing is left
  std::size_t peak_with_gone_ = 0;  // the sum of the peaks when one of those went
  bool forked_ = false;
};

}  // namespace pgk
