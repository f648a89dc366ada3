// The manager's last part: what it tells about itself, in figures, in errors and in checks.
#include <algorithm>
#include <span>
#include <utility>
#include <vector>

#include "core/manager.h"
#include "core/refusal.h"

namespace pgk {
namespace {

using ContextLock = std::lock_guard<SpinLock>;

}  // namespace

// What nobody else can get of the context now: its base, or the resident pages with live blocks if
// more.
std::size_t Manager::protected_bytes(const Context& context) const {
  const std::size_t occupied =
      (context.device_pages() - context.idle_device_pages()) * context.page_bytes();
  return std::max(occupied, ledger_.account(context.id()).base);
}

// The capacity less what is protected, as far as the device still has that much beside memory that
// others hold of it.
std::size_t Manager::unprotected_bytes() const {
  std::size_t taken = 0;
  for (const Context* context : all()) {
    const ContextLock lock(context->mutex_);
    taken += protected_bytes(*context);
  }
  const std::size_t obtainable =
      std::min(ledger_.capacity(), pool_.existing_bytes() + device_->free_bytes());
  return obtainable - std::min(obtainable, taken);
}

std::size_t Manager::available() const {
  const std::lock_guard lock(mutex_);
  require_usable();
  return unprotected_bytes();
}

Usage Manager::usage_of(const Context& context, const std::vector<Standing>& standings) const {
  const Ledger::Account& account = ledger_.account(context.id());
  const std::size_t page = context.page_bytes();
  // Up to the base, contexts in use give way, too.
  const std::size_t below_base = account.base - std::min(account.base, account.held());
  std::size_t more = obtainable(context, false, standings);
  if (more < below_base)
    more = std::max(more, std::min(below_base, obtainable(context, true, standings)));
  const std::size_t reachable = std::min(account.max, account.held() + more) / page * page;
  const ContextLock lock(context.mutex_);
  Usage usage;
  usage.id = context.id();
  usage.name = context.name();
  if (context.partition_) usage.partition = context.partition_->id;
  usage.tier = context.tier();
  usage.orphan = context.state_ == Context::State::orphan;
  usage.used = context.arena_.used_bytes();
  usage.resident = account.resident;
  usage.evicted = context.evicted_pages_ * page;
  usage.max = account.max;
  usage.base = account.base;
  usage.peak = context.arena_.peak_bytes();
  usage.small_peak = context.small_peak_;
  usage.large_peak = context.large_peak_;
  usage.peak_resident = account.peak_resident;
  usage.fenced = context.arena_.fenced_bytes();
  usage.available = reachable > usage.used ? reachable - usage.used : 0;
  usage.live_blocks = context.arena_.live_blocks();
  usage.sessions = context.sessions();
  usage.waiting = context.waiting();
  usage.counters = context.counters_;
  return usage;
}

void Manager::require_known(const Context& context) const {
  if (find(context.id()) == &context) return;
  throw Error(ErrorCode::context_destroyed, "context '" + context.name() + "' has been destroyed");
}

Usage Manager::usage(const Context& context) {
  const std::lock_guard lock(mutex_);
  require_usable();
  refresh_outside();
  require_known(context);
  return usage_of(context, standings(&context));
}

DeviceUsage Manager::device_usage() {
  const std::lock_guard lock(mutex_);
  require_usable();
  refresh_outside();
  DeviceUsage usage;
  usage.capacity = ledger_.capacity();
  usage.resident = ledger_.resident();
  usage.pooled = pool_.pooled_bytes();
  usage.host_limit = host_pool_.limit();
  usage.host_existing = host_pool_.existing_bytes();
  usage.host_taken = host_pool_.taken_bytes();
  usage.available = unprotected_bytes();
  const std::vector<Standing> standings = this->standings(nullptr);
  for (const Context* context : all()) usage.contexts.push_back(usage_of(*context, standings));
  return usage;
}

Totals Manager::totals() const {
  const std::lock_guard lock(mutex_);
  Totals totals;
  totals.counters = gone_;
  for (const Context* context : all()) {
    const ContextLock context_lock(context->mutex_);
    totals.counters += context->counters_;
    const std::size_t used = context->arena_.used_bytes();
    totals.used += used;
    const std::size_t evicted = context->evicted_pages_ * context->page_bytes();
    totals.used_away += std::min(used, evicted);
    totals.active_away += std::min(used + context->arena_.fenced_bytes(), evicted);
    totals.peak += context->arena_.peak_bytes();
    totals.least_segment_bytes += context->least_segment_bytes_;
    totals.small_peak += context->small_peak_;
    totals.large_peak += context->large_peak_;
    totals.fenced += context->arena_.fenced_bytes();
    totals.live_blocks += context->arena_.live_blocks();
    totals.pages += context->arena_.resident_pages();
  }
  totals.peak = std::max(totals.peak, peak_with_gone_);
  totals.existing = pool_.existing_bytes();
  totals.existing_peak = pool_.peak_bytes();
  totals.created = pool_.created_bytes();
  return totals;
}

void Manager::reset_peaks() {
  const std::lock_guard lock(mutex_);
  pool_.reset_peak();
  peak_with_gone_ = 0;
  for (Context* context : all()) {
    ledger_.reset_peak(context->id());
    const ContextLock context_lock(context->mutex_);
    context->reset_peaks();
  }
}

void Manager::reset_peaks(Context& context) {
  const std::lock_guard lock(mutex_);
  require_known(context);
  ledger_.reset_peak(context.id());
  const ContextLock context_lock(context.mutex_);
  context.reset_peaks();
}

std::string Manager::nobody_gives_way(const Context& context, std::size_t bytes) const {
  const Ledger::Id id = context.id();
  const bool is_in_partition = ledger_.account(id).partition != Ledger::kDevice;
  return is_in_partition && ledger_.shortage_in_partition(id, bytes) > 0
             ? "its partition is full, and no context in it can give way"
             : "the device is full, and nobody can give way";
}

// The facts of a refusal, but for what was wanted and why it could not be had.
Refusal Manager::refusal_of(const Context& context) {
  const std::lock_guard lock(mutex_);
  require_usable();
  require_known(context);
  refresh_outside();
  {
    const ContextLock context_lock(context.mutex_);
    require_live(context);
  }
  const Usage own = usage_of(context, standings(&context));
  const Device::Properties& device = device_->properties();
  Refusal refusal;
  refusal.context = own.name;
  refusal.tier = own.tier;
  refusal.used = own.used;
  refusal.peak = own.peak;
  refusal.resident = own.resident;
  refusal.evicted = own.evicted;
  refusal.budget = own.max;
  refusal.available = own.available;
  const std::size_t page = context.page_bytes();
  refusal.page = page;
  if (context.partition_ && context.partition_->limits.memory) {
    refusal.partition = own.partition;
    refusal.partition_resident = ledger_.resident(context.partition_->account);
    refusal.partition_limit = *context.partition_->limits.memory;
  }
  refusal.is_on_host = device.is_host;
  refusal.device = device.label;
  refusal.capacity = ledger_.capacity();
  refusal.free = std::min(ledger_.capacity() - std::min(ledger_.capacity(), ledger_.resident()),
                          pool_.pooled_bytes() + device_->free_bytes());
  const Ledger::PartitionId partition = ledger_.account(context.id()).partition;
  refusal.is_short_in_partition =
      partition != Ledger::kDevice && ledger_.shortage_in_partition(context.id(), page) > 0;
  std::vector<Context*> contexts = all();
  const auto committed = [&](const Context* one) { return ledger_.account(one->id()).committed(); };
  for (const Context* one : contexts) {
    const Ledger::Account& account = ledger_.account(one->id());
    if (one != &context) refusal.reserved += account.committed() - account.resident;
  }
  refusal.reserved = std::min(refusal.reserved, refusal.free);
  std::erase_if(contexts,
                [&](const Context* one) { return one != &context && committed(one) == 0; });
  const std::size_t named = std::min(contexts.size(), Refusal::kHolders);
  std::partial_sort(
      contexts.begin(), contexts.begin() + named, contexts.end(),
      [&](const Context* a, const Context* b) { return committed(a) > committed(b); });
  for (const Context* one : std::span(contexts).first(named)) {
    const Ledger::Account& account = ledger_.account(one->id());
    const bool is_used = this->is_used(*one);
    const ContextLock lock(one->mutex_);
    refusal.holders.push_back({.name = one->name(),
                               .tier = one->tier(),
                               .orphan = one->state_ == Context::State::orphan,
                               .in_use = is_used,
                               .pinned = one->pins_ > 0,
                               .used = one->arena_.used_bytes(),
                               .resident = account.resident,
                               .evicted = one->evicted_pages_ * one->page_bytes(),
                               .base = account.base,
                               .mate = Ledger::is_in(account, partition)});
  }
  refusal.others = contexts.size() - named;
  for (const Context* one : std::span(contexts).subspan(named)) {
    refusal.others_committed += committed(one);
  }
  return refusal;
}

void Manager::refuse(Context& context, std::size_t bytes, const std::string& said) {
  {
    const ContextLock lock(context.mutex_);
    ++context.counters_.refusals;
  }
  Refusal refusal = refusal_of(context);
  refusal.requested = bytes;
  refusal.reason = said;
  Refusals::raise(std::move(refusal));
}

void Manager::refuse_restore(Context& context, const std::string& why, ErrorCode code) {
  Refusal refusal = refusal_of(context);
  if (code != ErrorCode::out_of_memory) {
    throw Error(code, "context '" + context.name() +
                          "' cannot be brought back: " + format_bytes(refusal.evicted) +
                          " of it are in host memory" + (why.empty() ? "" : ": " + why) + ".");
  }
  refusal.wanted = Refusal::Wanted::restore;
  refusal.requested = refusal.evicted;
  refusal.reason = why;
  Refusals::raise(std::move(refusal));
}

void Manager::check_invariants() const {
  Lock lock(mutex_);
  // A page that moves is nowhere as far as the books go.
  moved_.wait(lock, [this] { return stopped_contexts_ == 0; });
  ledger_.check_invariants();
  std::size_t resident = 0;
  std::size_t on_host = 0;
  for (const Context* context : all()) {
    const ContextLock context_lock(context->mutex_);
    const Arena& arena = context->arena_;
    arena.check_invariants();
    const Ledger::Account& account = ledger_.account(context->id());
    require(arena.resident_pages() == context->pages_.size(), "a backing per page");
    require(account.page == arena.page_bytes(), "the ledger knows the size of the pages");
    std::size_t evicted_pages = 0;
    for (const auto& [number, page] : context->pages_) {
      evicted_pages += page.handle.on_host ? 1 : 0;
      on_host += (page.handle.on_host ? 1 : 0) * arena.page_bytes();
      on_host += (page.backup ? 1 : 0) * arena.page_bytes();
      require(!page.backup || !page.handle.on_host, "only resident pages have backups");
      require(!page.backup || page.contents, "what a backup holds is known");
    }
    require(evicted_pages == context->evicted_pages_, "evicted pages are counted");
    require(evicted_pages * arena.page_bytes() == account.evicted, "the ledger knows of them");
    require(context->device_pages() * arena.page_bytes() == account.resident,
            "the ledger holds what the arena has");
    const bool is_flagged = (context->sessions_.load() & Context::kEvicted) != 0;
    require((evicted_pages > 0) == is_flagged || context->state_ == Context::State::forked,
            "whoever enters sees whether pages are evicted");
    require(context->lanes_.size() == arena.lanes(), "every lane has a stream");
    require(arena.used_bytes() <= account.max, "used <= max");
    require(context->state_ == Context::State::orphan || context->manager_of_orphan_ == nullptr,
            "only orphans keep their manager");
    resident += account.resident;
  }
  require(resident + pool_.pooled_bytes() == pool_.existing_bytes(), "no handle is lost");
  require(pool_.existing_bytes() <= ledger_.capacity(), "handles fit the device");
  require(on_host == host_pool_.taken_bytes(), "no host memory is lost");
  require(host_pool_.existing_bytes() <= host_pool_.limit(), "host memory stays within its limit");
  std::size_t promised_bytes = 0;
  for (const auto& [page, count] : ledger_.unfilled()) promised_bytes += count * page;
  require(promised_bytes <= pool_.pooled_bytes() + ledger_.lent(),
          "reservations are physical, but for what is lent");
}

}  // namespace pgk
