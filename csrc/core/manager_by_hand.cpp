// The manager's tenth part: contexts that are moved, kept and waited for by hand.
#include <algorithm>
#include <optional>
#include <utility>

#include "core/blocking.h"
#include "core/error.h"
#include "core/manager_moves.h"
#include "core/session.h"

namespace pgk {
namespace {

using ContextLock = std::lock_guard<SpinLock>;

}  // namespace

void Manager::evict_context(Context& context) {
  const Blocking blocking;
  Stopped stopped(*this, /*victims=*/true);
  const std::string refused = "context '" + context.name() + "' cannot be evicted: ";
  Clock::time_point deadline = Clock::now() + claim_timeout_;
  bool is_counted = false;
  for (;;) {
    Round round(nullptr, stopped, deadline);
    {
      Lock lock(mutex_);
      if (stopped.count() == 0) {
        wait_until_still(lock, context);
        require_open(context);
        if (is_used(context)) throw Error(ErrorCode::busy, refused + "it is in use");
        if (context.pins_ > 0) throw Error(ErrorCode::busy, refused + "it is pinned");
        {
          const ContextLock context_lock(context.mutex_);
          give_up_pages(context, SIZE_MAX);
        }
        if (!stopped.stop(context)) continue;  // entered in between
      }
      const ContextLock context_lock(context.mutex_);
      add_outs(context, Round::kMostPages, /*of_loans=*/false, round);
      if (!round.pages.empty() && !std::exchange(is_counted, true)) ++context.counters_.evictions;
      if (round.pages.empty()) {
        if (context.device_pages() <= context.idle_device_pages()) return;
        throw Error(ErrorCode::out_of_memory, refused + host_memory_is_full());
      }
    }
    const auto failure = carry_out(round);
    std::string why;
    deadline += round.time_for_moved();
    if (failure && !may_try_again(deadline, round, failure, stopped, why)) {
      throw Error(failure->code(), refused + why);
    }
  }
}

void Manager::restore_context(Context& context) {
  context.begin_session(/*keeps_active=*/false);
}

void Manager::pin(Context& context) {
  if (context.is_destroyed()) {
    pin_orphan(context);
    return;
  }
  context.begin_session(/*keeps_active=*/true);
  {
    const std::lock_guard lock(mutex_);
    ++context.pins_;
  }
  context.end_session();
}

// Nobody enters an orphan, but what is left of it can be brought back and kept.
void Manager::pin_orphan(Context& context) {
  const Blocking blocking;
  Stopped self(*this, /*victims=*/false);
  Return way(*this, context);
  do {
    Lock lock(mutex_);
    require_usable();
    do {
      wait_until_still(lock, context);
      if (find(context.id()) != &context) {
        throw Error(ErrorCode::context_destroyed,
                    "context '" + context.name() + "' has been destroyed, and nothing is left");
      }
    } while (!self.stop(context, /*even_if_used=*/true));
  } while (!bring_back(way, self));
  const std::lock_guard lock(mutex_);
  ++context.pins_;
}

void Manager::unpin(Context& context) {
  const std::lock_guard lock(mutex_);
  if (context.pins_ == 0) {
    throw Error(ErrorCode::invalid_value, "context '" + context.name() + "' is not pinned");
  }
  --context.pins_;
}

void Manager::declare_consumer(Context& producer, const std::shared_ptr<Context>& consumer) {
  if (&producer == consumer.get()) return;
  const std::lock_guard lock(mutex_);
  auto& consumers = producer.consumers_;
  std::erase_if(consumers, [&](const auto& known) {
    const auto alive = known.lock();
    return alive == nullptr || alive == consumer;
  });
  consumers.push_back(consumer);
}

void Manager::join(const Context& context) {
  const bool holds = device_->properties().can_hold;
  if (!context.is_moving() || (holds && Step::is_under_way())) return;
  if (device_->is_beside_capture()) return;
  const Blocking blocking;
  Lock lock(mutex_);
  wait_until_still(lock, context);
}

}  // namespace pgk
