// Ties contexts, ledger, pools and device together, and owns the lock of every slow path: creating
// and destroying contexts, mapping pages for requests that miss, and moving pages out and back.
//
// Lock order: manager, then one context; a second context's lock is only ever taken by the
// holder of the manager's. No Python runs and no GIL is taken under either, and nobody waits for
// the device's work under them: pages that work may still use are retired, and whoever needs them
// waits without a lock and comes back. Pages are moved without a lock, too: whoever moves them has
// stopped their contexts, in which nothing can be entered, allocated or unmapped until it is done.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/context.h"
#include "core/eviction.h"
#include "core/handle_pool.h"
#include "core/host_pool.h"
#include "core/ledger.h"
#include "core/partition.h"
#include "core/refusal.h"
#include "core/reliefs.h"
#include "device/device.h"

namespace pgk {

// Bytes throughout.
struct Usage {
  std::uint64_t id = 0;
  std::string name;
  std::string partition;
  Tier tier = Tier::burstable;
  bool orphan = false;
  std::size_t used = 0;
  std::size_t resident = 0;
  std::size_t max = 0;
  std::size_t base = 0;
  std::size_t peak = 0;
  std::size_t small_peak = 0;  // of small blocks, and of large ones
  std::size_t large_peak = 0;
  std::size_t peak_resident = 0;
  std::size_t fenced = 0;
  std::size_t evicted = 0;
  std::size_t available = 0;  // what the context could allocate in addition now, by evicting others
  std::uint32_t live_blocks = 0;
  std::uint32_t sessions = 0;
  std::size_t waiting = 0;  // to enter
  Context::Counters counters;
};

// Sums over all contexts, those that are gone included.
struct Totals {
  Context::Counters counters;
  std::size_t used = 0;         // segments included
  std::size_t peak = 0;         // sum of the contexts' peaks: at least the peak of the sum
  std::size_t used_away = 0;    // of what is used, at least so much is evicted
  std::size_t active_away = 0;  // the same with what is fenced
  std::size_t small_peak = 0;   // the same of small and of large blocks, while they live
  std::size_t large_peak = 0;
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
  std::size_t available = 0;  // see Manager::available()
  std::size_t host_limit = 0;
  std::size_t host_existing = 0;  // host memory made for evicted pages, and of it
  std::size_t host_taken = 0;     // what holds contents: evicted pages and backups
  std::vector<Usage> contexts;
};

class Manager : public std::enable_shared_from_this<Manager> {
 public:
  // Asked before live data of others is moved for a request beyond the context's base: how many
  // bytes it wants, and how many it could have. Called without any lock, and not for requests that
  // are made within it.
  using PressureHandler =
      std::function<bool(const std::shared_ptr<Context>&, std::size_t, std::size_t)>;

  // `thread_streams` is what sessions of its contexts switch; it lives forever. `host_limit` is how
  // much host memory evicted pages may take. A claim of a base waits at most `claim_timeout` for
  // contexts in use.
  static std::shared_ptr<Manager> make(
      std::shared_ptr<Device> device, ThreadStreams* thread_streams = nullptr,
      std::size_t host_limit = 0,
      std::chrono::nanoseconds claim_timeout = std::chrono::seconds(10));
  // Contexts with live blocks stay, with the device, so that the blocks stay valid.
  ~Manager();

  // Throws ErrorCode::invalid_value, ::admission or ::device; nothing has changed then.
  std::shared_ptr<Context> create_context(const ContextSpec& spec);
  // Throws ErrorCode::busy while sessions are open. The memory of live blocks stays with the
  // orphaned context until they are freed.
  void destroy_context(Context& context);
  // Throws as create_context; also ErrorCode::invalid_value if live blocks hold more than `max`.
  void resize_context(Context& context, std::size_t max, std::size_t base);

