#include "core/refusal.h"

#include <algorithm>
#include <deque>
#include <mutex>
#include <utility>

namespace pgk {
namespace {

struct Kept {
  std::string text;
  Refusal refusal;
};

// Leaked: daemon threads may run out of memory while the process ends.
struct Latest {
  std::mutex mutex;
  std::deque<Kept> kept;

  static Latest& latest() {
    static auto& only = *new Latest;
    return only;
  }
};

bool is_over_budget(const Refusal& refusal) {
  const auto exceeds = [&](std::size_t bytes, std::size_t held) {
    return bytes > refusal.budget - std::min(refusal.budget, held);
  };
  // It takes whole granules out of whole pages.
  return refusal.wanted == Refusal::Wanted::block &&
         (exceeds(round_up(refusal.requested, kGranule), refusal.used) ||
          exceeds(refusal.page, refusal.resident + refusal.evicted));
}

bool is_fragmented(const Refusal& refusal) {
  return refusal.wanted == Refusal::Wanted::block && refusal.requested <= refusal.available;
}

std::string reason_of(const Refusal& refusal) {
  if (is_fragmented(refusal)) return "there is room, but in pieces";
  if (is_over_budget(refusal)) return "the request does not fit into its budget";
  return "nobody can give way";
}

// As c10/cuda/CUDACachingAllocator.cpp and c10/core/impl/alloc_cpu.cpp begin theirs.
std::string as_torch_says(const Refusal& refusal) {
  if (refusal.is_on_host) {
    return "DefaultCPUAllocator: can't allocate memory: you tried to allocate " +
           std::to_string(refusal.requested) + " bytes. The host device is out of memory.";
  }
  return "CUDA out of memory. Tried to allocate " + format_bytes(refusal.requested) + ".";
}

std::string of_device(const Refusal& refusal) {
  return " " + refusal.device + " has a total capacity of " + format_bytes(refusal.capacity) +
         " for contexts, of which " + format_bytes(refusal.free) + " is free" +
         (refusal.reserved == 0 ? "."
                                : ", " + format_bytes(refusal.reserved) + " reserved for bases.");
}

std::string of_context(const Refusal& refusal) {
  std::string text = " Context '" + refusal.context + "' (" + to_string(refusal.tier) + ") ";
  if (refusal.wanted == Refusal::Wanted::restore) {
    return text + "cannot come back: " + format_bytes(refusal.requested) +
           " of it is in host memory.";
  }
  text += "has " + format_bytes(refusal.used) + " of its budget of " +
          format_bytes(refusal.budget) + " in use (peak " + format_bytes(refusal.peak) + ").";
  if (refusal.partition.empty()) return text;
  return text + " Its partition '" + refusal.partition + "' has " +
         format_bytes(refusal.partition_resident) + " of " + format_bytes(refusal.partition_limit) +
         " in use.";
}

std::string of_holders(const Refusal& refusal) {
  std::string text;
  for (const Refusal::Holder& holder : refusal.holders) {
    text += (text.empty() ? " On the device: " : ", ") + holder.name + " " +
            format_bytes(holder.resident) + " (" + to_string(holder.tier);
    if (holder.base != 0) text += ", base " + format_bytes(holder.base);
    if (holder.evicted != 0) text += ", evicted " + format_bytes(holder.evicted);
    if (holder.in_use) text += ", in use";
    if (holder.pinned) text += ", pinned";
    if (holder.orphan) text += ", destroyed";
    text += ")";
  }
  if (refusal.others != 0) {
    text += ", and " + std::to_string(refusal.others) + " more with " +
            format_bytes(refusal.others_committed);
  }
  return text.empty() ? text : text + ".";
}

// What would help, where nobody can give way or the figures say what is wrong. Other reasons say
// it.
std::string advice(const Refusal& refusal) {
  const bool is_full = refusal.reason.ends_with("can give way");
  if (refusal.is_explained && !is_full) return "";
  if (!is_full && is_fragmented(refusal)) {
    return " " + format_bytes(refusal.available) + " could be had, fragmented over pages of " +
           format_bytes(refusal.page) + ". Allocate larger tensors first, or raise the budget.";
  }
  if (!is_full && is_over_budget(refusal)) {
    return refusal.requested > refusal.budget
               ? " It is more than the whole budget: raise that with resize()."
               : " Free tensors of the context, or raise its budget with resize().";
  }
  bool has_higher = false;
  std::string busy;
  std::string pinned;
  for (const Refusal::Holder& holder : refusal.holders) {
    if (holder.name == refusal.context || holder.resident <= holder.base) continue;
    if (refusal.is_short_in_partition && !holder.mate) continue;
    if (holder.tier > refusal.tier && !holder.orphan) {
      has_higher = true;
    } else if (holder.pinned) {
      pinned += (pinned.empty() ? "" : ", ") + holder.name;
    } else if (holder.in_use) {
      busy += (busy.empty() ? "" : ", ") + holder.name;
    }
  }
  std::string text;
  if (!busy.empty()) text += " Wait until sessions end that use " + busy + ".";
  if (!pinned.empty()) text += " Unpin " + pinned + ".";
  if (has_higher) {
    text += std::string(text.empty() ? " Others" : " The rest") +
            " are of a higher tier and do not give way.";
  }
  return text.empty() ? " Free tensors, destroy contexts, or give contexts smaller bases." : text;
}

}  // namespace

std::string to_text(const Refusal& refusal) {
  return as_torch_says(refusal) + of_device(refusal) + of_context(refusal) +
         " Reason: " + refusal.reason + "." + of_holders(refusal) + advice(refusal);
}

void Refusals::raise(Refusal refusal) {
  refusal.is_explained = !refusal.reason.empty();
  if (!refusal.is_explained) refusal.reason = reason_of(refusal);
  const std::string text = to_text(refusal);
  {
    Latest& latest = Latest::latest();
    const std::lock_guard lock(latest.mutex);
    if (latest.kept.size() == kKept) latest.kept.pop_front();
    latest.kept.push_back({text, std::move(refusal)});
  }
  throw Error(ErrorCode::out_of_memory, text);
}

void Refusals::lock() {
  Latest::latest().mutex.lock();
}

void Refusals::unlock() {
  Latest::latest().mutex.unlock();
}

std::optional<Refusal> Refusals::find(std::string_view error) {
  Latest& latest = Latest::latest();
  const std::lock_guard lock(latest.mutex);
  for (auto known = latest.kept.rbegin(); known != latest.kept.rend(); ++known) {
    if (error.starts_with(known->text)) return known->refusal;
  }
  return std::nullopt;
}

}  // namespace pgk
