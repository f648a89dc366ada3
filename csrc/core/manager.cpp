#include "core/manager.h"

#include <algorithm>
#include <bit>
#include <iterator>
#include <utility>

#include "core/address_table.h"
#include "core/blocking.h"
#include "core/scope_exit.h"

namespace pgk {
namespace {

using ContextLock = std::lock_guard<SpinLock>;

// Bulk pages: the device calls cost the same for 2 MiB as for 32 MiB, while a budget should not
// lose more than a 64th to rounding.
constexpr std::size_t kLargestPage = 32 * MiB;
constexpr std::size_t kPagesPerBudget = 64;

// Contexts share 47 bits of addresses, and there may be a thousand small ones. So each has as many
// as it needs if its budget grows to so many times itself, or to so much.
constexpr std::size_t kMostGrowth = 16;
constexpr std::size_t kAnyBudget = 16 * GiB;

// A budget never fills its range: free gaps between live pages must still hold large blocks.
// Segments have as large a zone of their own above.
constexpr std::size_t kRangePerBudget = 2;

// Blocks that outlive their manager must still find their context by address, and be valid.
void keep_forever(const std::shared_ptr<Device>& device, std::shared_ptr<Context> context) {
  static std::mutex mutex;
  static auto* kept = new std::vector<std::pair<std::shared_ptr<Device>, std::shared_ptr<Context>>>;
  const std::lock_guard lock(mutex);
  kept->emplace_back(device, std::move(context));
}

}  // namespace

std::shared_ptr<Manager> Manager::make(std::shared_ptr<Device> device,
                                       ThreadStreams* thread_streams, std::size_t host_limit,
                                       std::chrono::nanoseconds claim_timeout) {
  return std::shared_ptr<Manager>(
      new Manager(std::move(device), thread_streams, host_limit, claim_timeout));
}

Manager::Manager(std::shared_ptr<Device> device, ThreadStreams* thread_streams,
                 std::size_t host_limit, std::chrono::nanoseconds claim_timeout)
    : device_(std::move(device)),
      thread_streams_(thread_streams),
      ledger_(device_->properties().capacity,
              device_->properties().can_move ? host_limit : std::size_t{0}),
      pool_(*device_),
      host_pool_(device_, ledger_.host_limit()),
      compute_gate_(std::make_shared<ComputeGate>(device_)),
      shares_(device_->properties().processor_groups),
      claim_timeout_(claim_timeout) {}

Manager::~Manager() {
  if (!forked_) {
    for (const auto& context : contexts_) drop_reservation(*context);
    orphans_.insert(orphans_.end(), std::make_move_iterator(contexts_.begin()),
                    std::make_move_iterator(contexts_.end()));
    contexts_.clear();
    collect_orphans();
    pool_.trim(ledger_.unfilled());
  }
  for (Context* context : all()) keep_forever(device_, context->shared_from_this());
}

// Creating, destroying, resizing ----------------------------------------------------------------

std::size_t Manager::page_bytes_for(std::size_t max) const {
  return std::clamp(std::bit_floor(max / kPagesPerBudget), device_->properties().granularity,
                    kLargestPage);
}

void Manager::require_usable() const {
  if (forked_) {
    throw Error(ErrorCode::forked,
                "this process is a forked child of the one that initialized pygpukit_torch and "
                "cannot use its device (start the process with 'spawn' instead)");
  }
}

void Manager::validate(const ContextSpec& spec) const {
  const auto fail = [&](const std::string& text) {
    throw Error(ErrorCode::invalid_value, "context '" + spec.name + "': " + text);
  };
  const std::size_t granularity = device_->properties().granularity;
  if (spec.max < granularity) {
    fail("max_vram of " + format_bytes(spec.max) + " is less than one page of " +
         format_bytes(granularity));
  }
  if (spec.base > spec.max) {
    fail("base_vram of " + format_bytes(spec.base) + " is above max_vram of " +
         format_bytes(spec.max));
  }
  if (spec.tier == Tier::guaranteed && spec.base != spec.max) {
    fail("a guaranteed context reserves all of its max_vram; base_vram of " +
         format_bytes(spec.base) + " differs from max_vram of " + format_bytes(spec.max));
  }
  if (spec.tier == Tier::best_effort && spec.base != 0) {
    fail("a best-effort context reserves nothing; base_vram of " + format_bytes(spec.base) +
         " must be 0");
  }
  if (spec.tier == Tier::guaranteed && spec.yields) fail("a guaranteed context yields to nobody");
  const std::size_t capacity = device_->properties().capacity;
  if (spec.max > capacity && spec.base <= capacity) {
    fail("max_vram of " + format_bytes(spec.max) + " exceeds the device's capacity of " +
         format_bytes(capacity));
  }
}

std::shared_ptr<Context> Manager::create_context(const ContextSpec& spec) {
  const auto require_possible = [&] {
    require_usable();
    if (spec.name.empty()) throw Error(ErrorCode::invalid_value, "a context needs a name");
    for (const auto& context : contexts_) {
      if (context->name() == spec.name) {
        throw Error(ErrorCode::invalid_value, "a context named '" + spec.name + "' exists already");
      }
    }
    validate(spec);
  };
  std::shared_ptr<Partition> partition;
  make_room_for_base([&]() -> Reservation {
    require_possible();
    if (!spec.partition.empty()) partition = find_partition(partitions_, spec.partition);
    return {spec.base, partition ? partition->account : Ledger::kDevice, nullptr};
  });
  const std::lock_guard lock(mutex_);
  require_possible();  // again: others may have come in between
  if (!spec.partition.empty()) partition = find_partition(partitions_, spec.partition);
  device_said_.clear();
  collect_orphans();
  refresh_outside();

  const std::string who =
      "context '" + spec.name + "'" + (partition ? " in partition '" + partition->id + "'" : "");
  const std::size_t page = page_bytes_for(spec.max);
  const auto account = on_behalf_of(who, [&] {
    return ledger_.open(spec.max, spec.base, spec.tier,
                        partition ? partition->account : Ledger::kDevice, page);
  });
  ScopeExit close_account([&] { ledger_.close(account); });
  const HandlePool::Keep others = ledger_.unfilled(Tier::guaranteed, account);
  on_behalf_of(who, [&] { pool_.fill(page, spec.base / page, others); });

  const std::size_t most = std::max(kMostGrowth * spec.max, kAnyBudget);
  const std::size_t segments =
      kRangePerBudget * round_up(std::min(most, ledger_.capacity()), AddressTable::kUnit);
  const std::size_t range = 2 * segments;
  const Address address =
      on_behalf_of(who, [&] { return device_->reserve(range, AddressTable::kUnit); });
  ScopeExit unreserve([&] { device_->unreserve(address, range); });
  const ProcessorSet processors =
      partition && partition->share ? shares_.set(*partition->share) : shares_.left();
  const StreamId stream =
      on_behalf_of(who, [&] { return device_->create_stream(priority_of(spec.tier), processors); });
  ScopeExit destroy_stream([&] { device_->destroy_stream(stream); });

  auto context = std::make_shared<Context>(
      shared_from_this(), spec, account, page, static_cast<std::uint32_t>(range / page),
      static_cast<std::uint32_t>(segments / page), address, stream, processors);
  if (partition) context->set_partition_gate(partition->gate);
  context->partition_ = std::move(partition);
  if (!AddressTable::set(address, range, address + range - segments, context.get())) {
    throw Error(ErrorCode::device,
                "context '" + spec.name + "': the device reserved addresses beyond 47 bits");
  }
  contexts_.push_back(context);
  if (spec.tier == Tier::guaranteed) compute_gate_->enrol(context);
  destroy_stream.dismiss();
  unreserve.dismiss();
  close_account.dismiss();
  aim_host_pool();
  return context;
}

void Manager::require_live(const Context& context) const {
  require_usable();
  context.require_open();
  const auto is_it = [&](const auto& known) { return known.get() == &context; };
  if (std::none_of(contexts_.begin(), contexts_.end(), is_it)) {
    throw Error(ErrorCode::invalid_value,
                "context '" + context.name() + "' belongs to another device");
  }
}

void Manager::require_open(const Context& context) const {
  const ContextLock lock(context.mutex_);
  require_live(context);
}

void Manager::destroy_context(Context& context) {
  const Blocking blocking;
  Lock lock(mutex_);
  wait_until_still(lock, context);
  {
    const ContextLock context_lock(context.mutex_);
    require_live(context);
    if (!context.close()) {
      throw Error(ErrorCode::busy, "context '" + context.name() + "' has " +
                                       std::to_string(context.sessions()) +
                                       " open session(s) and cannot be destroyed");
    }
    context.state_ = Context::State::orphan;
    context.manager_of_orphan_ = shared_from_this();
    drop_reservation(context);
    ledger_.assign(context.id(), Ledger::kDevice);
  }
  context.entrance_.close();
  const auto it = std::find_if(contexts_.begin(), contexts_.end(),
                               [&](const auto& entry) { return entry.get() == &context; });
  orphans_.push_back(std::move(*it));
  contexts_.erase(it);
  release(std::exchange(context.partition_, nullptr));
  collect_orphans();
  trim_pool();
  aim_host_pool();
}

void Manager::resize_context(Context& context, std::size_t max, std::size_t base) {
  const std::size_t page = context.page_bytes();
  const std::size_t target = max / page;
  const auto beyond_target = [&] {
    const std::size_t pages = context.arena_.resident_pages();
    return pages > target ? pages - target : 0;
  };
  const auto require_fit = [&] {
    if (beyond_target() == 0) return;
    const std::string refused =
        "context '" + context.name() + "' cannot be resized to " + format_bytes(max) + ": ";
    const std::string held = format_bytes(context.arena_.resident_pages() * page);
    if (!device_said_.empty()) {
      throw Error(ErrorCode::device, refused + "not enough of its pages of " + held +
                                         " could be given back; the device said: " + device_said_);
    }
    throw Error(ErrorCode::invalid_value, refused + "its live tensors use " +
                                              format_bytes(context.arena_.used_bytes()) +
                                              " in pages of " + held);
  };
  until_settled([&]() -> std::optional<EventId> {
    const ContextLock context_lock(context.mutex_);
    require_live(context);
    device_said_.clear();
    validate({context.name(), max, base, context.tier(), {}, context.yields(), 0});
    const std::size_t most = context.arena_.upper_zone() / kRangePerBudget * page;
    if (max > most) {
      throw Error(ErrorCode::invalid_value,
                  "context '" + context.name() +
                      "' was created with addresses for a max_vram of at most " +
                      format_bytes(most) + ", not " + format_bytes(max));
    }
    if (max < page) {
      throw Error(ErrorCode::invalid_value,
                  "context '" + context.name() + "' was created with pages of " +
                      format_bytes(page) + " and cannot be resized to " + format_bytes(max));
    }
    context.settle_fences();
    const std::size_t retired = context.retired_bytes() / page;
    if (beyond_target() > retired) give_up_pages(context, beyond_target() - retired);
    if (beyond_target() > 0 && !context.retired_.empty()) return context.retired_.front().event;
    require_fit();
    return std::nullopt;
  });
  make_room_for_base([&]() -> Reservation {
    require_open(context);
    const Ledger::Account& account = ledger_.account(context.id());
    return {base - std::min(base, account.committed()), account.partition, &context};
  });

  const Blocking blocking;
  Lock lock(mutex_);
  wait_until_still(lock, context);
  const ContextLock context_lock(context.mutex_);
  require_live(context);
  device_said_.clear();
  require_fit();  // again: others may have allocated in between
  const Ledger::Account before = ledger_.account(context.id());
  const std::string who = "context '" + context.name() + "'";
  on_behalf_of(who, [&] { ledger_.resize(context.id(), max, base); });
  ScopeExit undo([&] { ledger_.resize(context.id(), before.max, before.base); });
  // By now it is promised; what others have lent is not there.
  const std::size_t added = before.unfilled(base) - before.unfilled(before.base);
  if (base > before.base && added > 0) {
    HandlePool::Keep others = ledger_.unfilled();
    others[page] -= added;
    on_behalf_of(who, [&] { pool_.fill(page, added, others); });
  }
  undo.dismiss();
  context.budget_.store(max, std::memory_order_relaxed);
  aim_host_pool();
}

}  // namespace pgk