  // Moves all of an idle context's pages to host memory; those without live blocks are given up.
  // Throws ErrorCode::busy if it is in use or pinned, or streams do not come to rest within
  // `claim_timeout`; ::out_of_memory if there is no host memory left, ::device. What was moved by
  // then stays out.
  void evict_context(Context& context);
  // Brings all back, at the cost of others as a request of the context would. Does nothing while
  // it is in use. Throws ErrorCode::out_of_memory with who holds what, or ::device.
  void restore_context(Context& context);
  // From pin() to unpin() nothing of the context is moved. pin() throws as begin_session() does,
  // but serves contexts that are destroyed as well.
  void pin(Context& context);
  void unpin(Context& context);
  // As long as `consumer` is in use, and until its stream is past what it holds then, `producer`
  // is not moved, unless for somebody's base.
  void declare_consumer(Context& producer, const std::shared_ptr<Context>& consumer);
  // Blocks while pages of the context move. Not a thread that runs an event loop, where the device
  // holds whoever is at work; nor one that captures, for which moves wait.
  void join(const Context& context);
  void set_pressure_handler(PressureHandler handler);
  // What is asked before others give way: by requests, contexts that come back, and reservations.
  void set_reliefs(std::vector<Reliefs::Relief> reliefs);
  // For memory outside of contexts: gives back what trim() does, and evicts idle best-effort
  // contexts for what of `bytes` the device still lacks. Returns whether anything came of it.
  bool give_way(std::size_t bytes);

  // For PartitionManager. Contexts without a partition that has a share run on the processors that
  // no partition has; on all, if there are none left. A context gets its stream there at once, or
  // if it is in use, when it is entered anew.
  std::shared_ptr<Partition> create_partition(const std::shared_ptr<const PartitionConfig>& config,
                                              const std::string& id, const std::string& name,
                                              const PartitionLimits& limits);
  void remove_partition(const std::shared_ptr<Partition>& partition);
  void abandon_partitions(const std::weak_ptr<const PartitionConfig>& config);
  Partitions partitions(const std::shared_ptr<const PartitionConfig>& config) const;
  // Null takes it out of its partition. Throws ErrorCode::busy while it has open sessions,
  // ::admission or ::invalid_value if it does not fit; nothing has changed then.
  void assign(Context& context, const std::shared_ptr<Partition>& partition);
  PartitionUsage partition_usage(const Partition& partition) const;
  // The share of the processors that no partition has; and whether none are left for contexts
  // without one.
  double available_compute() const;
  bool is_divided_up() const;
  // A stream for captures. Their kernels keep the processors and the priority of the stream that
  // they were captured on, and its cuBLAS workspace.
  StreamId capture_stream(Context& context);

  // Throws ErrorCode::context_destroyed if nothing of the context is left.
  Usage usage(const Context& context);
  DeviceUsage device_usage();
  // The largest guarantee that would be admitted.
  std::size_t available() const;
  Totals totals() const;
  // All peaks start again from what is used now.
  void reset_peaks();
  void reset_peaks(Context& context);
  // Gives free pages and pooled handles that no reservation needs back to the device, once the
  // work that may use them is done. Returns the bytes given back.
  std::size_t trim();
  // Before the process ends: no more host memory is made ahead.
  void stop_making_ahead() { host_pool_.stop_making_ahead(); }
  // Gives back all that no live block needs, once no context lives: whoever still has this object
  // shall not keep memory by that.
  void shut_down();
  bool is_shut_down() const;
  const std::shared_ptr<Device>& device() const { return device_; }
  const std::shared_ptr<ComputeGate>& compute_gate() const { return compute_gate_; }
  ThreadStreams* thread_streams() const { return thread_streams_; }

  // For Context only: what its hot path could not do. Null if it cannot be had.
  void* allocate_slow(Context& context, std::size_t bytes, StreamId stream, Effort effort,
                      std::string* said);
  void collect_orphan(std::uint64_t id);
  void admit(Context& context, bool keeps_active);
  // Counts a request that could not be had, and throws its ErrorCode::out_of_memory.
  [[noreturn]] void refuse(Context& context, std::size_t bytes, const std::string& said);

  // For the fork guard only: all locks before a fork, and in the child afterwards memory of its
  // own and contexts that refuse to be used.
  void lock_all();
  void unlock_all();
  void detach_in_child();

