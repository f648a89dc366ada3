// The manager's eleventh part: what a request that missed goes through before it is refused.
#include <algorithm>
#include <utility>

#include "core/blocking.h"
#include "core/manager.h"
#include "core/manager_moves.h"
#include "core/scope_exit.h"

namespace pgk {
namespace {

using ContextLock = std::lock_guard<SpinLock>;

}  // namespace

void* Manager::allocate_slow(Context& context, std::size_t bytes, StreamId stream, Effort effort,
                             std::string* said) {
  const Blocking blocking(effort != Effort::ready);
  const std::size_t granules = bytes / kGranule + (bytes % kGranule != 0);
  Need need{&context, 0, false, Clock::now() + claim_timeout_};
  bool is_asked = false;
  Reliefs::Left reliefs;
  std::string why;
  const ScopeExit tell([&] {
    if (said != nullptr) *said = why;
  });
  for (;;) {
    std::optional<EventId> awaited;
    std::size_t available = 0;
    bool others_move = false;
    bool others_can_help = false;
    bool is_over = false;  // its budget
    {
      Lock lock(mutex_);
      if (effort != Effort::ready) wait_until_still(lock, context);
      device_said_.clear();
      const ContextLock context_lock(context.mutex_);
      require_live(context);
      const Ledger::Account& account = ledger_.account(context.id());
      const std::size_t used = context.arena_.used_bytes();
      if (context.is_moving() || granules >= Arena::kNone) return nullptr;
      is_over = used + granules * kGranule > account.max;
      if (is_over && effort == Effort::ready) return nullptr;
      refresh_outside();
      const auto count = static_cast<std::uint32_t>(granules);
      const Arena::Lane lane = context.lane_for(stream);
      const std::uint32_t start = is_over ? Arena::kNone : obtain(context, count, lane);
      if (start != Arena::kNone) return context.finish_allocation(start, granules);
      why = device_said_.empty() ? "" : "the device said: " + device_said_;
      if (effort == Effort::ready) return nullptr;
      if (!is_over) awaited = awaited_event(context, count, lane);
      if (!is_over && !awaited) {
        const auto plan = context.arena_.plan_growth(count, lane);
        need.room = plan ? plan->count * context.page_bytes() : 0;
        need.of_base = account.resident + need.room <= account.base;
        others_can_help =
            need.room > ledger_.free_for(context.id()) && need.room <= account.max - account.held();
        if (others_can_help) {
          if (why.empty()) why = nobody_gives_way(context, need.room);
          available = obtainable(context, need.of_base, standings(&context));
          others_move = stopped_victims_ > 0;
        }
      }
    }
    if (awaited) {
      device_->synchronize_event(*awaited);
      const std::lock_guard lock(mutex_);
      collect_all_retired();
      continue;
    }
    if (relieve(reliefs, /*device_is_short=*/!why.empty())) continue;
    if (!others_can_help) {
      // What is fenced is not in use, so it does not help who is over its budget.
      if (!is_over && await_all_streams(context)) continue;
      return nullptr;
    }
    if (!need.of_base && !is_asked) {
      if (available < need.room) {
        // Not before it is known who can give way.
        if (!others_move) {
          if (await_all_streams(context)) continue;
          return explained(need, why);
        }
        Lock lock(mutex_);
        if (stopped_victims_ > 0) moved_.wait_until(lock, need.deadline);
        if (Clock::now() >= need.deadline) {
          why = "others that are moving did not come to an end within claim_timeout";
          return nullptr;
        }
        continue;
      }
      is_asked = true;
      if (!ask(context, bytes, available)) {
        why = "a memory pressure handler refused to have others evicted";
        return nullptr;
      }
      continue;  // it may have made room
    }
    if (!make_room(need, why) && !await_all_streams(context)) return nullptr;
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

// For memory of its own that work on any stream may still use; false if there is none. Without any
// lock.
bool Manager::await_all_streams(const Context& context) {
  std::optional<EventId> event;
  {
    const ContextLock lock(context.mutex_);
    event = context.event_of_all();
  }
  if (event) device_->synchronize_event(*event);
  return event.has_value();
}

// Before others give way. Without any lock.
bool Manager::relieve(Reliefs::Left& left, bool device_is_short) {
  std::shared_ptr<const Reliefs> reliefs;
  {
    const std::lock_guard lock(mutex_);
    reliefs = reliefs_;
  }
  return reliefs && left.ask(*reliefs, device_is_short);
}

void Manager::set_reliefs(std::vector<Reliefs::Relief> reliefs) {
  auto next = std::make_shared<const Reliefs>(std::move(reliefs));
  // The old ones may be Python's: they go after the lock.
  const std::lock_guard lock(mutex_);
  reliefs_.swap(next);
}

}  // namespace pgk
