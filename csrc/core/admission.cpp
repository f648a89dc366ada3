#include "core/admission.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/error.h"

namespace pgk {
namespace {

[[noreturn]] void refuse(const std::string& text) {
  throw Error(ErrorCode::invalid_value, text);
}

std::size_t index_of(Tier tier) {
  return static_cast<std::size_t>(tier);
}

Share share_from(const std::string& name, double value) {
  if (!(value >= 0 && value <= 1)) {
    refuse(name + " must be between 0 and 1, got " + std::to_string(value));
  }
  // A decimal fraction may come as a little less than it is.
  return static_cast<Share>(value * kWhole + 1e-3);
}

// "0.25", without iostreams.
std::string format_share(Share share) {
  if (share == kWhole) return "1";
  if (share == 0) return "0";
  std::string digits = std::to_string(kWhole + share).substr(1);
  digits.erase(digits.find_last_not_of('0') + 1);
  return "0." + digits;
}

QosTaskMeta named(std::string id, std::string name, Tier tier) {
  if (id.empty()) refuse("a task needs an id");
  return {.id = std::move(id), .name = std::move(name), .tier = tier};
}

std::size_t limit_of(std::size_t request, double ratio) {
  const double limit = static_cast<double>(request) * ratio;
  if (limit >= static_cast<double>(SIZE_MAX)) return SIZE_MAX;
  return std::max(request, static_cast<std::size_t>(limit));
}

std::string reservation(std::size_t bytes) {
  return "a reservation of " + format_bytes(bytes) + " does not fit: ";
}

std::string bandwidth(Share share) {
  return "a bandwidth of " + format_share(share) + " does not fit: ";
}

std::string reason_to_reject(const QosTaskMeta& task, const Availability& available) {
  if (task.memory_request > available.total_memory) {
    return reservation(task.memory_request) + available.owner + " has " +
           format_bytes(available.total_memory) + " in all";
  }
  if (task.bandwidth_request > available.total_bandwidth) {
    return bandwidth(task.bandwidth_request) + available.owner + " has " +
           format_share(available.total_bandwidth) + " in all";
  }
  return {};
}

std::string reason_to_wait(const QosTaskMeta& task, const Availability& available) {
  if (task.memory_request > available.free_memory) {
    return reservation(task.memory_request) + format_bytes(available.free_memory) + " of " +
           available.owner + "'s " + format_bytes(available.total_memory) +
           " are neither reserved nor in use";
  }
  const bool is_content_with_less = task.tier == Tier::burstable && available.free_bandwidth > 0;
  if (task.bandwidth_request > available.free_bandwidth && !is_content_with_less) {
    return bandwidth(task.bandwidth_request) + format_share(available.free_bandwidth) + " of " +
           available.owner + "'s " + format_share(available.total_bandwidth) + " are not reserved";
  }
  if (task.tier == Tier::best_effort) {
    if (available.free_memory == 0) return "all memory is reserved or in use";
    if (available.free_bandwidth == 0) return "all bandwidth is reserved";
  }
  if (available.ahead > 0) {
    return std::to_string(available.ahead) + " waiting task(s) of the same or a higher priority " +
           "go first";
  }
  return {};
}

std::string reason_to_throttle(const QosTaskMeta& task, const Availability& available) {
  if (task.tier != Tier::burstable) return {};
  if (task.bandwidth_request > available.free_bandwidth) {
    return "of its bandwidth of " + format_share(task.bandwidth_request) + " it gets the " +
           format_share(available.free_bandwidth) + " that are not reserved";
  }
  if (task.memory_limit > available.free_memory) {
    return "of its limit of " + format_bytes(task.memory_limit) + " only " +
           format_bytes(available.free_memory) + " are neither reserved nor in use";
  }
  return {};
}

}  // namespace

QosTaskMeta QosTaskMeta::guaranteed(std::string id, std::string name, std::size_t memory,
                                    double bandwidth_request) {
  QosTaskMeta task = named(std::move(id), std::move(name), Tier::guaranteed);
  if (memory == 0) refuse("memory must be positive, got 0");
  task.memory_request = task.memory_limit = memory;
  task.bandwidth_request = share_from("bandwidth_request", bandwidth_request);
  return task;
}

QosTaskMeta QosTaskMeta::burstable(std::string id, std::string name, std::size_t memory_request,
                                   double burst_ratio, double bandwidth_request) {
  QosTaskMeta task = named(std::move(id), std::move(name), Tier::burstable);
  if (memory_request == 0) refuse("memory_request must be positive, got 0");
  if (!(burst_ratio >= 1) || std::isinf(burst_ratio)) {
    refuse("burst_ratio must be finite and at least 1, got " + std::to_string(burst_ratio));
  }
  task.memory_request = memory_request;
  task.memory_limit = limit_of(memory_request, burst_ratio);
  task.burst_ratio = burst_ratio;
  task.bandwidth_request = share_from("bandwidth_request", bandwidth_request);
  return task;
}

QosTaskMeta QosTaskMeta::best_effort(std::string id, std::string name) {
  QosTaskMeta task = named(std::move(id), std::move(name), Tier::best_effort);
  task.memory_limit = SIZE_MAX;
  return task;
}

Evaluation evaluate(const QosTaskMeta& task, const Availability& available) {
  if (std::string reason = reason_to_reject(task, available); !reason.empty()) {
    return {task, Decision::reject, std::move(reason)};
  }
  if (std::string reason = reason_to_wait(task, available); !reason.empty()) {
    return {task, Decision::queue, std::move(reason)};
  }
  std::string reason = reason_to_throttle(task, available);
  const Decision decision = reason.empty() ? Decision::admit : Decision::throttle;
  return {task, decision, std::move(reason), task.memory_request,
          std::min(task.bandwidth_request, available.free_bandwidth)};
}

QosPolicyEvaluator::QosPolicyEvaluator(std::size_t total_memory, double total_bandwidth)
    : total_{total_memory, share_from("total_bandwidth", total_bandwidth)} {
  if (total_memory == 0 || total_memory == SIZE_MAX) {
    refuse("total_memory must be positive and below 2**64 - 1");
  }
  if (total_.bandwidth == 0) refuse("total_bandwidth must be positive, got 0");
}

Availability QosPolicyEvaluator::availability() const {
  Amounts free = total_;
  for (const Amounts& reserved : reserved_) {
    free.memory -= reserved.memory;
    free.bandwidth -= reserved.bandwidth;
  }
  return {total_.memory, free.memory, total_.bandwidth, free.bandwidth};
}

// The place in the queue of a newcomer.
std::deque<QosTaskMeta>::const_iterator QosPolicyEvaluator::behind(Tier tier) const {
  return std::find_if(queue_.begin(), queue_.end(),
                      [&](const QosTaskMeta& task) { return task.tier < tier; });
}

std::deque<QosTaskMeta>::const_iterator QosPolicyEvaluator::find_queued(
    const std::string& id) const {
  return std::find_if(queue_.begin(), queue_.end(),
                      [&](const QosTaskMeta& task) { return task.id == id; });
}

Evaluation QosPolicyEvaluator::evaluate(const QosTaskMeta& task) const {
  Availability available = availability();
  available.ahead = static_cast<std::size_t>(behind(task.tier) - queue_.begin());
  return pgk::evaluate(task, available);
}

void QosPolicyEvaluator::add(const Evaluation& evaluation) {
  admitted_.emplace(evaluation.task.id, evaluation);
  Amounts& reserved = reserved_[index_of(evaluation.task.tier)];
  reserved.memory += evaluation.reserved_memory;
  reserved.bandwidth += evaluation.reserved_bandwidth;
}

void QosPolicyEvaluator::reserve(const Evaluation& evaluation) {
  const QosTaskMeta& task = evaluation.task;
  const std::string who = "task '" + task.id + "' ";
  if (evaluation.decision == Decision::reject) refuse(who + "was rejected: " + evaluation.reason);
  if (admitted_.contains(task.id)) refuse(who + "is reserved already");
  if (find_queued(task.id) != queue_.end()) refuse(who + "is queued already");

  const Evaluation now = evaluate(task);
  const bool holds = evaluation.admitted()
                         ? now.admitted() && evaluation.reserved_bandwidth <= now.reserved_bandwidth
                         : now.decision == Decision::queue;
  if (!holds) {
    throw Error(ErrorCode::admission, who + "must be evaluated again: the decision was " +
                                          to_string(evaluation.decision) + " and is now " +
                                          to_string(now.decision) +
                                          (now.reason.empty() ? "" : " (" + now.reason + ")"));
  }
  if (evaluation.admitted()) {
    add(evaluation);
  } else {
    queue_.insert(behind(task.tier), task);
  }
}

std::vector<Evaluation> QosPolicyEvaluator::release(const std::string& id) {
  if (const auto task = admitted_.find(id); task != admitted_.end()) {
    Amounts& reserved = reserved_[index_of(task->second.task.tier)];
    reserved.memory -= task->second.reserved_memory;
    reserved.bandwidth -= task->second.reserved_bandwidth;
    admitted_.erase(task);
  } else if (const auto queued = find_queued(id); queued != queue_.end()) {
    queue_.erase(queued);
  } else {
    refuse("no task '" + id + "' is reserved or queued");
  }
  std::vector<Evaluation> admitted;
  while (!queue_.empty()) {
    const Evaluation first = pgk::evaluate(queue_.front(), availability());
    if (!first.admitted()) break;
    add(first);
    queue_.pop_front();
    admitted.push_back(first);
  }
  return admitted;
}

QosPolicyEvaluator::Stats QosPolicyEvaluator::stats() const {
  const Availability available = availability();
  return {total_,
          reserved_[index_of(Tier::guaranteed)],
          reserved_[index_of(Tier::burstable)],
          {available.free_memory, available.free_bandwidth},
          admitted_.size(),
          queue_.size(),
          static_cast<std::size_t>(queue_.end() - behind(Tier::burstable))};
}

void QosPolicyEvaluator::reset() {
  reserved_ = {};
  admitted_.clear();
  queue_.clear();
}

}  // namespace pgk