  // Throws ErrorCode::internal. Takes all locks.
  void check_invariants() const;

 private:
  using Clock = std::chrono::steady_clock;
  using Lock = std::unique_lock<std::mutex>;
  class Stopped;
  struct Need;
  struct Return;
  struct Round;
  // What others must give up: anybody, and those of the claimant's partition.
  struct Missing {
    std::size_t bytes = 0;
    std::size_t of_mates = 0;
    bool is_none() const { return bytes == 0 && of_mates == 0; }
  };
  // A base that is to be promised, where it is to come from.
  struct Reservation {
    std::size_t base = 0;
    Ledger::PartitionId partition = Ledger::kDevice;
    const Context* except = nullptr;
  };
  // A context as far as others may want something of it.
  struct Standing {
    Holder holder;  // with all of its live pages as spare
    const Ledger::Account* account = nullptr;
    std::size_t cached = 0;  // bytes in pages without live blocks
    bool is_pinned = false;
  };
  // What others could give to a claimant.
  struct Survey {
    std::size_t cached = 0;  // bytes in pages without live blocks
    std::size_t cached_by_mates = 0;
    std::size_t cached_beyond_bases = 0;
    std::vector<Holder> holders;
  };

  Manager(std::shared_ptr<Device> device, ThreadStreams* thread_streams, std::size_t host_limit,
          std::chrono::nanoseconds claim_timeout);

  void validate(const ContextSpec& spec) const;
  std::size_t page_bytes_for(std::size_t max) const;
  void require_usable() const;
  // Runs what may be refused, and says who was refused and what the device had to do with it.
  template <typename Step>
  auto on_behalf_of(const std::string& who, Step step) {
    try {
      return step();
    } catch (const Error& error) {
      throw Error(error.code(),
                  who + ": " + error.what() +
                      (device_said_.empty() ? "" : "; the device said: " + device_said_));
    }
  }

  void until_settled(const std::function<std::optional<EventId>()>& step);
  void make_room_for_base(const std::function<Reservation()>& wanted);

  // With the manager's lock; those that name a context need its lock too.
  std::uint32_t obtain(Context& context, std::uint32_t granules, Arena::Lane lane);
  std::optional<EventId> awaited_event(const Context& context, std::uint32_t granules,
                                       Arena::Lane lane) const;
  bool grow(Context& context, std::uint32_t granules, Arena::Lane lane);
  bool adopt_lanes(Context& context, Arena::Lane lane);
  void map_pages(Context& context, Arena::PageRun pages, Arena::Lane lane);
  void give_up_pages(Context& context, std::size_t count, Arena::Lane requester = 0,
                     std::optional<Arena::PageRun> beside = std::nullopt);
  bool recycle_pages(Context& context, std::uint32_t granules, Arena::Lane lane,
                     Arena::PageRun plan);
  void unmap_retired(Context& context, Arena::PageRun run);
  void collect_retired(Context& context);
  void collect_all_retired();
  std::optional<EventId> first_retired() const;
  void reclaim(const std::function<std::size_t()>& missing,
               const std::function<std::size_t(const Context&)>& spare, const Context* except);
  void reclaim_for(const Context& context, std::size_t bytes);
  void reclaim_for_base(std::size_t base, Ledger::PartitionId partition, const Context* except);
  void drop_reservation(Context& context);
  bool dismantle(Context& orphan);
  void collect_orphans();
  void trim_pool();
  HandlePool::Keep promised_to_others(const Context& claimant) const;
  HandlePool::Keep not_lent_to(const Context& claimant) const;
  void aim_host_pool();
  void refresh_outside();
  void require_live(const Context& context) const;

