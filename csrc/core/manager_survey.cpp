// The manager's ninth part: what others could give to a context that wants more.
#include <algorithm>

#include "core/manager_moves.h"

namespace pgk {
namespace {

using ContextLock = std::lock_guard<SpinLock>;

}  // namespace

// What keeps the context where it is: its own sessions, or those of a declared consumer.
bool Manager::is_used(const Context& context) const {
  return context.sessions() > 0 ||
         std::any_of(context.consumers_.begin(), context.consumers_.end(), [](const auto& known) {
           const auto consumer = known.lock();
           return consumer != nullptr && consumer->sessions() > 0;
         });
}

// Of all but `except`, whose lock the caller may hold, and those that others have stopped.
std::vector<Manager::Standing> Manager::standings(const Context* except,
                                                  const Stopped* stopped) const {
  std::vector<Standing> standings;
  for (const Context* context : all()) {
    const bool is_others = stopped == nullptr || !stopped->contains(*context);
    if (context == except || (context->is_moving() && is_others)) continue;
    const ContextLock lock(context->mutex_);
    const std::size_t idle_pages = context->idle_device_pages();
    standings.push_back(
        {.holder = {.id = context->id(),
                    .tier = context->tier(),
                    .orphan = context->state_ == Context::State::orphan,
                    .active = is_used(*context),
                    .last_use = context->last_use_.load(std::memory_order_relaxed),
                    .spare = (context->device_pages() - idle_pages) * context->page_bytes(),
                    .page = context->page_bytes()},
         .account = &ledger_.account(context->id()),
         .cached = idle_pages * context->page_bytes(),
         .is_pinned = context->pins_ > 0});
  }
  return standings;
}

// What the others could give to a claimant; without one, what best effort could give to memory
// outside of contexts.
Manager::Survey Manager::survey(const Context* claimant,
                                const std::vector<Standing>& standings) const {
  Survey survey;
  const Tier tier = claimant == nullptr ? Tier::best_effort : claimant->tier();
  const Ledger::PartitionId partition =
      claimant == nullptr ? Ledger::kDevice : ledger_.account(claimant->id()).partition;
  for (const Standing& standing : standings) {
    Holder holder = standing.holder;
    if (claimant != nullptr && holder.id == claimant->id()) continue;
    const Ledger::Account& account = *standing.account;
    const std::size_t spare = claimant == nullptr ? account.resident : Ledger::spare(account, tier);
    const std::size_t cached = std::min(spare, standing.cached);
    holder.mate = Ledger::is_in(account, partition);
    survey.cached += cached;
    survey.cached_by_mates += holder.mate ? cached : 0;
    survey.cached_beyond_bases += std::min(cached, account.committed() - account.base);
    if (standing.is_pinned || (holder.tier > tier && !holder.orphan)) continue;
    holder.spare = std::min(holder.spare, (spare - cached) / holder.page * holder.page);
    survey.holders.push_back(holder);
  }
  return survey;
}

// Bytes that the claimant could be charged with, if the others gave way. `returning` are those of
// its own that would leave their place in host memory.
std::size_t Manager::obtainable(const Context& claimant, bool of_base,
                                const std::vector<Standing>& standings,
                                std::size_t returning) const {
  const Survey others = survey(&claimant, standings);
  const Ledger::Id id = claimant.id();
  // What others hold of the claimant's own comes first.
  const auto reachable = [&](std::size_t free, std::size_t cached, std::size_t overdrawn,
                             bool of_mates) {
    const std::size_t live = evictable_bytes({claimant.tier(), of_base, 0, 0}, others.holders,
                                             of_mates, ledger_.evictable(of_base) + returning);
    return free + cached + live - std::min(free + cached + live, overdrawn);
  };
  return std::min({reachable(ledger_.free_for(id), others.cached, ledger_.shortage(id, 0), false),
                   reachable(ledger_.free_in_partition(id), others.cached_by_mates,
                             ledger_.shortage_in_partition(id, 0), true),
                   // Within a base there is only a loan to be had, whoever holds it.
                   ledger_.allowance(id) + returning + others.cached_beyond_bases});
}

}  // namespace pgk
