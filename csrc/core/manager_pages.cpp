// The manager's second half: how pages come to arenas and leave them.
#include <algorithm>

#include "core/manager.h"

namespace pgk {
namespace {

using ContextLock = std::lock_guard<SpinLock>;

}  // namespace

void* Manager::allocate_slow(Context& context, std::size_t bytes) {
  std::string device_said;
  {
    const std::lock_guard lock(mutex_);
    device_said_.clear();
    const ContextLock context_lock(context.mutex_);
    require_live(context);
    const std::size_t granules = bytes / kGranule + (bytes % kGranule != 0);
    if (bytes <= ledger_.account(context.id()).max) {
      // Another thread may have made room between the miss and the lock.
      std::uint32_t start = context.arena_.allocate(static_cast<std::uint32_t>(granules));
      if (start == Arena::kNone && grow(context, static_cast<std::uint32_t>(granules))) {
        ++context.counters_.growths;
        start = context.arena_.allocate(static_cast<std::uint32_t>(granules));
      }
      if (start != Arena::kNone) {
        ++context.counters_.allocations;
        return reinterpret_cast<void*>(context.address_ + start * kGranule);
      }
    }
    ++context.counters_.refusals;
    device_said = device_said_;
  }
  refuse(context, bytes, device_said);
}

// Makes a request of `granules` succeed, or returns false. Free pages are given up in the order of
// what they cost: the context's own that the new block cannot use, those of others if the device
// is short, then all of its own. Others are left alone if that would not help.
bool Manager::grow(Context& context, std::uint32_t granules) {
  const Ledger::Account& account = ledger_.account(context.id());
  const std::size_t page = context.page_bytes();
  if (context.arena_.used_bytes() + granules * kGranule > account.max) return false;

  auto plan = context.arena_.plan_growth(granules);
  const auto pages_beyond = [&](std::size_t allowed_bytes) {
    const std::size_t allowed = allowed_bytes / page;
    return plan->count > allowed ? plan->count - allowed : 0;
  };
  const auto over_budget = [&] { return pages_beyond(account.max - account.resident); };
  const auto short_of_room = [&] { return pages_beyond(ledger_.room(context.id())); };
  const auto make_room = [&] {
    if (short_of_room() > 0) give_up_pages(context, short_of_room(), plan);
    if (over_budget() == 0 && short_of_room() > 0) {
      reclaim(ledger_.uncommitted() + short_of_room() * page, &context);
    }
    return short_of_room() == 0;
  };
  if (!plan || !make_room()) {
    give_up_pages(context, SIZE_MAX);
    plan = context.arena_.plan_growth(granules);
    if (!plan || !make_room()) return false;
  }
  const std::uint32_t resident = context.arena_.resident_pages();
  map_pages(context, *plan);
  return context.arena_.resident_pages() == resident + plan->count;
}

// Pages mapped before a device call failed stay with the arena, as free pages.
void Manager::map_pages(Context& context, Arena::PageRun pages) {
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
  if (mapped > 0) context.arena_.add_pages({pages.first, mapped});
}

// Returns how many of at most `count` free pages were unmapped.
std::size_t Manager::give_up_pages(Context& context, std::size_t count,
                                   std::optional<Arena::PageRun> beside) {
  std::size_t given = 0;
  for (const Arena::FreeRun& run : context.arena_.free_runs(beside)) {
    if (given == count) break;
    const std::size_t wanted = std::min<std::size_t>(run.pages.count, count - given);
    const std::size_t unmapped = unmap_tail(context, run, wanted);
    given += unmapped;
    if (unmapped < wanted) break;
  }
  return given;
}

// Unmaps up to `count` pages from the end of the run, stopping where the device refuses.
std::size_t Manager::unmap_tail(Context& context, const Arena::FreeRun& run, std::size_t count) {
  const std::size_t page_bytes = context.page_bytes();
  const std::size_t base_pages = ledger_.account(context.id()).base / page_bytes;
  const std::uint32_t end = run.pages.first + run.pages.count;
  std::uint32_t unmapped = 0;
  try {
    for (; unmapped < count; ++unmapped) {
      const auto entry = context.handles_.find(end - unmapped - 1);
      const Handle handle = entry->second;
      device_->unmap(context.address_of(entry->first), handle);
      context.handles_.erase(entry);
      ledger_.refund(context.id(), page_bytes);
      pool_.give_back(handle, base_pages > context.handles_.size());
    }
  } catch (const Error& error) {
    // The page is still mapped and booked; whoever needed it sees that too little came.
    device_said_ = error.what();
  }
  context.counters_.pages_unmapped += unmapped;
  if (unmapped > 0) context.arena_.remove_pages({run.block, {end - unmapped, unmapped}});
  return unmapped;
}

// Takes free pages that contexts hold beyond their bases, orphans first, then by tier, until
// `goal` bytes are uncommitted. Takes none if they would not suffice.
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
  for (Context* context : contexts) {
    if (ledger_.uncommitted() >= goal) return;
    if (context == except) continue;
    const ContextLock lock(context->mutex_);
    const Ledger::Account& account = ledger_.account(context->id());
    if (account.resident <= account.base) continue;
    const std::size_t wanted =
        std::min(account.resident - account.base, goal - ledger_.uncommitted());
    give_up_pages(*context, (wanted + context->page_bytes() - 1) / context->page_bytes());
  }
}

}  // namespace pgk
