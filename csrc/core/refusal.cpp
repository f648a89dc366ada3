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

std::mutex mutex;
std::deque<Kept>& kept() {
  static std::deque<Kept> latest;
  return latest;
}

bool is_over_budget(const Refusal& refusal) {
  return refusal.wanted == Refusal::Wanted::block &&
         refusal.requested > refusal.budget - std::min(refusal.budget, refusal.used);
}

bool is_fragmented(const Refusal& refusal) {
  return refusal.wanted == Refusal::Wanted::block && refusal.requested <= refusal.available;
}

std::string reason_of(const Refusal& refusal) {
  if (is_over_budget(refusal)) return "the request does not fit into its budget";
  if (is_fragmented(refusal)) return "there is room, but in pieces";
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
         " for contexts, of which " + format_bytes(refusal.free) + " is free.";
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
            format_bytes(refusal.others_resident);
  }
  return text.empty() ? text : text + ".";
}

// What would help, given that nobody else can give way.
std::string advice(const Refusal& refusal) {
  if (is_over_budget(refusal)) {
    return refusal.requested > refusal.budget
               ? " It is more than the whole budget: raise that with resize()."
               : " Free tensors of the context, or raise its budget with resize().";
  }
  if (refusal.reason.starts_with("the device said")) return "";
  if (!refusal.is_explained && is_fragmented(refusal)) {
    return " " + format_bytes(refusal.available) + " could be had, fragmented over pages of " +
           format_bytes(refusal.page) + ". Allocate larger tensors first, or raise the budget.";
  }
  bool has_higher = false;
  std::string busy;
  std::string pinned;
  for (const Refusal::Holder& holder : refusal.holders) {
    if (holder.name == refusal.context || holder.resident <= holder.base) continue;
    if (holder.tier > refusal.tier) {
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
  if (has_higher)
    text += std::string(text.empty() ? " Others" : " The rest") +
            " are of a higher tier and do not give way.";
  if (text.empty() && !refusal.is_explained)
    text = " Free tensors, destroy contexts, or give contexts smaller bases.";
  return text;
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
    const std::lock_guard lock(mutex);
    if (kept().size() == kKept) kept().pop_front();
    kept().push_back({text, std::move(refusal)});
  }
  throw Error(ErrorCode::out_of_memory, text);
}

std::optional<Refusal> Refusals::find(std::string_view error) {
  const std::lock_guard lock(mutex);
  for (auto known = kept().rbegin(); known != kept().rend(); ++known) {
    if (error.starts_with(known->text)) return known->refusal;
  }
  return std::nullopt;
}

}  // namespace pgk
