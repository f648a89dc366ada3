// The manager's fifth part: pages that move between the device and host memory.
#include "core/manager_moves.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "core/error.h"
#include "core/scope_exit.h"

namespace pgk {
namespace {

using ContextLock = std::lock_guard<SpinLock>;

}  // namespace

// Stopping ---------------------------------------------------------------------------------------

Manager::Stopped::~Stopped() {
  if (contexts_.empty() && yielding_.empty()) return;
  const std::lock_guard lock(manager_.mutex_);
  for (const auto& context : yielding_) {
    if (--context->waiting_ == 0) context->sessions_.fetch_and(~Context::kYields);
  }
  let_go();
  manager_.moved_.notify_all();
}

void Manager::Stopped::have_yield(Context& context) {
  const auto it = std::find_if(yielding_.begin(), yielding_.end(),
                               [&](const auto& known) { return known.get() == &context; });
  if (it != yielding_.end()) return;
  yielding_.push_back(context.shared_from_this());
  ++context.waiting_;
  context.sessions_.fetch_or(Context::kYields);
}

bool Manager::Stopped::contains(const Context& context) const {
  return std::any_of(contexts_.begin(), contexts_.end(),
                     [&](const Entry& entry) { return entry.context.get() == &context; });
}

bool Manager::Stopped::stop(Context& context, bool even_if_used) {
  contexts_.reserve(contexts_.size() + 1);
  std::uint32_t sessions = context.sessions_.load(std::memory_order_acquire);
  do {
    const bool is_used = (sessions & Context::kCount) != 0;
    if ((sessions & Context::kMoving) != 0 || (is_used && !even_if_used)) return false;
  } while (!context.sessions_.compare_exchange_weak(sessions, sessions | Context::kMoving,
                                                    std::memory_order_acq_rel));
  {
    const ContextLock lock(context.mutex_);
    if (context.state_ == Context::State::open) context.state_ = Context::State::moving;
  }
  contexts_.push_back({context.shared_from_this(), {}});
  ++manager_.stopped_contexts_;
  manager_.stopped_victims_ += victims_ ? 1 : 0;
  keep_out_consumers(contexts_.back());
  // One of them may have been entered meanwhile. What comes back may be in use by them where the
  // device holds them.
  const bool may_be_used = even_if_used || (!victims_ && manager_.device_->properties().can_hold);
  if (may_be_used || !manager_.is_used(context)) return true;
  let_go(contexts_.back());
  contexts_.pop_back();
  manager_.moved_.notify_all();
  return false;
}

// Idle ones are not entered before their producer stands still.
void Manager::Stopped::keep_out_consumers(Entry& entry) {
  for (const auto& known : entry.context->consumers_) {
    const auto consumer = known.lock();
    if (consumer == nullptr) continue;
    entry.consumers.push_back(consumer);
    ++consumer->joins_;
    consumer->sessions_.fetch_or(Context::kJoins);
  }
}

void Manager::Stopped::let_go(const Entry& entry) {
  Context& context = *entry.context;
  --manager_.stopped_contexts_;
  manager_.stopped_victims_ -= victims_ ? 1 : 0;
  for (const auto& consumer : entry.consumers) {
    if (--consumer->joins_ == 0) consumer->sessions_.fetch_and(~Context::kJoins);
  }
  const ContextLock lock(context.mutex_);
  if (context.state_ == Context::State::moving) context.state_ = Context::State::open;
  if (context.evicted_pages_ > 0) context.sessions_.fetch_or(Context::kEvicted);
  const std::uint32_t over =
      Context::kMoving | (context.evicted_pages_ > 0 ? 0 : Context::kEvicted);
  context.sessions_.fetch_and(~over, std::memory_order_acq_rel);
}

void Manager::Stopped::let_go() {
  if (contexts_.empty()) return;
  bool orphans = false;
  for (const Entry& entry : contexts_) {
    let_go(entry);
    orphans |= entry.context->state_ == Context::State::orphan;
  }
  contexts_.clear();
  if (orphans) manager_.collect_orphans();
  manager_.moved_.notify_all();
}

void Manager::wait_until_still(Lock& lock, const Context& context) {
  moved_.wait(lock, [&] { return !context.is_moving(); });
}

// Choosing ---------------------------------------------------------------------------------------

// Adds the pages that a plan takes next. False if a context of the plan has been entered meanwhile.
bool Manager::choose_outs(const std::vector<Eviction>& plan, bool of_loans, Stopped& stopped,
                          Round& round) {
  for (const Eviction& eviction : plan) {
    if (round.outs_left() == 0) break;
    Context& context = *find(eviction.id);
    if (eviction.active && !device_->properties().can_hold) {
      round.in_use = context.shared_from_this();
      break;
    }
    const bool is_new = !stopped.contains(context);
    if (is_new && !stopped.stop(context, eviction.active)) return false;
    const ContextLock lock(context.mutex_);
    if (is_new) ++context.counters_.evictions;
    add_outs(context, (eviction.bytes + context.page_bytes() - 1) / context.page_bytes(), of_loans,
             round);
  }
  return true;
}

// With the context's lock. Pages with a backup first: they may be unchanged. As far as there is
// host memory, which what comes back in the same round leaves only when it has.
void Manager::add_outs(Context& context, std::size_t count, bool of_loans, Round& round) {
  std::vector<std::uint32_t> numbers = context.live_pages(/*evicted=*/false);
  std::stable_partition(numbers.begin(), numbers.end(), [&](std::uint32_t number) {
    return context.pages_.at(number).backup.has_value();
  });
  const std::size_t places = ledger_.evictable(of_loans) / context.page_bytes();
  numbers.resize(std::min({numbers.size(), count, places, round.outs_left()}));
  for (const std::uint32_t number : numbers) {
    Context::Page& page = context.pages_.at(number);
    Round::Page moving;
    moving.context = &context;
    moving.number = number;
    moving.move.address = context.address_of(number);
    moving.move.from = page.handle;
    if (page.backup) {
      // Nobody else may drop it meanwhile.
      moving.move.to = *std::exchange(page.backup, std::nullopt);
      moving.move.known = std::exchange(page.contents, std::nullopt);
      moving.had_backup = true;
    }
    ledger_.reserve_host(page.handle.bytes);
    round.pages.push_back(moving);
    ++round.outs;
  }
}

// Adds evicted pages as far as there is room for them. The context is stopped. Returns what the
// device refused.
std::optional<Error> Manager::choose_ins(Context& context, Round& round) {
  const std::size_t bytes = context.page_bytes();
  const ContextLock lock(context.mutex_);
  const HandlePool::Keep others = promised_to_others(context);
  const HandlePool::Keep not_lent = not_lent_to(context);
  const ScopeExit make_up([this] { pool_.make_up(ledger_.unfilled(), ledger_.lent()); });
  try {
    for (const std::uint32_t number : context.live_pages(/*evicted=*/true)) {
      if (round.ins_left() == 0 || ledger_.restorable(context.id()) < bytes) break;
      Round::Page moving;
      moving.context = &context;
      moving.number = number;
      moving.move.address = context.address_of(number);
      moving.move.from = context.pages_.at(number).handle;
      moving.move.to = pool_.take(bytes, others, not_lent);
      // Its place in host memory stays its own until it has come.
      ledger_.restore(context.id(), bytes);
      ledger_.reserve_host(bytes);
      round.pages.push_back(moving);
    }
  } catch (const Error& error) {
    return error;
  }
  return std::nullopt;
}

// Carrying out -----------------------------------------------------------------------------------

// Of the contexts that move, as far as they are the context's own.
std::vector<StreamId> Manager::streams_of(const Round& round) const {
  std::vector<StreamId> streams;
  const Context* last = nullptr;
  for (const Round::Page& page : round.pages) {
    if (page.context == last) continue;
    last = page.context;
    for (const Context::OwnStream& own : last->own_streams_) streams.push_back(own.id);
  }
  return streams;
}

// In a session, but for the claimant's own, and for contexts that move, which have to stand still.
bool Manager::is_anybody_else_at_work(const Round& round, std::uint64_t since) const {
  const std::lock_guard lock(mutex_);
  const std::vector<Context*> contexts = all();
  return std::any_of(contexts.begin(), contexts.end(), [&](const Context* context) {
    const bool is_claimant = context == round.claimant;
    // Whoever serves request after request is in no session now and then.
    const bool was_used = !is_claimant && context->last_use_.load() > since;
    if (!was_used && context->sessions() <= (is_claimant ? 1 : 0)) return false;
    const auto is_its = [=](const Round::Page& page) { return page.context == context; };
    return std::none_of(round.pages.begin(), round.pages.end(), is_its);
  });
}

std::string Manager::whose(StreamId stream) const {
  const std::lock_guard lock(mutex_);
  if (stream == device_->properties().default_stream) return "the default stream";
  for (const Context* context : all()) {
    const auto is_it = [=](const Context::OwnStream& own) { return own.id == stream; };
    if (std::any_of(context->own_streams_.begin(), context->own_streams_.end(), is_it)) {
      return "a stream of context '" + context->name() + "'";
    }
  }
  return stream == kNoStream ? "the device" : "a stream that uses memory of contexts";
}

// Has contexts forget what their pages held when they came back, the least recently used first.
std::size_t Manager::drop_backups(std::size_t bytes) {
  std::vector<Context*> contexts = all();
  std::sort(contexts.begin(), contexts.end(), [](const Context* a, const Context* b) {
    return a->last_use_.load() < b->last_use_.load();
  });
  std::size_t dropped = 0;
  for (Context* context : contexts) {
    const ContextLock lock(context->mutex_);
    for (auto& [number, page] : context->pages_) {
      if (dropped >= bytes) return dropped;
      if (!page.backup) continue;
      host_pool_.give_back(*std::exchange(page.backup, std::nullopt));
      dropped += page.handle.bytes;
    }
  }
  return dropped;
}

void Manager::take_host_memory(Round& round) {
  for (Round::Page& page : round.pages) {
    Move& move = page.move;
    if (move.from.on_host || page.had_backup) continue;
    std::optional<Handle> handle = host_pool_.take(move.from.bytes);
    while (!handle) {
      {
        const std::lock_guard lock(mutex_);
        if (drop_backups(move.from.bytes) == 0) {
          throw Error(ErrorCode::out_of_memory, host_memory_is_full());
        }
      }
      handle = host_pool_.take(move.from.bytes);
    }
    move.to = *handle;
  }
}

std::string Manager::host_memory_is_full() const {
  return "the host memory for evicted pages (host_backup) is full: " +
         format_bytes(ledger_.evicted()) + " of " + format_bytes(ledger_.host_limit()) +
         " are in use, and " + format_bytes(ledger_.lent()) + " are set aside for what is lent";
}

// Waits for what has to pass, moves what was chosen, and enters into the books how far it came.
// Returns what kept it from coming to the end.
std::optional<Error> Manager::carry_out(Round& round) {
  const Clock::time_point start = Clock::now();
  std::optional<Error> failure;
  std::optional<StreamId> restless;
  Manner manner{.patience = round.patience};
  try {
    {
      const std::lock_guard lock(mutex_);
      manner.own = streams_of(round);
    }
    manner.are_others_at_work = [&, since = Context::next_use()] {
      return is_anybody_else_at_work(round, since);
    };
    device_->drain(manner.patience);
    take_host_memory(round);
    std::vector<Move> moves;
    for (const Round::Page& page : round.pages) moves.push_back(page.move);
    const ScopeExit tell([&] {
      for (std::size_t i = 0; i < moves.size(); ++i) round.pages[i].move = moves[i];
    });
    device_->move(moves, manner);
  } catch (const Restless& error) {
    restless = error.stream();
    failure = error;
  } catch (const Error& error) {
    failure = error;
  } catch (...) {
    settle(round, 0);
    throw;
  }
  settle(round, static_cast<std::uint64_t>((Clock::now() - start).count()));
  if (!restless) return failure;
  return Error(failure->code(), "waiting for " + whose(*restless) + ": " + failure->what());
}

void Manager::settle(Round& round, std::uint64_t nanoseconds) {
  const std::lock_guard lock(mutex_);
  for (const Round::Page& moved : round.pages) {
    Context& context = *moved.context;
    const Move& move = moved.move;
    const std::size_t bytes = move.from.bytes;
    const ContextLock context_lock(context.mutex_);
    Context::Page& page = context.pages_.at(moved.number);
    Context::Counters& counters = context.counters_;
    counters.move_nanoseconds += nanoseconds / round.pages.size();
    const bool out = !move.from.on_host;
    ledger_.release_host(bytes);
    if (move.done) {
      page.handle = move.to;
      page.backup.reset();
      page.contents.reset();
    }
    if (out && move.done) {
      ledger_.evict(context.id(), bytes);
      pool_.give_back(move.from);
      ++context.evicted_pages_;
      (move.copied ? counters.bytes_out : counters.pages_unchanged) += move.copied ? bytes : 1;
      if (!is_used(context)) context.consumers_.clear();
    } else if (out && moved.had_backup && move.known) {
      page.backup = move.to;
      page.contents = move.known;
    } else if (out) {
      if (move.to.bytes != 0) host_pool_.give_back(move.to);
    } else if (move.done) {
      --context.evicted_pages_;
      counters.bytes_in += bytes;
      if (move.contents) {
        page.backup = move.from;
        page.contents = move.contents;
      } else {
        host_pool_.give_back(move.from);
      }
    } else {
      ledger_.evict(context.id(), bytes);
      pool_.give_back(move.to);
    }
  }
}

}  // namespace pgk
