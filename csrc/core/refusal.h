// A request that nobody could serve: the facts, and the text that is made of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/error.h"
#include "core/types.h"

namespace pgk {

// Bytes throughout.
struct Refusal {
  struct Holder {
    std::string name;
    Tier tier = Tier::burstable;
    bool orphan = false;
    bool in_use = false;
    bool pinned = false;
    std::size_t used = 0;
    std::size_t resident = 0;
    std::size_t evicted = 0;
    std::size_t base = 0;
    bool mate = true;  // of the context's partition

    // What it keeps from others: what it has, or what is kept for it.
    std::size_t committed() const { return std::max(base, resident); }
  };
  // What was wanted: a block, or all of the context back from host memory.
  enum class Wanted : std::uint8_t { block, restore };

  Wanted wanted = Wanted::block;
  std::string context;
  Tier tier = Tier::burstable;
  std::size_t requested = 0;
  std::size_t used = 0;
  std::size_t peak = 0;
  std::size_t resident = 0;
  std::size_t evicted = 0;
  std::size_t budget = 0;
  std::size_t available = 0;  // what it could have in addition, in pieces
  std::size_t page = 0;
  std::string partition;  // empty: in none that has a limit
  std::size_t partition_resident = 0;
  std::size_t partition_limit = 0;
  bool is_on_host = false;
  std::string device;  // as a sentence calls it
  std::size_t capacity = 0;
  std::size_t free = 0;      // of the capacity, bases that are not filled included
  std::size_t reserved = 0;  // of what is free, for bases of others
  bool is_short_in_partition = false;
  std::string reason;           // a clause
  bool is_explained = false;    // by who refused it; else the reason is what the figures say
  std::vector<Holder> holders;  // of the device, the context itself included; the largest first
  std::size_t others = 0;       // how many more there are
  std::size_t others_committed = 0;

  static constexpr std::size_t kHolders = 10;
};

// Begins as the text of torch's own error does for that device, since programs know it by that.
std::string to_text(const Refusal& refusal);

// The latest refusals, by their text: torch makes its exceptions of text alone.
class Refusals {
 public:
  static constexpr std::size_t kKept = 256;

  // Keeps it and throws it.
  [[noreturn]] static void raise(Refusal refusal);
  // The latest whose text the error's begins with; of equal texts the latest.
  static std::optional<Refusal> find(std::string_view error);
  // Around a fork.
  static void lock();
  static void unlock();
};

}  // namespace pgk
