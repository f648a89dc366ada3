// The manager's second part: what is promised, and what is kept ready for it.
#include <algorithm>

#include "core/blocking.h"
#include "core/manager.h"

namespace pgk {
namespace {

using ContextLock = std::lock_guard<SpinLock>;

}  // namespace

// The handles that bases promise and the contexts do not hold: they are in the pool, unless lent.
HandlePool::Keep Manager::promised_to_others(const Context& claimant) const {
  return ledger_.unfilled(Tier::guaranteed, claimant.id());
}

// Of these, what contexts of the claimant's tier and below must keep from it.
HandlePool::Keep Manager::not_lent_to(const Context& claimant) const {
  return ledger_.unfilled(claimant.tier(), claimant.id());
}

// Handles of other sizes become what is promised before any is released.
void Manager::trim_pool() {
  const HandlePool::Keep keep = ledger_.unfilled();
  pool_.even_out(keep);
  pool_.trim(keep);
  pool_.make_up(keep, ledger_.lent());
}

// What is destroyed reserves nothing, and its budget is what it holds: it cannot grow any more.
void Manager::drop_reservation(Context& context) {
  ledger_.resize(context.id(), ledger_.account(context.id()).held(), 0);
}

// What memory outside of contexts takes of the capacity.
void Manager::refresh_outside() {
  try {
    const std::size_t within = pool_.existing_bytes() + device_->free_bytes();
    ledger_.set_outside(ledger_.capacity() - std::min(ledger_.capacity(), within));
  } catch (const Error& error) {
    device_said_ = error.what();
  }
}

// As much host memory as the contexts could need if all used their budgets.
void Manager::aim_host_pool() {
  const auto excess = [&](Ledger::PartitionId id) {
    const std::size_t budgets = ledger_.budgets(id);
    return budgets - std::min(budgets, ledger_.limit(id));
  };
  HostPool::Counts counts;
  for (const auto& context : contexts_) {
    const Ledger::Account& account = ledger_.account(context->id());
    const std::size_t beyond = std::min(
        account.max - account.base, std::max(excess(Ledger::kDevice), excess(account.partition)));
    counts[context->page_bytes()] += beyond / context->page_bytes();
  }
  host_pool_.aim_for(std::move(counts));
}

// For a base: others' free pages, what others can do without, and the device's work if that would
// free something.
void Manager::make_room_for_base(const std::function<Reservation()>& wanted) {
  const Blocking blocking;
  Reliefs::Left reliefs;
  bool is_short = false;
  const auto step = [&]() -> std::optional<EventId> {
    const Reservation reservation = wanted();
    refresh_outside();
    bool is_awaited = false;
    for (const Ledger::PartitionId id : {Ledger::kDevice, reservation.partition}) {
      reclaim_for_base(reservation.base, id, reservation.except);
      is_awaited |= ledger_.uncommitted(id) < reservation.base;
    }
    is_short = ledger_.outside() > 0 && ledger_.uncommitted(Ledger::kDevice) < reservation.base;
    return is_awaited ? first_retired() : std::nullopt;
  };
  do {
    until_settled(step);
  } while (is_short && relieve(reliefs, /*device_is_short=*/true));
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
  trim_pool();
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
