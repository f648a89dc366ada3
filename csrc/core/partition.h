// A part of the device for some of its contexts: a limit of memory, which they share, and
// processors on which they run, and no other partition. Tiers act on the whole device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/ledger.h"
#include "core/processor_shares.h"
#include "core/session_queue.h"

namespace pgk {

class Context;
class Manager;

// Shares are above 0 and at most 1; who makes the limits sees to that.
struct PartitionLimits {
  std::optional<std::size_t> memory;     // bytes of the device that its contexts hold at a time
  std::optional<double> compute;         // share of the processors
  std::optional<double> bandwidth;       // share of the memory's; nothing enforces it
  std::optional<std::uint32_t> streams;  // sessions that are open at a time
};

// What partitions divide: their memory limits add up to the total at most, or to the ratio times
// that; their shares to 1.
struct PartitionConfig {
  std::size_t total_memory = 0;
  bool allow_overcommit = false;
  double overcommit_ratio = 1.0;

  std::size_t limit() const {
    const double limit = static_cast<double>(total_memory) * overcommit_ratio;
    if (!allow_overcommit) return total_memory;
    // Above that a sum of limits might be more than can be counted.
    return limit < 0x1p63 ? static_cast<std::size_t>(limit) : std::size_t{1} << 63;
  }
};

struct Partition {
  const std::string id;
  const std::string name;
  const PartitionLimits limits;
  // Where its limit counts. When that is gone, it goes with its last context.
  const std::weak_ptr<const PartitionConfig> config;
  const std::shared_ptr<SessionGate> gate;  // null without a limit of streams
  // Below: with the manager's lock.
  Ledger::PartitionId account = Ledger::kDevice;
  std::optional<ProcessorShares::Id> share;
};

using Partitions = std::vector<std::shared_ptr<Partition>>;

// Throws ErrorCode::invalid_value, with the ids that there are, if none has this one.
std::shared_ptr<Partition> find_partition(const Partitions& partitions, const std::string& id);

// Bytes throughout.
struct PartitionUsage {
  std::size_t used = 0;
  std::size_t resident = 0;
  std::size_t evicted = 0;
  std::size_t base = 0;
  std::uint32_t sessions = 0;
  std::size_t waiting = 0;  // for a session
  std::vector<std::string> contexts;
  std::optional<unsigned> processors;  // nothing where it has no share, or they cannot be divided
};

// The partitions of one configuration, all of which the manager keeps: any thread may call.
class PartitionManager {
 public:
  // Throws ErrorCode::invalid_value.
  PartitionManager(const PartitionConfig& config, const std::shared_ptr<Manager>& manager);
  // Its partitions go, those that have contexts once the last of these is gone.
  ~PartitionManager();
  PartitionManager(const PartitionManager&) = delete;
  PartitionManager& operator=(const PartitionManager&) = delete;

  // Throws ErrorCode::invalid_value, ::admission or ::device; nothing has changed then.
  std::shared_ptr<Partition> create(const std::string& id, const std::string& name,
                                    const PartitionLimits& limits);
  // These throw ErrorCode::invalid_value if there is none of that id; the first also
  // ErrorCode::busy if it has contexts, the second as Manager::assign().
  void remove(const std::string& id);
  void assign(Context& context, const std::optional<std::string>& id);
  std::shared_ptr<Partition> get(const std::string& id) const;
  // In the order of their creation.
  Partitions partitions() const;

  const PartitionConfig& config() const { return *config_; }
  // Throws ErrorCode::invalid_value if it was shut down.
  std::shared_ptr<Manager> manager() const;

 private:
  std::shared_ptr<const PartitionConfig> config_;
  const std::weak_ptr<Manager> manager_;
};

}  // namespace pgk
