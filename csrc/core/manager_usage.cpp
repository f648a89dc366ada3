// The manager's third part: what it tells about itself, in figures, in errors and in checks.
#include <algorithm>
#include <map>
#include <optional>
#include <vector>

#include "core/manager.h"

namespace pgk {
namespace {

using ContextLock = std::lock_guard<SpinLock>;

}  // namespace

// What nobody else can get of the context now: its base, or the pages with live blocks if more.
std::size_t Manager::protected_bytes(const Context& context) const {
  const Arena& arena = context.arena_;
  const std::size_t occupied =
      (arena.resident_pages() - arena.count_free_pages()) * arena.page_bytes();
  return std::max(occupied, ledger_.account(context.id()).base);
}

// What a new guarantee could have: the capacity less what is protected, as far as the device still
// has that much beside memory that others hold of it.
std::size_t Manager::unprotected_bytes(std::size_t protected_bytes) const {
  const std::size_t obtainable =
      std::min(ledger_.capacity(), pool_.existing_bytes() + device_->free_bytes());
  return obtainable - std::min(obtainable, protected_bytes);
}

Usage Manager::usage_of(const Context& context, std::size_t protected_bytes,
                        std::size_t unprotected_bytes) const {
  const ContextLock lock(context.mutex_);
  const Ledger::Account& account = ledger_.account(context.id());
  const std::size_t page = context.page_bytes();
  const std::size_t reachable =
      std::min(account.max, unprotected_bytes + protected_bytes) / page * page;
  Usage usage;
  usage.id = context.id();
  usage.name = context.name();
  usage.tier = context.tier();
  usage.orphan = context.state_ == Context::State::orphan;
  usage.used = context.arena_.used_bytes();
  usage.resident = account.resident;
  usage.max = account.max;
  usage.base = account.base;
  usage.peak = context.arena_.peak_bytes();
  usage.available = reachable > usage.used ? reachable - usage.used : 0;
  usage.live_blocks = context.arena_.live_blocks();
  usage.sessions = context.sessions();
  return usage;
}

Usage Manager::usage(const Context& context) const {
  const std::lock_guard lock(mutex_);
  require_usable();
  std::optional<std::size_t> own;
  std::size_t protected_by_all = 0;
  for (const Context* known : all()) {
    const ContextLock context_lock(known->mutex_);
    const std::size_t bytes = protected_bytes(*known);
    if (known == &context) own = bytes;
    protected_by_all += bytes;
  }
  if (!own) {
    throw Error(ErrorCode::context_destroyed,
                "context '" + context.name() + "' has been destroyed");
  }
  return usage_of(context, *own, unprotected_bytes(protected_by_all));
}

DeviceUsage Manager::device_usage() const {
  const std::lock_guard lock(mutex_);
  require_usable();
  DeviceUsage usage;
  usage.capacity = ledger_.capacity();
  usage.resident = ledger_.resident();
  usage.pooled = pool_.pooled_bytes();
  std::vector<std::size_t> guarded;
  std::size_t protected_by_all = 0;
  for (const Context* context : all()) {
    const ContextLock context_lock(context->mutex_);
    guarded.push_back(protected_bytes(*context));
    protected_by_all += guarded.back();
  }
  usage.available = unprotected_bytes(protected_by_all);
  auto bytes = guarded.begin();
  for (const Context* context : all()) {
    usage.contexts.push_back(usage_of(*context, *bytes++, usage.available));
  }
  return usage;
}

Totals Manager::totals() const {
  const std::lock_guard lock(mutex_);
  Totals totals;
  totals.counters = gone_;
  for (const Context* context : all()) {
    const ContextLock context_lock(context->mutex_);
    totals.counters += context->counters_;
    totals.used += context->arena_.used_bytes();
    totals.peak += context->arena_.peak_bytes();
    totals.least_segment_bytes += context->least_segment_bytes_;
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
    const ContextLock context_lock(context->mutex_);
    context->arena_.reset_peak();
    context->least_segment_bytes_ = context->counters_.segment_bytes();
  }
}

void Manager::refuse(Context& context, std::size_t bytes, const std::string& device_said) {
  {
    const ContextLock lock(context.mutex_);
    ++context.counters_.refusals;
  }
  const DeviceUsage device = device_usage();
  const auto found =
      std::find_if(device.contexts.begin(), device.contexts.end(),
                   [&](const Usage& usage) { return usage.id == context.id() && !usage.orphan; });
  if (found == device.contexts.end()) {
    throw Error(ErrorCode::context_destroyed,
                "context '" + context.name() + "' has been destroyed");
  }
  const Usage& own = *found;
  std::string text =
      "context '" + own.name + "' is out of memory: tried to allocate " + format_bytes(bytes) +
      " with " + format_bytes(own.used) + " of its budget of " + format_bytes(own.max) +
      " in use (" + format_bytes(own.resident) + " resident, peak " + format_bytes(own.peak) + ").";
  if (!device_said.empty()) text += " The device said: " + device_said + ".";
  text += " Device '" + device_->properties().name + "': capacity " +
          format_bytes(device.capacity) + ", resident " + format_bytes(device.resident) +
          "; used by";
  for (std::size_t i = 0; i < device.contexts.size(); ++i) {
    const Usage& other = device.contexts[i];
    text += (i == 0 ? " " : ", ") + other.name + " " + format_bytes(other.used) + " (" +
            (other.orphan ? "destroyed" : to_string(other.tier)) + ", base " +
            format_bytes(other.base) + ")";
  }
  text += ".";
  if (bytes <= own.available) {
    text += " Free room of " + format_bytes(own.available) + " is fragmented over pages of " +
            format_bytes(context.page_bytes()) + ".";
  }
  throw Error(ErrorCode::out_of_memory, text);
}

void Manager::check_invariants() const {
  const std::lock_guard lock(mutex_);
  ledger_.check_invariants();
  std::size_t resident = 0;
  std::map<std::size_t, std::size_t> unfilled;  // reserved pages that are not mapped, by size
  for (const Context* context : all()) {
    const ContextLock context_lock(context->mutex_);
    const Arena& arena = context->arena_;
    arena.check_invariants();
    const Ledger::Account& account = ledger_.account(context->id());
    const std::size_t bytes = arena.resident_pages() * arena.page_bytes();
    require(arena.resident_pages() == context->handles_.size(), "a handle per resident page");
    require(bytes == account.resident, "the ledger holds what the arena has");
    require(context->lanes_.size() == arena.lanes(), "every lane has a stream");
    require(arena.used_bytes() <= account.max, "used <= max");
    require(context->state_ == Context::State::orphan || context->manager_of_orphan_ == nullptr,
            "only orphans keep their manager");
    resident += bytes;
    unfilled[arena.page_bytes()] += unfilled_pages(*context, account.base);
  }
  require(resident + pool_.pooled_bytes() == pool_.existing_bytes(), "no handle is lost");
  require(pool_.existing_bytes() <= ledger_.capacity(), "handles fit the device");
  for (const auto& [page, count] : unfilled) {
    require(pool_.reserved(page) == count, "reservations are physical");
  }
}

}  // namespace pgk
