// The manager's sixth part: who gives way to whom, and when an evicted context comes back.
#include <algorithm>
#include <optional>
#include <thread>
#include <utility>

#include "core/blocking.h"
#include "core/error.h"
#include "core/manager_moves.h"
#include "core/scope_exit.h"

namespace pgk {
namespace {

using ContextLock = std::lock_guard<SpinLock>;

// How often who waits for a context in use looks again.
constexpr std::chrono::microseconds kLookAgain{500};

// What a context may hold beyond the peak of what it used, as a part of that, before its own free
// pages serve it instead of new ones.
constexpr std::size_t kSlack = 32;

// Requests made by a handler are not asked about.
thread_local bool in_pressure_handler = false;

}  // namespace

// Its own free pages ---------------------------------------------------------------------------

// Before a fragmented arena holds more and more, free pages of the lane that the new block cannot
// use are given up, to be mapped where it can: addresses fragment, pages do not have to. Only where
// nobody has to wait for that, and not within a base, whose pages are the context's anyway. Lanes
// keep their own, or two that take turns would pass their pages to and fro.
bool Manager::recycle_pages(Context& context, std::uint32_t granules, Arena::Lane lane,
                            Arena::PageRun plan) {
  Arena& arena = context.arena_;
  const std::size_t page = context.page_bytes();
  const std::size_t peak = std::max(arena.peak_bytes(), arena.used_bytes() + granules * kGranule);
  const std::size_t kept = std::max(peak + peak / kSlack, ledger_.account(context.id()).base);
  const std::size_t limit = (kept + page - 1) / page;
  const std::size_t before = arena.resident_pages();
  if (before + plan.count <= limit || context.evicted_pages_ > 0) return false;
  try {
    const StreamId stream = context.lanes_[lane];
    if (stream != kNoStream && (device_->is_capturing(stream) || !device_->is_idle(stream))) {
      return false;
    }
  } catch (const Error& error) {
    device_said_ = error.what();
    return false;
  }
  std::size_t excess = std::min<std::size_t>(before + plan.count - limit, plan.count);
  for (Arena::FreeRun run : arena.free_runs(plan)) {
    if (excess == 0) break;
    if (run.lane != lane) continue;
    const auto count = static_cast<std::uint32_t>(std::min<std::size_t>(run.pages.count, excess));
    run.pages = {run.pages.first + run.pages.count - count, count};
    arena.retire(run);
    unmap_retired(context, run.pages);
    excess -= count;
  }
  return arena.resident_pages() < before;
}

// Asking -----------------------------------------------------------------------------------------

void Manager::set_pressure_handler(PressureHandler handler) {
  auto next = handler ? std::make_shared<PressureHandler>(std::move(handler)) : nullptr;
  // The old one may be Python's: it goes after the lock.
  const std::lock_guard lock(mutex_);
  pressure_handler_.swap(next);
}

bool Manager::ask(Context& context, std::size_t bytes, std::size_t available) {
  std::shared_ptr<PressureHandler> handler;
  {
    const std::lock_guard lock(mutex_);
    handler = pressure_handler_;
  }
  if (!handler || in_pressure_handler) return true;
  in_pressure_handler = true;
  const ScopeExit leave([] { in_pressure_handler = false; });
  return (*handler)(context.shared_from_this(), bytes, available);
}

// Making room ------------------------------------------------------------------------------------

Manager::Missing Manager::missing_of(const Need& need) {
  if (need.claimant != nullptr) {
    refresh_outside();
    const Ledger::Id id = need.claimant->id();
    return {ledger_.shortage(id, need.room, need.returning()),
            ledger_.shortage_in_partition(id, need.room)};
  }
  trim_pool();
  return {need.room - std::min(need.room, device_->free_bytes()), 0};
}

// The contexts that have to give way, with the reason if that cannot be.
std::vector<Eviction> Manager::plan(const Need& need, const Missing& missing,
                                    const Stopped& stopped, std::string& why) const {
  const Survey others = survey(need.claimant, standings(need.claimant, &stopped));
  std::vector<Eviction> plan =
      plan_eviction({need.tier(), need.of_base, missing.bytes, missing.of_mates}, others.holders);
  const std::size_t returning = need.returning();
  const bool is_allowed =
      need.claimant == nullptr || need.room <= ledger_.allowance(need.claimant->id()) + returning;
  std::size_t bytes = 0;
  for (const Eviction& eviction : plan) bytes += eviction.bytes;
  // What comes back leaves its place to what goes, page by page.
  if (!plan.empty() && (!is_allowed || bytes > ledger_.evictable(need.of_base) + returning)) {
    why = host_memory_is_full();
    plan.clear();
  }
  return plan;
}

// Where nobody can give way: whether that may be otherwise once others have let go of the contexts
// that they have stopped, and if so, waits for it. What comes back is waited for only by the base
// of a higher tier, so that nobody waits for somebody who waits for him.
bool Manager::await_others(Lock& lock, const Need& need, Stopped& victims) {
  const auto comes_back = [&](const Context* context) {
    return context->is_moving() && context->tier() < need.tier();
  };
  const std::vector<Context*> contexts = all();
  const bool may_change =
      stopped_victims_ != victims.count() ||
      (need.of_base && std::any_of(contexts.begin(), contexts.end(), comes_back));
  if (!may_change || Clock::now() >= need.deadline) return false;
  victims.let_go();
  moved_.wait_until(lock, need.deadline);
  return true;
}

// After a round that came to nothing: whether it is worth another one, and if so, lets go of the
// victims and waits.
bool Manager::may_try_again(Clock::time_point deadline, const Round& round,
                            const std::optional<Error>& failure, Stopped& victims,
                            std::string& why) {
  if (failure && failure->code() != ErrorCode::busy) {
    why = failure->what();
    return false;
  }
  if (!failure && !round.in_use) {
    why = host_memory_is_full();
    return false;
  }
  if (Clock::now() >= deadline) {
    const auto limit = std::chrono::duration_cast<std::chrono::milliseconds>(claim_timeout_);
    const std::string time = std::to_string(limit.count()) + " ms";
    why = failure
              ? "it took longer than claim_timeout allows (" + time +
                    ", and 4 s a GiB, 50 ms a page at least): " + failure->what()
              : "context '" + round.in_use->name() + "' is in use and did not yield within " + time;
    return false;
  }
  {
    const std::lock_guard lock(mutex_);
    if (round.in_use) victims.have_yield(*round.in_use);
    if (failure) victims.be_more_patient();
    victims.let_go();
  }
  std::this_thread::sleep_for(kLookAgain);
  await_captures(deadline);
  return true;
}

// While nobody is stopped for it: who captures may wait for one of them. If they do not end in time
// a move says so.
void Manager::await_captures(Clock::time_point deadline) {
  try {
    device_->await_captures(std::max<std::chrono::nanoseconds>(deadline - Clock::now(), {}));
  } catch (const Restless&) {
  }
}

// Evicts others until the need is met; false with the reason if it cannot be.
bool Manager::make_room(Need need, std::string& why) {
  Stopped victims(*this, /*victims=*/true);
  for (;;) {
    Round round(need.claimant, victims, need.deadline);
    bool is_chosen = false;
    {
      Lock lock(mutex_);
      const Missing missing = missing_of(need);
      if (missing.is_none()) return true;
      const std::vector<Eviction> evictions = plan(need, missing, victims, why);
      if (evictions.empty()) {
        if (!await_others(lock, need, victims)) return false;
        continue;
      }
      is_chosen = choose_outs(evictions, need.of_base, victims, round);
    }
    std::optional<Error> failure;
    if (is_chosen) {
      failure = carry_out(round);
    } else {
      settle(round, 0);
    }
    const bool is_progress = !failure && !round.pages.empty() && !round.in_use;
    need.deadline += round.time_for_moved();
    if (!is_progress && is_chosen && !may_try_again(need.deadline, round, failure, victims, why))
      return false;
  }
}

// Nothing, with the reason why nobody can give way.
void* Manager::explained(const Need& need, std::string& why) {
  const std::lock_guard lock(mutex_);
  const Stopped none(*this, /*victims=*/true);
  plan(need, missing_of(need), none, why);
  return nullptr;
}

bool Manager::give_way(std::size_t bytes) {
  const std::size_t given = trim();
  const Blocking blocking;
  try {
    std::string why;
    const Need need{nullptr, bytes, false, Clock::now() + claim_timeout_};
    return make_room(need, why) || given > 0;
  } catch (const Error&) {
    return given > 0;  // whoever asked is out of memory, and says so himself
  }
}

// Coming back ------------------------------------------------------------------------------------

// Enters a context that moves or is evicted, or whose producer moves.
void Manager::admit(Context& context, bool keeps_active) {
  const Blocking blocking;
  Stopped self(*this, /*victims=*/false);
  Return way(*this, context);
  do {
    Lock lock(mutex_);
    bool is_evicted = true;
    for (;;) {
      moved_.wait(lock, [&] {
        const bool is_kept_out = context.waiting_ > 0 || context.joins_ > 0;
        return !context.is_moving() && (!is_kept_out || context.sessions() > 0);
      });
      require_open(context);
      if (context.try_begin_session(keeps_active)) return;
      if ((context.sessions_.load() & Context::kEvicted) != 0) {
        // What is free there need not come back.
        const ContextLock context_lock(context.mutex_);
        give_up_pages(context, SIZE_MAX);
      }
      // Nothing comes back under consumers at work that cannot be held. It is valid where it is.
      is_evicted = device_->properties().can_hold || !is_used(context);
      if (!is_evicted || self.stop(context)) break;
    }
    if (!is_evicted) {
      begin_session(context, keeps_active);
      return;
    }
  } while (!bring_back(way, self));
  const std::lock_guard lock(mutex_);
  require_open(context);
  if ((context.sessions_.load() & Context::kMisplaced) != 0) replace_stream(context);
  begin_session(context, keeps_active);
  self.let_go();
}

// Of a context that nobody else can enter or stop meanwhile.
void Manager::begin_session(Context& context, bool keeps_active) {
  if (keeps_active) {
    context.sessions_.fetch_add(1, std::memory_order_acq_rel);
    context.count_session();
  }
  context.last_use_.store(Context::next_use(), std::memory_order_relaxed);
}

bool Manager::is_all_back(const Context& context) const {
  const std::lock_guard lock(mutex_);
  const ContextLock context_lock(context.mutex_);
  return context.live_pages(/*evicted=*/true).empty();
}

// Of a context that the caller has stopped, as `self`. Out and in go together, as far as there is
// room. False if it has to be stopped again: a stream may wait for a thread that waits for it.
bool Manager::bring_back(Return& way, Stopped& self) {
  Context& context = way.context;
  Stopped& victims = way.victims;
  Need& need = way.need;
  for (;;) {
    Round round(&context, victims, need.deadline);
    std::string why;
    std::optional<EventId> awaited;
    std::optional<Error> failure;
    bool is_chosen = true;
    bool is_possible = true;
    bool asks_reliefs = false;
    {
      Lock lock(mutex_);
      const Ledger::Account& account = ledger_.account(context.id());
      {
        const ContextLock context_lock(context.mutex_);
        need.room = context.live_pages(/*evicted=*/true).size() * context.page_bytes();
      }
      if (need.room == 0) return true;
      need.of_base = account.resident + need.room <= account.base;
      Missing missing = missing_of(need);
      if (!missing.is_none() && obtainable(context, need.of_base, standings(&context, &victims),
                                           need.returning()) >= need.room) {
        reclaim_for(context, need.room);
        missing = missing_of(need);
        if (!missing.is_none()) awaited = first_retired();
      }
      asks_reliefs = !missing.is_none() && !awaited && !way.is_relieved;
      std::vector<Eviction> evictions;
      if (!missing.is_none() && !awaited && !asks_reliefs) {
        evictions = plan(need, missing, victims, why);
        is_possible = !evictions.empty();
        if (!is_possible && await_others(lock, need, victims)) continue;
      }
      if (is_possible && !awaited && !asks_reliefs) {
        if (std::exchange(way.is_first, false)) {
          const ContextLock context_lock(context.mutex_);
          ++context.counters_.restores;
        }
        is_chosen = choose_outs(evictions, need.of_base, victims, round);
        if (is_chosen) failure = choose_ins(context, round);
      }
    }
    if (!is_possible) refuse_restore(context, why);
    if (awaited) {
      device_->synchronize_event(*awaited);
      const std::lock_guard lock(mutex_);
      collect_all_retired();
      continue;
    }
    if (asks_reliefs) {
      {
        // Whoever is asked may wait for it.
        const std::lock_guard lock(mutex_);
        victims.let_go();
        self.let_go();
      }
      way.is_relieved = !relieve(way.reliefs, /*device_is_short=*/true);
      return false;
    }
    if (is_chosen && !round.pages.empty()) {
      failure = carry_out(round);
    } else {
      settle(round, 0);
    }
    const bool is_progress = !is_chosen || (!failure && !round.pages.empty());
    need.deadline += round.time_for_moved();
    if (is_progress && (Clock::now() < need.deadline || is_all_back(context))) continue;
    if (is_progress) failure = Error(ErrorCode::busy, "its pages moved too slowly");
    {
      const std::lock_guard lock(mutex_);
      self.let_go();
    }
    if (!may_try_again(need.deadline, round, failure, victims, why)) {
      const bool is_short = !failure || failure->code() == ErrorCode::out_of_memory;
      refuse_restore(context, why, is_short ? ErrorCode::out_of_memory : failure->code());
    }
    return false;
  }
}

}  // namespace pgk
