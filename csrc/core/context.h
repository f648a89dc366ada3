// One execution context: its arena behind its own lock, which is all that an allocation that
// hits and every free take. What needs physical memory goes to the manager.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "core/arena.h"
#include "core/error.h"
#include "core/ledger.h"
#include "core/spin_lock.h"
#include "core/types.h"
#include "device/device.h"

namespace pgk {

class Manager;

struct ContextSpec {
  std::string name;
  std::size_t max = 0;
  std::size_t base = 0;
  Tier tier = Tier::burstable;
};

class Context : public std::enable_shared_from_this<Context> {
 public:
  struct Counters {
    std::uint64_t allocations = 0;
    std::uint64_t frees = 0;
    std::uint64_t growths = 0;  // requests that needed pages
    std::uint64_t refusals = 0;
    std::uint64_t pages_mapped = 0;
    std::uint64_t pages_unmapped = 0;
  };

  Context(std::shared_ptr<Manager> manager, ContextSpec spec, Ledger::Id account,
          std::size_t page_bytes, std::uint32_t page_count, Address address, StreamId stream);
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // At least `bytes` (> 0), aligned to a granule. Throws ErrorCode::out_of_memory with who, what
  // and how much; the context is then as before and usable.
  void* allocate(std::size_t bytes);
  // Throws ErrorCode::invalid_value if no live block of this context starts at `pointer`.
  void free(void* pointer);
  // The block's size, 0 if no live block of this context starts at `pointer`.
  std::size_t block_bytes(const void* pointer) const;

  // A context with open sessions cannot be destroyed.
  // Throws ErrorCode::context_destroyed or ErrorCode::forked.
  void begin_session();
  void end_session();

  const std::string& name() const { return spec_.name; }
  Tier tier() const { return spec_.tier; }
  std::uint64_t id() const { return account_; }
  StreamId stream() const { return stream_; }
  std::size_t page_bytes() const { return arena_.page_bytes(); }
  std::size_t used_bytes() const;
  std::size_t resident_bytes() const;
  bool is_destroyed() const;
  std::uint32_t sessions() const;
  Counters counters() const;
  void reset_peak();

 private:
  friend class Manager;

  // Anything but `open` diverts from the hot path.
  enum class State : std::uint8_t { open, orphan, forked };

  Address address_of(std::uint32_t page) const { return address_ + page * arena_.page_bytes(); }
  void require_open() const;

  mutable SpinLock mutex_;
  Arena arena_;
  Address address_;
  State state_ = State::open;
  Counters counters_;
  // Below: only with the manager's lock, except for what never changes.
  ContextSpec spec_;
  Ledger::Id account_;
  StreamId stream_;
  std::uint32_t sessions_ = 0;               // with mutex_
  std::map<std::uint32_t, Handle> handles_;  // of the resident pages
  std::weak_ptr<Manager> manager_;
  // Set while an orphan: its last free needs the manager.
  std::shared_ptr<Manager> manager_of_orphan_;
};

}  // namespace pgk
