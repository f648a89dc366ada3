// The blocks of one context's virtual range: pure bookkeeping in granules and pages. No memory
// behind the addresses is ever touched, so the same code serves VRAM and host memory.
//
// The range is tiled by blocks of six kinds:
//
//   live     handed out
//   fenced   released, but other streams may still use it; the owner says when they are done
//   cached   released, kept whole in a bin for the next request of exactly its size
//   free     resident and unused; neighbours of the same lane are always merged
//   retired  free pages about to become a hole; nothing can be allocated there any more
//   hole     has no physical memory; whole pages; neighbours are always merged
//
// Released memory may only be reused in the order of the stream that it was allocated for, so
// each stream has a lane: bins and free blocks of its own. A request is served from a bin of its
// lane, else best fit from the lane's free blocks, else after the lane's bins have been emptied
// into them (dlmalloc's deferred coalescing). Only if that fails does the arena need pages:
// plan_growth() says which, the owner maps them and calls add_pages(). Memory changes lanes by
// adopt(), once the owner has ordered the streams.
//
// The range has two zones, so that an address tells what kind of memory it is. Each lane lives in
// one of them, and memory only changes zones as pages. Not thread-safe: the owner locks.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "core/types.h"
#include "core/zeroed_array.h"

namespace pgk {

class Arena {
 public:
  static constexpr std::uint32_t kNone = ~std::uint32_t{0};
  using Lane = std::uint16_t;

  struct PageRun {
    std::uint32_t first = 0;
    std::uint32_t count = 0;
  };
  // The whole pages inside one free block.
  struct FreeRun {
    std::uint32_t block = 0;  // the block's first granule
    PageRun pages;
    Lane lane = 0;
  };

  // `page_bytes` is a power of two; the range is at most 2 TiB. Its pages from `upper_zone` on are
  // the upper zone; there is none by default. There is one lane, number 0, in the lower zone.
  Arena(std::size_t page_bytes, std::uint32_t page_count, std::uint32_t upper_zone = kNone);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Throws ErrorCode::invalid_value beyond kMostLanes.
  Lane add_lane(bool upper = false);
  std::size_t lanes() const { return lanes_.size(); }

  // Returns the first granule of a block of exactly `granules` (> 0), kNone if no resident free
  // range of the lane is large enough.
  std::uint32_t allocate(std::uint32_t granules, Lane lane = 0);
  // Returns the block's granules. Throws ErrorCode::invalid_value if no live block starts there.
  std::uint32_t release(std::uint32_t start);
  // As release(), but the block cannot be handed out again before unfence().
  std::uint32_t fence(std::uint32_t start);
  void unfence(std::uint32_t start);
  // 0 if no live block starts there.
  std::uint32_t live_granules(std::uint32_t start) const;
  // The lane of the live block that starts there, 0 if there is none.
  Lane lane_of(std::uint32_t start) const;

  // Moves all that `from` could hand out to `to`, in the same zone.
  void adopt(Lane from, Lane to);
  bool is_upper(Lane lane) const { return lanes_[lane].upper; }
  bool has_free(Lane lane) const {
    return lanes_[lane].cached_blocks > 0 || !lanes_[lane].free.empty();
  }

  // The fewest pages, at the lowest address, whose addition to the lane lets a request of
  // `granules` succeed. Nothing if no gap in the range is wide enough.
  std::optional<PageRun> plan_growth(std::uint32_t granules, Lane lane = 0) const;
  // The pages must lie in one hole.
  void add_pages(PageRun pages, Lane lane = 0);
  // Empties the bins and returns every run of wholly free pages, largest first; without those
  // that border on `beside`, if given.
  std::vector<FreeRun> free_runs(std::optional<PageRun> beside = std::nullopt);
  // Takes pages of a free run (all or a part) out of use.
  void retire(const FreeRun& run);
  // Ends the retirement of a whole retired run: its last `removed` pages become a hole, the others
  // are free again.
  void finish_retirement(PageRun run, std::uint32_t removed);

  std::vector<std::uint32_t> live_blocks_of(Lane lane) const;
  // The pages that hold no live byte, retired ones included. Walks all blocks.
  std::vector<PageRun> idle_runs() const;
  std::uint32_t count_free_pages() const;

  std::size_t used_bytes() const { return used_ * kGranule; }
  std::size_t peak_bytes() const { return peak_ * kGranule; }
  std::size_t fenced_bytes() const { return fenced_ * kGranule; }
  std::size_t page_bytes() const { return std::size_t{page_granules_} * kGranule; }
  std::uint32_t resident_pages() const { return resident_pages_; }
  std::uint32_t page_count() const { return page_count_; }
  std::uint32_t upper_zone() const { return upper_zone_; }
  std::uint32_t live_blocks() const { return live_blocks_; }
  void reset_peak() { peak_ = used_; }