  // Moving: with the manager's lock up to choose_ins(), without any from carry_out() on.
  bool is_used(const Context& context) const;
  void require_open(const Context& context) const;
  std::vector<Standing> standings(const Context* except, const Stopped* stopped = nullptr) const;
  Survey survey(const Context* claimant, const std::vector<Standing>& standings) const;
  std::size_t obtainable(const Context& claimant, bool of_base,
                         const std::vector<Standing>& standings, std::size_t returning = 0) const;
  void wait_until_still(Lock& lock, const Context& context);
  void begin_session(Context& context, bool keeps_active);
  void pin_orphan(Context& context);
  Missing missing_of(const Need& need);
  std::vector<Eviction> plan(const Need& need, const Missing& missing, const Stopped& stopped,
                             std::string& why) const;
  bool choose_outs(const std::vector<Eviction>& plan, bool of_loans, Stopped& stopped,
                   Round& round);
  void add_outs(Context& context, std::size_t count, bool of_loans, Round& round);
  std::size_t drop_backups(std::size_t bytes);
  std::optional<Error> choose_ins(Context& context, Round& round);
  std::optional<Error> carry_out(Round& round);
  // In a session now, or since the use of this number.
  bool is_anybody_else_at_work(const Round& round, std::uint64_t since) const;
  std::vector<StreamId> streams_of(const Round& round) const;
  std::string whose(StreamId stream) const;
  void take_host_memory(Round& round);
  void settle(Round& round, std::uint64_t nanoseconds);
  bool make_room(Need need, std::string& why);
  void await_captures(Clock::time_point deadline);
  void* explained(const Need& need, std::string& why);
  bool await_others(Lock& lock, const Need& need, Stopped& victims);
  bool may_try_again(Clock::time_point deadline, const Round& round,
                     const std::optional<Error>& failure, Stopped& victims, std::string& why);
  bool bring_back(Return& way, Stopped& self);
  bool is_all_back(const Context& context) const;
  bool relieve(Reliefs::Left& left, bool device_is_short);
  bool await_all_streams(const Context& context);
  bool ask(Context& context, std::size_t bytes, std::size_t available);
  std::string host_memory_is_full() const;
  std::string nobody_gives_way(const Context& context, std::size_t bytes) const;
  void require_known(const Context& context) const;
  Refusal refusal_of(const Context& context);
  [[noreturn]] void refuse_restore(Context& context, const std::string& why,
                                   ErrorCode code = ErrorCode::out_of_memory);

  // Partitions: with the manager's lock.
  std::vector<std::string> members(const Partition& partition) const;
  void close_partition(Partition& partition);
  void release(const std::shared_ptr<Partition>& partition);
  ProcessorSet processors(const Partition& partition) const;
  ProcessorSet processors_of(const Context& context) const;
  void confine_all();
  void confine(Context& context);
  void replace_stream(Context& context);
  StreamId stream_on(Context& context, ProcessorSet processors, bool for_captures);
  int priority_of(Tier tier) const;

  Usage usage_of(const Context& context, const std::vector<Standing>& standings) const;
  std::size_t protected_bytes(const Context& context) const;
  std::size_t unprotected_bytes() const;
  std::vector<Context*> all() const;
  Context* find(std::uint64_t id) const;

  mutable std::mutex mutex_;
  mutable std::condition_variable moved_;  // contexts that were stopped have been let go
  std::shared_ptr<Device> device_;
  ThreadStreams* thread_streams_;
  Ledger ledger_;
  HandlePool pool_;
  HostPool host_pool_;
  const std::shared_ptr<ComputeGate> compute_gate_;
  ProcessorShares shares_;
  Partitions partitions_;
  const std::chrono::nanoseconds claim_timeout_;
  std::shared_ptr<PressureHandler> pressure_handler_;
  std::shared_ptr<const Reliefs> reliefs_;
  std::size_t stopped_contexts_ = 0;
  std::size_t stopped_victims_ = 0;
  std::vector<std::shared_ptr<Context>> contexts_;
  std::vector<std::shared_ptr<Context>> orphans_;
  // What the device refused in the operation under way, for the error that may come of it.
  std::string device_said_;
  Context::Counters gone_;          // of contexts of which nothing is left
  std::size_t peak_with_gone_ = 0;  // the sum of the peaks when one of those went
  bool forked_ = false;
  bool shut_down_ = false;
};

}  // namespace pgk
