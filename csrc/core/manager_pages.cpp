// The manager's fourth part: how pages come to arenas and leave them.
#include <algorithm>
#include <functional>
#include <utility>

#include "core/blocking.h"
#include "core/manager.h"
#include "core/manager_moves.h"
#include "core/scope_exit.h"

namespace pgk {
namespace {

using ContextLock = std::lock_guard<SpinLock>;

}  // namespace

// Makes a request of `granules` succeed, or returns false. What has to give way is taken in the
// order of what it costs: nothing if there is room, or own free pages where that keeps
// fragmentation down for nothing; memory of the context's other lanes, its own free pages that the
// new block cannot use, those of others if the device is short, then all of its own. Others are
// left alone if that would not help. Pages that work may still use do not come at once: the caller
// waits for them, without locks, and tries again.
bool Manager::grow(Context& context, std::uint32_t granules, Arena::Lane lane) {
  const Ledger::Account& account = ledger_.account(context.id());
  const std::size_t page = context.page_bytes();
  auto plan = context.arena_.plan_growth(granules, lane);
  const auto pages_beyond = [&](std::size_t allowed_bytes) {
    const std::size_t allowed = allowed_bytes / page;
    return plan->count > allowed ? plan->count - allowed : 0;
  };
  const auto over_budget = [&] { return pages_beyond(account.max - account.held()); };
  const auto short_of_room = [&] { return pages_beyond(ledger_.room(context.id())); };
  const auto make_room = [&] {
    if (short_of_room() > 0) give_up_pages(context, short_of_room(), lane, plan);
    if (over_budget() == 0 && short_of_room() > 0) {
      const std::size_t bytes = plan->count * page;
      const bool of_base = account.resident + bytes <= account.base;
      // Others keep what would not suffice.
      if (obtainable(context, of_base, standings(&context)) >= bytes) {
        reclaim_for(context, bytes);
      }
    }
    return short_of_room() == 0;
  };
  if ((!plan || short_of_room() > 0) && adopt_lanes(context, lane)) {
    const std::uint32_t start = context.arena_.allocate(granules, lane);
    if (start != Arena::kNone) {
      context.arena_.release(start);  // for the caller, whose request will hit it
      return true;
    }
    plan = context.arena_.plan_growth(granules, lane);
  }
  if (plan && recycle_pages(context, granules, lane, *plan)) {
    plan = context.arena_.plan_growth(granules, lane);
  }
  if (!plan || !make_room()) {
    if (awaited_event(context, granules, lane)) return false;
    give_up_pages(context, SIZE_MAX, lane);
    plan = context.arena_.plan_growth(granules, lane);
    if (!plan || !make_room()) return false;
  }
  const std::uint32_t resident = context.arena_.resident_pages();
  ++context.counters_.growths;
  map_pages(context, *plan, lane);
  return context.arena_.resident_pages() == resident + plan->count;
}

// Lets `lane` use what the context's other lanes in its zone have free: on the device, work of its
// stream from now on starts after what theirs hold.
bool Manager::adopt_lanes(Context& context, Arena::Lane lane) {
  Arena& arena = context.arena_;
  bool adopted = false;
  for (std::size_t i = 0; i < context.lanes_.size(); ++i) {
    const auto other = static_cast<Arena::Lane>(i);
    const StreamId source = context.lanes_[other];
    const StreamId target = context.lanes_[lane];
    if (other == lane || arena.is_upper(other) != arena.is_upper(lane) || !arena.has_free(other)) {
      continue;
    }
    try {
      if (device_->is_capturing(source)) continue;
      if (!device_->is_idle(source)) {
        if (device_->is_capturing(target)) continue;
        device_->wait(target, device_->record(source));
      }
    } catch (const Error& error) {
      device_said_ = error.what();
      continue;
    }
    arena.adopt(other, lane);
    adopted = true;
  }
  return adopted;
}

// Pages mapped before a device call failed stay with the arena, as free pages.
void Manager::map_pages(Context& context, Arena::PageRun pages, Arena::Lane lane) {
  const std::size_t page_bytes = context.page_bytes();
  const HandlePool::Keep others = promised_to_others(context);
  const HandlePool::Keep not_lent = not_lent_to(context);
  std::uint32_t mapped = 0;
  try {
    for (; mapped < pages.count; ++mapped) {
      const std::uint32_t page = pages.first + mapped;
      const Handle handle = pool_.take(page_bytes, others, not_lent);
      try {
        device_->map(context.address_of(page), handle);
      } catch (...) {
        pool_.give_back(handle);
        throw;
      }
      context.pages_.emplace(page, Context::Page{handle, std::nullopt, std::nullopt});
      ledger_.charge(context.id(), page_bytes);
    }
  } catch (const Error& error) {
    device_said_ = error.what();
  }
  pool_.make_up(ledger_.unfilled(), ledger_.lent());
  context.counters_.pages_mapped += mapped;
  if (mapped > 0) context.arena_.add_pages({pages.first, mapped}, lane);
}

// Unmaps up to `count` free pages; those that work may still use are retired until it is done. What
// the lane of `requester` has free stays there, and may become more.
void Manager::give_up_pages(Context& context, std::size_t count, Arena::Lane requester,
                            std::optional<Arena::PageRun> beside) {
  // Per lane: 0 if its stream is past all that it was given, an event if not, nothing if it
  // cannot be asked. One event serves all pages of a lane, since they are all free already.
  std::map<Arena::Lane, std::optional<EventId>> known;
  const auto ask = [&](StreamId stream) -> std::optional<EventId> {
    try {
      if (stream == kNoStream) return 0;
      if (device_->is_capturing(stream)) return std::nullopt;
      if (device_->is_idle(stream)) return 0;
      return device_->record(stream);
    } catch (const Error& error) {
      device_said_ = error.what();
      return std::nullopt;
    }
  };
  const auto passed = [&](Arena::Lane lane) {
    const auto [entry, is_new] = known.try_emplace(lane);
    if (is_new) entry->second = ask(context.lanes_[lane]);
    return entry->second;
  };
  if (context.is_moving()) return;
  // Pages that lanes share are free only once the free parts are in one lane.
  const Arena::Lane target = context.arena_.is_upper(requester) ? 0 : requester;
  for (std::size_t lane = 0; lane < context.lanes_.size(); ++lane) {
    const auto source = static_cast<Arena::Lane>(lane);
    if (source == target || context.arena_.is_upper(source)) continue;
    if (context.arena_.has_free(source) && passed(source) == 0) {
      context.arena_.adopt(source, target);
    }
  }
  std::size_t given = 0;
  for (Arena::FreeRun run : context.arena_.free_runs(beside)) {
    if (given >= count) break;
    const std::optional<EventId> event = passed(run.lane);
    if (!event) continue;
    const auto wanted =
        static_cast<std::uint32_t>(std::min<std::size_t>(run.pages.count, count - given));
    run.pages = {run.pages.first + run.pages.count - wanted, wanted};
    context.arena_.retire(run);
    given += wanted;
    if (*event == 0) {
      unmap_retired(context, run.pages);
    } else {
      context.retired_.push_back({run.pages, *event});
    }
  }
}

// From the end of the run, stopping where the device refuses: the rest is free again, still mapped
// and booked, and whoever needed it sees that too little came.
void Manager::unmap_retired(Context& context, Arena::PageRun run) {
  const std::size_t page_bytes = context.page_bytes();
  const std::uint32_t end = run.first + run.count;
  std::uint32_t unmapped = 0;
  try {
    for (; unmapped < run.count; ++unmapped) {
      const auto entry = context.pages_.find(end - unmapped - 1);
      const Context::Page page = entry->second;
      device_->unmap(context.address_of(entry->first), page.handle);
      context.pages_.erase(entry);
      if (page.backup) host_pool_.give_back(*page.backup);
      if (page.handle.on_host) {
        if (--context.evicted_pages_ == 0) context.sessions_.fetch_and(~Context::kEvicted);
        ledger_.refund_evicted(context.id(), page_bytes);
        host_pool_.give_back(page.handle);
      } else {
        ledger_.refund(context.id(), page_bytes);
        pool_.give_back(page.handle);
      }
    }
  } catch (const Error& error) {
    device_said_ = error.what();
  }
  context.counters_.pages_unmapped += unmapped;
  context.arena_.finish_retirement(run, unmapped);
}

void Manager::collect_retired(Context& context) {
  if (context.is_moving()) return;
  std::erase_if(context.retired_, [&](const Context::Retired& retired) {
    try {
      if (!device_->is_done(retired.event)) return false;
    } catch (const Error& error) {
      device_said_ = error.what();
      return false;
    }
    unmap_retired(context, retired.pages);
    return true;
  });
}

void Manager::collect_all_retired() {
  for (Context* context : all()) {
    const ContextLock lock(context->mutex_);
    if (!context->retired_.empty()) collect_retired(*context);
  }
}

// Something whose completion may let the request succeed: memory of the context itself, or, if only
// the device is short, of others.
std::optional<EventId> Manager::awaited_event(const Context& context, std::uint32_t granules,
                                              Arena::Lane lane) const {
  if (const auto own = context.awaited_event()) return own;
  const auto plan = context.arena_.plan_growth(granules, lane);
  if (!plan) return std::nullopt;
  const Ledger::Account& account = ledger_.account(context.id());
  const std::size_t bytes = plan->count * context.page_bytes();
  const bool device_is_short =
      bytes <= account.max - account.held() && bytes > ledger_.room(context.id());
  return device_is_short ? first_retired() : std::nullopt;
}

std::optional<EventId> Manager::first_retired() const {
  for (const Context* context : all()) {
    if (!context->is_moving() && !context->retired_.empty()) {
      return context->retired_.front().event;
    }
  }
  return std::nullopt;
}

// Has contexts give up free pages until nothing is `missing` or all of it is on its way; of each
// at most what is `spare`. Orphans first, then by tier.
void Manager::reclaim(const std::function<std::size_t()>& missing,
                      const std::function<std::size_t(const Context&)>& spare,
                      const Context* except) {
  std::vector<Context*> contexts = all();
  std::stable_sort(contexts.begin(), contexts.end(), [](const Context* a, const Context* b) {
    const auto rank = [](const Context* c) {
      return c->state_ == Context::State::orphan ? -1 : static_cast<int>(c->tier());
    };
    return rank(a) < rank(b);
  });
  std::size_t coming = 0;
  for (Context* context : contexts) {
    if (missing() <= coming) return;
    if (context == except) continue;
    const ContextLock lock(context->mutex_);
    collect_retired(*context);
    const std::size_t limit = spare(*context);
    if (limit == 0) continue;
    const auto retired = [&] { return std::min(limit, context->retired_bytes()); };
    const std::size_t already = retired();
    coming += already;
    if (missing() <= coming) return;
    const std::size_t page = context->page_bytes();
    const std::size_t wanted = std::min(limit - already, missing() - coming);
    // Evicted pages among them would not help, and cost nothing to lose.
    give_up_pages(*context, context->evicted_pages_ > 0 ? SIZE_MAX : (wanted + page - 1) / page);
    coming += retired() - already;
  }
}

// The same so that the context can have `bytes` more, in its partition and on the device.
void Manager::reclaim_for(const Context& context, std::size_t bytes) {
  const Ledger::Id id = context.id();
  const Ledger::PartitionId partition = ledger_.account(id).partition;
  const auto spare_within = [&](Ledger::PartitionId within) {
    return [this, within, tier = context.tier()](const Context& other) {
      const Ledger::Account& account = ledger_.account(other.id());
      return Ledger::is_in(account, within) ? Ledger::spare(account, tier) : 0;
    };
  };
  reclaim([&] { return ledger_.shortage_in_partition(id, bytes); }, spare_within(partition),
          &context);
  reclaim([&] { return ledger_.shortage(id, bytes); }, spare_within(Ledger::kDevice), &context);
}

// The same for a reservation, unless it would not suffice. What is lent has to come back first.
void Manager::reclaim_for_base(std::size_t base, Ledger::PartitionId partition,
                               const Context* except) {
  if (ledger_.uncommitted(partition) >= base) return;
  const auto missing = [&] {
    const std::size_t needed = base + ledger_.lent(partition);
    return needed - std::min(needed, ledger_.uncommitted(partition));
  };
  const auto beyond = [&](const Context& context, std::size_t kept) {
    const Ledger::Account& held = ledger_.account(context.id());
    return Ledger::is_in(held, partition) ? held.committed() - std::max(kept, held.base) : 0;
  };
  std::size_t reachable = 0;
  for (const Context* context : all()) {
    if (context == except) continue;
    const ContextLock lock(context->mutex_);
    reachable += beyond(*context, protected_bytes(*context));
  }
  if (reachable < missing()) return;
  reclaim(missing, [&](const Context& context) { return beyond(context, 0); }, except);
}

}  // namespace pgk
