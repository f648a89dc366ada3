// The manager's eighth part: partitions, and the streams that contexts have in them.
#include <algorithm>
#include <utility>

#include "core/blocking.h"
#include "core/error.h"
#include "core/manager_moves.h"
#include "core/scope_exit.h"

namespace pgk {
namespace {

using ContextLock = std::lock_guard<SpinLock>;

bool is_of(const Partition& partition, const std::weak_ptr<const PartitionConfig>& config) {
  return !partition.config.owner_before(config) && !config.owner_before(partition.config);
}

}  // namespace

// Creating, removing -----------------------------------------------------------------------------

std::shared_ptr<Partition> Manager::create_partition(
    const std::shared_ptr<const PartitionConfig>& config, const std::string& id,
    const std::string& name, const PartitionLimits& limits) {
  const std::string refused = "partition '" + id + "': ";
  const std::size_t granularity = device_->properties().granularity;
  if (id.empty()) throw Error(ErrorCode::invalid_value, "a partition needs an id");
  if (limits.memory && *limits.memory < granularity) {
    throw Error(ErrorCode::invalid_value,
                refused + "a memory limit of " + format_bytes(*limits.memory) +
                    " is less than one page of " + format_bytes(granularity));
  }
  const Blocking blocking;
  const std::lock_guard lock(mutex_);
  require_usable();
  device_said_.clear();
  std::size_t memory = 0;
  double bandwidth = limits.bandwidth.value_or(0);
  for (const auto& other : partitions_) {
    if (other->id == id) {
      throw Error(ErrorCode::invalid_value, "a partition '" + id + "' exists already");
    }
    if (!is_of(*other, config)) continue;
    memory += other->limits.memory.value_or(0);
    bandwidth += other->limits.bandwidth.value_or(0);
  }
  if (limits.memory.value_or(0) > config->limit() - memory) {
    throw Error(ErrorCode::admission, refused + "a memory limit of " +
                                          format_bytes(*limits.memory) +
                                          " does not fit: partitions have " + format_bytes(memory) +
                                          " of " + format_bytes(config->limit()));
  }
  if (bandwidth > 1 + 1e-6) {
    throw Error(ErrorCode::admission,
                refused + "the shares of bandwidth would add up to " + std::to_string(bandwidth));
  }
  auto gate = limits.streams
                  ? std::make_shared<SessionGate>("partition '" + id + "'", *limits.streams)
                  : nullptr;
  auto partition = std::make_shared<Partition>(
      Partition{id, name, limits, config, std::move(gate), Ledger::kDevice, {}});
  partition->account = ledger_.open_partition(limits.memory.value_or(SIZE_MAX));
  ScopeExit close([&] { close_partition(*partition); });
  if (limits.compute) {
    on_behalf_of("partition '" + id + "'", [&] {
      partition->share = shares_.take(*limits.compute);
      // Now, where it can be refused, and ahead of the first session.
      device_->destroy_stream(
          device_->create_stream(priority_of(Tier::guaranteed), processors(*partition)));
    });
  }
  partitions_.push_back(partition);
  close.dismiss();
  confine_all();
  return partition;
}

void Manager::close_partition(Partition& partition) {
  // Whoever still looks at it must not find the share of somebody else.
  if (partition.share) shares_.give_back(*std::exchange(partition.share, std::nullopt));
  ledger_.close_partition(partition.account);
}

std::vector<std::string> Manager::members(const Partition& partition) const {
  std::vector<std::string> names;
  for (const auto& context : contexts_) {
    if (context->partition_.get() == &partition) names.push_back(context->name());
  }
  return names;
}

void Manager::remove_partition(const std::shared_ptr<Partition>& partition) {
  const Blocking blocking;
  const std::lock_guard lock(mutex_);
  require_usable();
  const auto found = std::find(partitions_.begin(), partitions_.end(), partition);
  if (found == partitions_.end()) return;
  const std::vector<std::string> names = members(*partition);
  if (!names.empty()) {
    std::string text = "partition '" + partition->id + "' is in use and cannot be deleted; in it:";
    for (const std::string& name : names) text += " '" + name + "'";
    throw Error(ErrorCode::busy, text);
  }
  partitions_.erase(found);
  close_partition(*partition);
  confine_all();
}

void Manager::abandon_partitions(const std::weak_ptr<const PartitionConfig>& config) {
  const Blocking blocking;
  const std::lock_guard lock(mutex_);
  if (forked_) return;
  const auto removed = std::erase_if(partitions_, [&](const auto& partition) {
    if (!is_of(*partition, config) || !members(*partition).empty()) return false;
    close_partition(*partition);
    return true;
  });
  if (removed > 0) confine_all();
}

Partitions Manager::partitions(const std::shared_ptr<const PartitionConfig>& config) const {
  const std::lock_guard lock(mutex_);
  Partitions found;
  std::copy_if(partitions_.begin(), partitions_.end(), std::back_inserter(found),
               [&](const auto& partition) { return is_of(*partition, config); });
  return found;
}

PartitionUsage Manager::partition_usage(const Partition& partition) const {
  const std::lock_guard lock(mutex_);
  PartitionUsage usage;
  usage.contexts = members(partition);
  for (const auto& context : contexts_) {
    if (context->partition_.get() != &partition) continue;
    const Ledger::Account& account = ledger_.account(context->id());
    usage.used += context->used_bytes();
    usage.resident += account.resident;
    usage.evicted += account.evicted;
    usage.base += account.base;
    usage.sessions += context->sessions();
  }
  if (partition.gate) usage.waiting = partition.gate->waiting();
  if (processors(partition) != 0) usage.processors = shares_.count(processors(partition));
  return usage;
}

// Contexts in partitions -------------------------------------------------------------------------

void Manager::assign(Context& context, const std::shared_ptr<Partition>& partition) {
  const Blocking blocking;
  const std::string refused = "context '" + context.name() + "' cannot be assigned";
  const Ledger::PartitionId account = partition ? partition->account : Ledger::kDevice;
  const auto missing = [&] {
    require_open(context);
    const Ledger::Account& own = ledger_.account(context.id());
    return own.partition == account || account == Ledger::kDevice ? 0 : own.committed();
  };
  const auto require_existing = [&] {
    if (partition &&
        std::find(partitions_.begin(), partitions_.end(), partition) == partitions_.end()) {
      throw Error(ErrorCode::invalid_value, "partition '" + partition->id + "' was deleted");
    }
  };
  until_settled([&]() -> std::optional<EventId> {
    require_existing();
    // On the device it has its place already.
    const std::size_t committed = missing();
    reclaim_for_base(committed, account, &context);
    return ledger_.uncommitted(account) < committed ? first_retired() : std::nullopt;
  });
  Stopped self(*this, /*victims=*/false);
  Lock lock(mutex_);
  wait_until_still(lock, context);
  require_open(context);
  require_existing();
  if (context.partition_ == partition) return;
  if (!self.stop(context)) {
    throw Error(ErrorCode::busy, refused + " while it has open sessions");
  }
  device_said_.clear();
  on_behalf_of(refused + (partition ? " to partition '" + partition->id + "'" : std::string()),
               [&] { ledger_.assign(context.id(), account); });
  const std::shared_ptr<Partition> before = std::exchange(context.partition_, partition);
  context.set_partition_gate(partition ? partition->gate : nullptr);
  release(before);
  self.let_go();
  confine(context);
  aim_host_pool();
}

// After a context has left it.
void Manager::release(const std::shared_ptr<Partition>& partition) {
  if (!partition || !partition->config.expired() || !members(*partition).empty()) return;
  std::erase(partitions_, partition);
  close_partition(*partition);
  confine_all();
}

// Streams ----------------------------------------------------------------------------------------

// Guaranteed work first, best effort last, as far as the device tells them apart.
int Manager::priority_of(Tier tier) const {
  const int least = device_->properties().least_priority;
  const int greatest = device_->properties().greatest_priority;
  switch (tier) {
    case Tier::guaranteed:
      return greatest;
    case Tier::burstable:
      return least + (greatest - least) / 2;
    case Tier::best_effort:
      break;
  }
  return least;
}

ProcessorSet Manager::processors(const Partition& partition) const {
  return partition.share ? shares_.set(*partition.share) : 0;
}

ProcessorSet Manager::processors_of(const Context& context) const {
  const bool has_share = context.partition_ && context.partition_->share;
  return has_share ? processors(*context.partition_) : shares_.left();
}

void Manager::confine_all() {
  for (const auto& context : contexts_) confine(*context);
}

// Gives the context a stream on the processors that are its own now: at once if it is idle, else
// when it is entered the next time.
void Manager::confine(Context& context) {
  if (context.own_stream().processors == processors_of(context)) {
    context.sessions_.fetch_and(~Context::kMisplaced);
    return;
  }
  context.sessions_.fetch_or(Context::kMisplaced);
  Stopped self(*this, /*victims=*/false);
  if (!self.stop(context)) return;
  try {
    replace_stream(context);
  } catch (const Error&) {
    // Whoever enters tries again, and says so.
  }
  self.let_go();
}

// Of a context that the caller has stopped.
void Manager::replace_stream(Context& context) {
  const ProcessorSet processors = processors_of(context);
  const StreamId now = context.stream();
  const StreamId next = stream_on(context, processors, /*for_captures=*/false);
  if (next != now) {
    // So what is free in the order of the one is free in the order of the other.
    if (!device_->is_idle(now)) device_->wait(next, device_->record(now));
    const ContextLock lock(context.mutex_);
    // Nobody has to say that blocks of the lane are used on the old one, even from now on.
    for (const std::uint32_t start : context.arena_.live_blocks_of(0)) {
      std::vector<StreamId>& uses = context.uses_[start];
      if (std::find(uses.begin(), uses.end(), now) == uses.end()) uses.push_back(now);
    }
    context.lanes_.front() = next;
    context.stream_ = next;
  }
  context.sessions_.fetch_and(~Context::kMisplaced);
}

StreamId Manager::stream_on(Context& context, ProcessorSet processors, bool for_captures) {
  for (const Context::OwnStream& own : context.own_streams_) {
    if (own.processors == processors && own.for_captures == for_captures) return own.id;
  }
  context.own_streams_.reserve(context.own_streams_.size() + 1);
  const StreamId stream = device_->create_stream(priority_of(context.tier()), processors);
  context.own_streams_.push_back({stream, processors, for_captures});
  return stream;
}

StreamId Manager::capture_stream(Context& context) {
  const std::lock_guard lock(mutex_);
  require_open(context);
  return stream_on(context, context.own_stream().processors, /*for_captures=*/true);
}

double Manager::available_compute() const {
  const std::lock_guard lock(mutex_);
  return std::max(1 - shares_.sum(), 0.0);
}

bool Manager::is_divided_up() const {
  const std::lock_guard lock(mutex_);
  return !device_->properties().processor_groups.empty() && shares_.sum() > 0 &&
         shares_.left() == 0;
}

}  // namespace pgk
