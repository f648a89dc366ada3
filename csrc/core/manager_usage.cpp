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

Usage Manager::usage_of(const Context& context, std::size_t protected_bytes,
                        std::size_t unprotected_bytes) const {
  const ContextLock lock(context.mutex_);
  const Ledger::Account& account = ledger_.account(context.id());
  const std::size_t page = context.page_bytes();
  const std::size_t reachable =
      std::min(account.max, unprotected_bytes + protected_bytes) / page * page;
  Usage usage;
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
  return usage;
}

Usage Manager::usage(const Context& context) const {
  const std::lock_guard lock(mutex_);
  require_usable();
  std::optional<std::size_t> own;
  std::size_t unprotected = ledger_.capacity();
  for (const Context* known : all()) {
    const ContextLock context_lock(known->mutex_);
    const std::size_t bytes = protected_bytes(*known);
    if (known == &context) own = bytes;
    unprotected -= bytes;
  }
  if (!own) {
    throw Error(ErrorCode::context_destroyed,
                "context '" + context.name() + "' has been destroyed");
  }
  return usage_of(context, *own, unprotected);
}

DeviceUsage Manager::device_usage() const {
  const std::lock_guard lock(mutex_);
  require_usable();
  DeviceUsage usage;
  usage.capacity = usage.available = ledger_.capacity();
  usage.resident = ledger_.resident();
  usage.pooled = pool_.pooled_bytes();
  std::vector<std::size_t> guarded;
  for (const Context* context : all()) {
    const ContextLock context_lock(context->mutex_);
    guarded.push_back(protected_bytes(*context));
    usage.available -= guarded.back();
  }
  auto bytes = guarded.begin();
  for (const Context* context : all()) {
    usage.contexts.push_back(usage_of(*context, *bytes++, usage.available));
  }
  return usage;
}

void Manager::refuse(Context& context, std::size_t bytes, const std::string& device_said) {
  const DeviceUsage device = device_usage();
  const auto& own = *std::find_if(
      device.contexts.begin(), device.contexts.end(),
      [&](const Usage& usage) { return usage.name == context.name() && !usage.orphan; });
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