  // Throws ErrorCode::internal.
  void check_invariants() const;

 private:
  enum class State : std::uint8_t { unused, live, fenced, cached, free, retired, hole };
  using Index = std::uint32_t;  // into blocks_; 0 is no block

  struct Block {
    std::uint32_t start = 0;
    std::uint32_t count = 0;
    Index previous = 0;  // neighbours by address
    Index next = 0;
    Index link = 0;  // next in its bin, or in the list of unused records
    State state = State::unused;
    Lane lane = 0;
  };

  // Bins: one per size up to kExactBins granules, above that 16 per power of two.
  static constexpr std::uint32_t kExactBins = 512;
  static constexpr std::uint32_t kBins = kExactBins + (32 - 9) * 16;
  // How many blocks of a shared bin are looked at for one of the exact size.
  static constexpr int kProbes = 8;
  // Requests from the first size on empty the bins from the second on before they look for a fit.
  static constexpr std::uint32_t kMergesFirst = MiB / kGranule;
  static constexpr std::uint32_t kMergedFirst = 8 * KiB / kGranule;
  static constexpr std::size_t kMostLanes = 1024;

  struct FreeLists {
    std::array<Index, kBins> bins{};
    std::uint32_t cached_blocks = 0;
    bool upper = false;
    std::set<std::pair<std::uint32_t, std::uint32_t>> free;  // (granules, start): best fit
  };

  static std::uint32_t bin_of(std::uint32_t granules) {
    if (granules < kExactBins) return granules;
    const std::uint32_t exponent = static_cast<std::uint32_t>(std::bit_width(granules)) - 1;
    return kExactBins + (exponent - 9) * 16 + ((granules >> (exponent - 4)) & 15);
  }

  std::uint32_t allocate_best_fit(std::uint32_t granules, Lane lane);
  std::uint32_t hand_out(Index index);
  Block& take_back(std::uint32_t start);
  void cache(Index index);
  // Those for blocks of at least `least` granules: 0 or kMergedFirst.
  void empty_bins(Lane lane, std::uint32_t least = 0);
  void make_free(Index index);
  void merge_hole(Index index);
  void absorb_next(Index index);
  Index split(Index index, std::uint32_t count);
  Index new_record();
  void drop_record(Index index);
  Index find_live(std::uint32_t start) const;
  std::uint32_t page_of(std::uint32_t granule) const { return granule >> page_shift_; }
  bool has_table(std::uint32_t granule) const { return starts_[page_of(granule)] != nullptr; }
  Index& start_entry(std::uint32_t granule) {
    return starts_[page_of(granule)][granule & (page_granules_ - 1)];
  }
  const Index& start_entry(std::uint32_t granule) const {
    return starts_[page_of(granule)][granule & (page_granules_ - 1)];
  }

  std::uint32_t page_granules_;
  std::uint32_t page_shift_;
  std::uint32_t page_count_;
  std::uint32_t upper_zone_;
  std::uint32_t resident_pages_ = 0;
  std::uint32_t live_blocks_ = 0;
  std::size_t used_ = 0;  // granules
  std::size_t peak_ = 0;
  std::size_t fenced_ = 0;

  std::vector<Block> blocks_;
  Index unused_ = 0;
  std::vector<FreeLists> lanes_;
  // Per page, null for those in holes: the record of the block that starts at each granule.
  // Owned; raw, so that the many pages that never become resident cost nothing.
  ZeroedArray<Index*> starts_;
  std::map<std::uint32_t, Index> holes_;  // by start
};

inline std::uint32_t Arena::hand_out(Index index) {
  Block& block = blocks_[index];
  block.state = State::live;
  ++live_blocks_;
  used_ += block.count;
  if (used_ > peak_) peak_ = used_;
  return block.start;
}

inline std::uint32_t Arena::allocate(std::uint32_t granules, Lane lane) {
  FreeLists& lists = lanes_[lane];
  Index* link = &lists.bins[bin_of(granules)];
  for (int probe = 0; *link != 0 && probe < kProbes; ++probe) {
    Block& block = blocks_[*link];
    if (block.count == granules) {
      const Index index = *link;
      *link = block.link;
      --lists.cached_blocks;
      return hand_out(index);
    }
    link = &block.link;
  }
  return allocate_best_fit(granules, lane);
}

inline Arena::Index Arena::find_live(std::uint32_t start) const {
  if (page_of(start) >= page_count_ || !has_table(start)) return 0;
  const Index index = start_entry(start);
  return blocks_[index].state == State::live ? index : 0;
}

inline std::uint32_t Arena::live_granules(std::uint32_t start) const {
  return blocks_[find_live(start)].count;
}

inline Arena::Lane Arena::lane_of(std::uint32_t start) const {
  return blocks_[find_live(start)].lane;
}

}  // namespace pgk
