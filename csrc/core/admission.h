// Who is admitted to a device: the one rule for execution contexts and for the tasks of a
// QosPolicyEvaluator. Pure accounting.
//
// A task asks for memory and for a share of the bandwidth. The decision is the first that applies:
//
//   reject    it asks for more than there is in all, so it can never be admitted
//   queue     it does not fit now, or other tasks wait that go first
//   throttle  it is burstable, and less memory is free than its limit, or less bandwidth than it
//             asks for
//   admit     everything else
//
// What is admitted reserves its memory request, and the bandwidth that it asks for or, throttled,
// gets; both stay the same until it is released. What a burstable task may use beyond its request,
// up to its limit, is reserved by nobody: it is taken while it is free. A burstable task waits for
// all of its memory request, but only for some bandwidth. Best effort asks for nothing, reserves
// nothing, and waits while no memory or no bandwidth is left.
//
// Tasks wait in the order of their priority, then first come, and only the first one may be
// admitted, so that many small ones never keep a large one waiting. A newcomer goes ahead of those
// of a lower priority, and behind all others, even where it would fit and they do not.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "core/types.h"

namespace pgk {

// Of the device's bandwidth, in billionths, so that sums are exact. Rounded down: n times 1/n fit.
using Share = std::uint32_t;
inline constexpr Share kWhole = 1'000'000'000;

constexpr double to_double(Share share) {
  return static_cast<double>(share) / kWhole;
}

// What somebody asks for.
struct QosTaskMeta {
  std::string id = {};
  std::string name = {};
  Tier tier = Tier::burstable;
  std::size_t memory_request = 0;
  std::size_t memory_limit = 0;
  double burst_ratio = 1;
  Share bandwidth_request = 0;

  // Throw ErrorCode::invalid_value for an empty id, no memory, a bandwidth outside of 0 to 1, or a
  // burst ratio that is below 1 or infinite.
  static QosTaskMeta guaranteed(std::string id, std::string name, std::size_t memory,
                                double bandwidth_request = 0);
  static QosTaskMeta burstable(std::string id, std::string name, std::size_t memory_request,
                               double burst_ratio, double bandwidth_request = 0);
  static QosTaskMeta best_effort(std::string id, std::string name);
};

// What there is for a task.
struct Availability {
  std::size_t total_memory = 0;
  std::size_t free_memory = 0;
  Share total_bandwidth = kWhole;
  Share free_bandwidth = kWhole;
  std::size_t ahead = 0;             // tasks that wait and go first
  const char* owner = "the device";  // of all that, for the reason
};

enum class Decision : std::uint8_t { admit, throttle, queue, reject };

constexpr const char* to_string(Decision decision) {
  constexpr std::array names{"admit", "throttle", "queue", "reject"};
  return names[static_cast<std::size_t>(decision)];
}

struct Evaluation {
  QosTaskMeta task;
  Decision decision = Decision::reject;
  std::string reason = {};  // with figures; empty for admit
  std::size_t reserved_memory = 0;
  Share reserved_bandwidth = 0;

  bool admitted() const { return decision == Decision::admit || decision == Decision::throttle; }
  int priority() const { return static_cast<int>(task.tier) * 50; }
};

Evaluation evaluate(const QosTaskMeta& task, const Availability& available);

// The tasks that share a device, or a part of it. Not thread-safe.
class QosPolicyEvaluator {
 public:
  struct Amounts {
    std::size_t memory = 0;
    Share bandwidth = 0;
  };
  struct Stats {
    Amounts total;
    Amounts guaranteed;
    Amounts burstable;
    Amounts available;
    std::size_t admitted = 0;  // tasks
    std::size_t queued = 0;
    std::size_t best_effort_queue = 0;  // of these
  };

  // Throws ErrorCode::invalid_value unless there is memory and a bandwidth of at most 1.
  QosPolicyEvaluator(std::size_t total_memory, double total_bandwidth);

  Evaluation evaluate(const QosTaskMeta& task) const;
  // Reserves what was evaluated, or puts the task into the queue. Throws ErrorCode::invalid_value
  // if it was rejected, or its id is known already, and ErrorCode::admission if the evaluation no
  // longer holds: it would not be admitted with as much now, or need not wait. On an error nothing
  // has changed.
  void reserve(const Evaluation& evaluation);
  // Ends a task, or takes it out of the queue. Returns who was admitted from the queue for it, in
  // order. Throws ErrorCode::invalid_value if no task has this id.
  std::vector<Evaluation> release(const std::string& id);
  Stats stats() const;
  // Forgets all tasks.
  void reset();

 private:
  Availability availability() const;
  std::deque<QosTaskMeta>::const_iterator behind(Tier tier) const;
  std::deque<QosTaskMeta>::const_iterator find_queued(const std::string& id) const;
  void add(const Evaluation& evaluation);

  Amounts total_;
  std::array<Amounts, 3> reserved_;             // by tier
  std::map<std::string, Evaluation> admitted_;  // by id
  std::deque<QosTaskMeta> queue_;               // in the order of admission
};

}  // namespace pgk
