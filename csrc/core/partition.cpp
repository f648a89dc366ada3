#include "core/partition.h"

#include <cmath>
#include <utility>

#include "core/error.h"
#include "core/manager.h"

namespace pgk {
namespace {

[[noreturn]] void invalid(const std::string& text) {
  throw Error(ErrorCode::invalid_value, text);
}

}  // namespace

std::shared_ptr<Partition> find_partition(const Partitions& partitions, const std::string& id) {
  std::string known;
  for (const auto& partition : partitions) {
    if (partition->id == id) return partition;
    known += (known.empty() ? "'" : ", '") + partition->id + "'";
  }
  invalid("unknown partition '" + id + "'; there are: " + (known.empty() ? "none" : known));
}

PartitionManager::PartitionManager(const PartitionConfig& config,
                                   const std::shared_ptr<Manager>& manager)
    : config_(std::make_shared<const PartitionConfig>(config)), manager_(manager) {
  const std::size_t capacity = manager->device()->properties().capacity;
  if (config.total_memory == 0 || config.total_memory > capacity) {
    invalid("total_memory of " + format_bytes(config.total_memory) +
            " is not between one byte and the device's capacity of " + format_bytes(capacity));
  }
  if (!std::isfinite(config.overcommit_ratio) || config.overcommit_ratio < 1) {
    invalid("overcommit_ratio must be 1 or more, got " + std::to_string(config.overcommit_ratio));
  }
}

PartitionManager::~PartitionManager() {
  // First: a partition whose last context leaves meanwhile must see that it is nobody's.
  const std::weak_ptr<const PartitionConfig> config = std::exchange(config_, nullptr);
  if (const auto manager = manager_.lock()) manager->abandon_partitions(config);
}

std::shared_ptr<Manager> PartitionManager::manager() const {
  auto manager = manager_.lock();
  if (!manager || manager->is_shut_down())
    invalid("the device of this partition manager was shut down");
  return manager;
}

std::shared_ptr<Partition> PartitionManager::create(const std::string& id, const std::string& name,
                                                    const PartitionLimits& limits) {
  return manager()->create_partition(config_, id, name, limits);
}

Partitions PartitionManager::partitions() const {
  return manager()->partitions(config_);
}

std::shared_ptr<Partition> PartitionManager::get(const std::string& id) const {
  return find_partition(partitions(), id);
}

void PartitionManager::remove(const std::string& id) {
  manager()->remove_partition(get(id));
}

void PartitionManager::assign(Context& context, const std::optional<std::string>& id) {
  manager()->assign(context, id ? get(*id) : nullptr);
}

}  // namespace pgk
