// The manager's second half: how pages come to arenas and leave them.
#include <algorithm>
#include <functional>

#include "core/blocking.h"
#include "core/manager.h"

namespace pgk {
namespace {

using ContextLock = std::lock_guard<SpinLock>;

}  // namespace

void* Manager::allocate_slow(Context& context, std::size_t bytes, StreamId stream, bool may_wait,
                             std::string* device_said) {
  const Blocking blocking(may_wait);
  const std::size_t granules = bytes / kGranule + (bytes % kGranule != 0);
  for (;;) {
    std::optional<EventId> awaited;
    {
      const std::lock_guard lock(mutex_);
      device_said_.clear();
      const ContextLock context_lock(context.mutex_);
      require_live(context);
      const std::size_t used = context.arena_.used_bytes();
      if (granules < Arena::kNone &&
          used + granules * kGranule <= ledger_.account(context.id()).max) {
        const std::uint32_t start =
            obtain(context, static_cast<std::uint32_t>(granules), context.lane_for(stream));
        if (start != Arena::kNone) return context.finish_allocation(start, granules);
        if (may_wait) {
          awaited = awaited_event(context, static_cast<std::uint32_t>(granules),
                                  context.lane_for(stream));
        }
      }
      if (device_said != nullptr) *device_said = device_said_;
    }
    if (!awaited) return nullptr;
    device_->synchronize_event(*awaited);
    const std::lock_guard lock(mutex_);
    collect_all_retired();
  }
}

// A block for the request, or kNone; then something may be on its way that is worth waiting for.
std::uint32_t Manager::obtain(Context& context, std::uint32_t granules, Arena::Lane lane) {
  const auto serve = [&] { return context.arena_.allocate(granules, lane); };
  // Another thread may have made room between the miss and the lock.
  std::uint32_t start = serve();
  if (start == Arena::kNone && context.settle_fences()) start = serve();
  if (start != Arena::kNone) return start;
  collect_retired(context);
  return grow(context, granules, lane) ? serve() : Arena::kNone;
}

// Makes a request of `granules` succeed, or returns false. What has to give way is taken in the
// order of what it costs: nothing if there is room, memory of the context's other lanes, its own
// free pages that the new block cannot use, those of others if the device is short, then all of
// its own. Others are left alone if that would not help. Pages that work may still use do not
// come at once: the caller waits for them, without locks, and tries again.
bool Manager::grow(Context& context, std::uint32_t granules, Arena::Lane lane) {
  const Ledger::Account& account = ledger_.account(context.id());
  const std::size_t page = context.page_bytes();
  auto plan = context.arena_.plan_growth(granules, lane);
  const auto pages_beyond = [&](std::size_t allowed_bytes) {
    const std::size_t allowed = allowed_bytes / page;
    return plan->count > allowed ? plan->count - allowed : 0;
  };
  const auto over_budget = [&] { return pages_beyond(account.max - account.resident); };
  const auto short_of_room = [&] { return pages_beyond(ledger_.room(context.id())); };
  const auto make_room = [&] {
    if (short_of_room() > 0) give_up_pages(context, short_of_room(), lane, plan);
    if (over_budget() == 0 && short_of_room() > 0) {
      reclaim(ledger_.uncommitted() + short_of_room() * page, &context);
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
  const std::size_t base = ledger_.account(context.id()).base;
  std::uint32_t mapped = 0;
  try {
    for (; mapped < pages.count; ++mapped) {
      const std::uint32_t page = pages.first + mapped;
      const bool reserved = base / page_bytes > context.handles_.size();
      const Handle handle = pool_.take(page_bytes, reserved);
      try {
        device_->map(context.address_of(page), handle);
      } catch (...) {
        pool_.give_back(handle, reserved);
        throw;
      }
      context.handles_.emplace(page, handle);
      ledger_.charge(context.id(), page_bytes);
    }
  } catch (const Error& error) {
    device_said_ = error.what();
  }
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
  const std::size_t base_pages = ledger_.account(context.id()).base / page_bytes;
  const std::uint32_t end = run.first + run.count;
  std::uint32_t unmapped = 0;
  try {
    for (; unmapped < run.count; ++unmapped) {
      const auto entry = context.handles_.find(end - unmapped - 1);
      const Handle handle = entry->second;
      device_->unmap(context.address_of(entry->first), handle);
      context.handles_.erase(entry);
      ledger_.refund(context.id(), page_bytes);
      pool_.give_back(handle, base_pages > context.handles_.size());
    }
  } catch (const Error& error) {
    device_said_ = error.what();
  }
  context.counters_.pages_unmapped += unmapped;
  context.arena_.finish_retirement(run, unmapped);
}

void Manager::collect_retired(Context& context) {
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
      bytes <= account.max - account.resident && bytes > ledger_.room(context.id());
  return device_is_short ? first_retired() : std::nullopt;
}

std::optional<EventId> Manager::first_retired() const {
  for (const Context* context : all()) {
    if (!context->retired_.empty()) return context->retired_.front().event;
  }
  return std::nullopt;
}

// Takes free pages that contexts hold beyond their bases, orphans first, then by tier, until
// `goal` bytes are or will be uncommitted. Takes none if they would not suffice.
void Manager::reclaim(std::size_t goal, const Context* except) {
  if (ledger_.uncommitted() >= goal) return;
  std::size_t reachable = ledger_.uncommitted();
  for (const Context* context : all()) {
    if (context == except) continue;
    const ContextLock lock(context->mutex_);
    reachable += ledger_.account(context->id()).committed() - protected_bytes(*context);
  }
  if (reachable < goal) return;

  std::vector<Context*> contexts = all();
  std::stable_sort(contexts.begin(), contexts.end(), [](const Context* a, const Context* b) {
    const auto rank = [](const Context* c) {
      return c->state_ == Context::State::orphan ? -1 : static_cast<int>(c->tier());
    };
    return rank(a) < rank(b);
  });
  std::size_t coming = 0;
  for (Context* context : contexts) {
    if (ledger_.uncommitted() + coming >= goal) return;
    if (context == except) continue;
    const ContextLock lock(context->mutex_);
    collect_retired(*context);
    const Ledger::Account& account = ledger_.account(context->id());
    if (account.resident <= account.base) continue;
    const std::size_t spare = account.resident - account.base;
    const auto retired = [&] { return std::min(spare, context->retired_bytes()); };
    const std::size_t already = retired();
    coming += already;
    if (ledger_.uncommitted() + coming >= goal) return;
    const std::size_t wanted = std::min(spare - already, goal - ledger_.uncommitted() - coming);
    give_up_pages(*context, (wanted + context->page_bytes() - 1) / context->page_bytes());
    coming += retired() - already;
  }
}

std::size_t Manager::trim() {
  std::size_t before = 0;
  {
    const std::lock_guard lock(mutex_);
    require_usable();
    before = pool_.existing_bytes();
    for (Context* context : all()) {
      const ContextLock context_lock(context->mutex_);
      context->settle_fences();
      give_up_pages(*context, SIZE_MAX);
    }
  }
  until_settled([this] { return first_retired(); });
  const std::lock_guard lock(mutex_);
  collect_orphans();
  pool_.trim();
  return before - std::min(before, pool_.existing_bytes());
}

// Repeats `step`, which runs with the manager's lock, until it returns no event to wait for.
void Manager::until_settled(const std::function<std::optional<EventId>()>& step) {
  for (;;) {
    std::optional<EventId> awaited;
    {
      const std::lock_guard lock(mutex_);
      collect_all_retired();
      awaited = step();
    }
    if (!awaited) return;
    const Blocking blocking;
    device_->synchronize_event(*awaited);
  }
}

}  // namespace pgk
