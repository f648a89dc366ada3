#include "core/arena.h"

#include <algorithm>

#include "core/error.h"

namespace pgk {

Arena::Arena(std::size_t page_bytes, std::uint32_t page_count, std::uint32_t upper_zone)
    : page_granules_(static_cast<std::uint32_t>(page_bytes / kGranule)),
      page_shift_(static_cast<std::uint32_t>(std::countr_zero(page_granules_))),
      page_count_(page_count),
      upper_zone_(std::min(upper_zone, page_count)),
      lanes_(1),
      starts_(page_count) {
  const bool valid = std::has_single_bit(page_bytes) && page_bytes <= 4 * GiB &&
                     page_bytes >= kGranule && page_count > 0 &&
                     std::uint64_t{page_count} * page_granules_ < kNone;
  if (!valid) {
    throw Error(ErrorCode::invalid_value, "an arena of " + std::to_string(page_count) +
                                              " pages of " + format_bytes(page_bytes) +
                                              " is not possible");
  }
  blocks_.resize(1);
  const Index whole = new_record();
  blocks_[whole].count = page_count * page_granules_;
  blocks_[whole].state = State::hole;
  holes_.emplace(0, whole);
}

Arena::~Arena() {
  for (std::uint32_t page = 0; page < page_count_; ++page) std::free(starts_[page]);
}

// Records ------------------------------------------------------------------------------------

Arena::Index Arena::new_record() {
  if (unused_ != 0) {
    const Index index = unused_;
    unused_ = blocks_[index].link;
    blocks_[index] = Block{};
    return index;
  }
  blocks_.emplace_back();
  return static_cast<Index>(blocks_.size() - 1);
}

void Arena::drop_record(Index index) {
  blocks_[index] = Block{};
  blocks_[index].link = unused_;
  unused_ = index;
}

// Cuts the block after `count` granules; the record keeps the lower part. The upper part has the
// same state, but is in no index yet.
Arena::Index Arena::split(Index index, std::uint32_t count) {
  const Index upper = new_record();
  Block& block = blocks_[index];
  Block& rest = blocks_[upper];
  rest.start = block.start + count;
  rest.count = block.count - count;
  rest.state = block.state;
  rest.lane = block.lane;
  rest.previous = index;
  rest.next = block.next;
  if (block.next != 0) blocks_[block.next].previous = upper;
  block.next = upper;
  block.count = count;
  return upper;
}

void Arena::absorb_next(Index index) {
  Block& block = blocks_[index];
  const Index gone = block.next;
  block.count += blocks_[gone].count;
  block.next = blocks_[gone].next;
  if (block.next != 0) blocks_[block.next].previous = index;
  drop_record(gone);
}

// Allocation ---------------------------------------------------------------------------------

Arena::Lane Arena::add_lane(bool upper) {
  if (lanes_.size() == kMostLanes) {
    throw Error(ErrorCode::invalid_value,
                "an arena serves at most " + std::to_string(kMostLanes) + " streams");
  }
  lanes_.emplace_back().upper = upper;
  return static_cast<Lane>(lanes_.size() - 1);
}

std::uint32_t Arena::allocate_best_fit(std::uint32_t granules, Lane lane) {
  FreeLists& lists = lanes_[lane];
  // Else it would be cut from the middle of a large free block, although freed neighbours together
  // would fit it better. That fragments a range most when the block is large. Small blocks matter
  // little there, and stay for those who ask for them again.
  if (granules >= kMergesFirst) empty_bins(lane, kMergedFirst);
  auto fit = lists.free.lower_bound({granules, 0});
  if (fit == lists.free.end() && lists.cached_blocks > 0) {
    empty_bins(lane);
    fit = lists.free.lower_bound({granules, 0});
  }
  if (fit == lists.free.end()) return kNone;
  const Index index = start_entry(fit->second);
  lists.free.erase(fit);
  if (blocks_[index].count > granules) {
    const Index rest = split(index, granules);
    start_entry(blocks_[rest].start) = rest;
    lists.free.emplace(blocks_[rest].count, blocks_[rest].start);
  }
  return hand_out(index);
}

Arena::Block& Arena::take_back(std::uint32_t start) {
  const Index index = find_live(start);
  if (index == 0) {
    throw Error(ErrorCode::invalid_value,
                "no live block starts at offset " + std::to_string(start * kGranule));
  }
  Block& block = blocks_[index];
  --live_blocks_;
  used_ -= block.count;
  return block;
}

void Arena::cache(Index index) {
  Block& block = blocks_[index];
  FreeLists& lists = lanes_[block.lane];
  Index& bin = lists.bins[bin_of(block.count)];
  block.state = State::cached;
  block.link = bin;
  bin = index;
  ++lists.cached_blocks;
}

std::uint32_t Arena::release(std::uint32_t start) {
  const Block& block = take_back(start);
  cache(static_cast<Index>(&block - blocks_.data()));
  return block.count;
}

std::uint32_t Arena::fence(std::uint32_t start) {
  Block& block = take_back(start);
  block.state = State::fenced;
  fenced_ += block.count;
  return block.count;
}

void Arena::unfence(std::uint32_t start) {
  const Index index = start_entry(start);
  require(blocks_[index].state == State::fenced, "only fenced blocks are unfenced");
  fenced_ -= blocks_[index].count;
  cache(index);
}

void Arena::empty_bins(Lane lane, std::uint32_t least) {
  constexpr std::uint32_t kAtOnce = 16;  // most are empty
  static_assert(kBins % kAtOnce == 0 && kMergedFirst % kAtOnce == 0 && kMergedFirst < kExactBins);
  FreeLists& lists = lanes_[lane];
  for (std::uint32_t first = least; lists.cached_blocks > 0 && first < kBins; first += kAtOnce) {
    Index any = 0;
    for (std::uint32_t i = 0; i < kAtOnce; ++i) any |= lists.bins[first + i];
    for (std::uint32_t i = 0; any != 0 && i < kAtOnce; ++i) {
      for (Index index = std::exchange(lists.bins[first + i], 0); index != 0;) {
        const Index next = blocks_[index].link;
        make_free(index);
        --lists.cached_blocks;
        index = next;
      }
    }
  }
}

// Enters the block into the free index of its lane, merged with its free neighbours there.
void Arena::make_free(Index index) {
  blocks_[index].state = State::free;
  blocks_[index].link = 0;
  auto& free = lanes_[blocks_[index].lane].free;
  const auto merges = [&](Index neighbour) {
    return neighbour != 0 && blocks_[neighbour].state == State::free &&
           blocks_[neighbour].lane == blocks_[index].lane;
  };
  const Index next = blocks_[index].next;
  if (merges(next)) {
    free.erase({blocks_[next].count, blocks_[next].start});
    start_entry(blocks_[next].start) = 0;
    absorb_next(index);
  }
  const Index previous = blocks_[index].previous;
  if (merges(previous)) {
    free.erase({blocks_[previous].count, blocks_[previous].start});
    start_entry(blocks_[index].start) = 0;
    absorb_next(previous);
    index = previous;
  }
  free.emplace(blocks_[index].count, blocks_[index].start);
}

void Arena::adopt(Lane from, Lane to) {
  empty_bins(from);
  auto moving = std::exchange(lanes_[from].free, {});
  for (const auto& [count, start] : moving) {
    const Index index = start_entry(start);
    blocks_[index].lane = to;
    make_free(index);
  }
}

// Pages --------------------------------------------------------------------------------------

std::optional<Arena::PageRun> Arena::plan_growth(std::uint32_t granules, Lane lane) const {
  std::optional<PageRun> best;
  const std::uint32_t zone_first = lanes_[lane].upper ? upper_zone_ : 0;
  const std::uint32_t zone_end = lanes_[lane].upper ? page_count_ : upper_zone_;
  const auto free_granules = [&](Index index) {
    const Block& block = blocks_[index];
    return block.state == State::free && block.lane == lane ? block.count : 0;
  };
  const auto pages_for = [this](std::uint32_t missing) {
    return missing / page_granules_ + (missing % page_granules_ != 0);
  };
  for (const auto& [start, index] : holes_) {
    const Block& hole = blocks_[index];
    const std::uint32_t first = std::max(page_of(start), zone_first);
    const std::uint32_t end = std::min(page_of(start) + hole.count / page_granules_, zone_end);
    if (first >= end) continue;
    // What lies beyond the border of a zone belongs to another lane.
    const std::uint32_t below = free_granules(hole.previous);
    const std::uint32_t above = free_granules(hole.next);
    const std::uint32_t hole_pages = end - first;
    PageRun run{first, hole_pages};
    const std::uint32_t from_below = below < granules ? pages_for(granules - below) : 1;
    const std::uint32_t from_above = above < granules ? pages_for(granules - above) : 1;
    if (std::min(from_below, from_above) <= hole_pages) {
      run.count = std::min(from_below, from_above);
      if (from_above < from_below) run.first += hole_pages - run.count;
    } else if (std::uint64_t{below} + std::uint64_t{hole_pages} * page_granules_ + above <
               granules) {
      continue;
    }
    if (!best || run.count < best->count) best = run;
  }
  return best;
}

void Arena::add_pages(PageRun pages, Lane lane) {
  const std::uint32_t start = pages.first * page_granules_;
  const std::uint32_t count = pages.count * page_granules_;
  auto hole = holes_.upper_bound(start);
  const bool inside =
      hole != holes_.begin() && pages.count > 0 &&
      start + count <= std::prev(hole)->first + blocks_[std::prev(hole)->second].count;
  if (!inside) {
    throw Error(ErrorCode::invalid_value, "pages to add do not lie in one hole");
  }
  --hole;
  std::vector<ZeroedArray<Index>> tables;
  for (std::uint32_t i = 0; i < pages.count; ++i) tables.emplace_back(page_granules_);
  for (std::uint32_t i = 0; i < pages.count; ++i) starts_[pages.first + i] = tables[i].release();

  Index index = hole->second;
  if (blocks_[index].start < start) {
    index = split(index, start - blocks_[index].start);
  } else {
    holes_.erase(hole);
  }
  if (blocks_[index].count > count) {
    const Index rest = split(index, count);
    holes_.emplace(blocks_[rest].start, rest);
  }
  start_entry(start) = index;
  blocks_[index].lane = lane;
  resident_pages_ += pages.count;
  make_free(index);
}

std::vector<Arena::FreeRun> Arena::free_runs(std::optional<PageRun> beside) {
  std::vector<FreeRun> runs;
  for (Lane lane = 0; lane < lanes_.size(); ++lane) {
    empty_bins(lane);
    const auto& free = lanes_[lane].free;
    for (auto it = free.rbegin(); it != free.rend() && it->first >= page_granules_; ++it) {
      const auto [count, start] = *it;
      const std::uint32_t first = page_of(start + page_granules_ - 1);
      const std::uint32_t end = page_of(start + count);
      if (first >= end) continue;
      const bool borders = beside && (start + count == beside->first * page_granules_ ||
                                      start == (beside->first + beside->count) * page_granules_);
      if (!borders) runs.push_back({start, {first, end - first}, lane});
    }
  }
  std::stable_sort(runs.begin(), runs.end(), [](const FreeRun& a, const FreeRun& b) {
    return a.pages.count > b.pages.count;
  });
  return runs;
}

void Arena::retire(const FreeRun& run) {
  const std::uint32_t start = run.pages.first * page_granules_;
  const std::uint32_t count = run.pages.count * page_granules_;
  Index index =
      page_of(run.block) < page_count_ && has_table(run.block) ? start_entry(run.block) : 0;
  const Block& block = blocks_[index];
  if (count == 0 || block.state != State::free || start < block.start ||
      start + count > block.start + block.count) {
    throw Error(ErrorCode::invalid_value, "pages to retire do not lie in one free block");
  }
  auto& free = lanes_[block.lane].free;
  free.erase({block.count, block.start});
  if (block.start < start) {
    const Index middle = split(index, start - block.start);
    start_entry(start) = middle;
    free.emplace(blocks_[index].count, blocks_[index].start);
    index = middle;
  }
  if (blocks_[index].count > count) {
    const Index rest = split(index, count);
    start_entry(blocks_[rest].start) = rest;
    free.emplace(blocks_[rest].count, blocks_[rest].start);
  }
  blocks_[index].state = State::retired;
}

void Arena::finish_retirement(PageRun run, std::uint32_t removed) {
  const std::uint32_t start = run.first * page_granules_;
  const Index index = run.first < page_count_ && has_table(start) ? start_entry(start) : 0;
  if (blocks_[index].state != State::retired ||
      blocks_[index].count != run.count * page_granules_ || removed > run.count) {
    throw Error(ErrorCode::invalid_value, "no such run of pages is retired");
  }
  const std::uint32_t kept = run.count - removed;
  if (removed > 0) {
    for (std::uint32_t page = run.first + kept; page < run.first + run.count; ++page) {
      std::free(std::exchange(starts_[page], nullptr));
    }
    resident_pages_ -= removed;
    merge_hole(kept > 0 ? split(index, kept * page_granules_) : index);
  }
  if (kept > 0) make_free(index);
}

void Arena::merge_hole(Index index) {
  blocks_[index].state = State::hole;
  const Index next = blocks_[index].next;
  if (next != 0 && blocks_[next].state == State::hole) {
    holes_.erase(blocks_[next].start);
    absorb_next(index);
  }
  const Index previous = blocks_[index].previous;
  if (previous != 0 && blocks_[previous].state == State::hole) {
    absorb_next(previous);
  } else {
    holes_.emplace(blocks_[index].start, index);
  }
}

std::vector<Arena::PageRun> Arena::idle_runs() const {
  std::vector<PageRun> runs;
  std::uint32_t start = 0;
  std::uint32_t end = 0;  // of the current run of unused granules, all of one lane
  Lane lane = 0;
  const auto close_run = [&] {
    const std::uint32_t first = page_of(start + page_granules_ - 1);
    const std::uint32_t last = page_of(end);
    if (first < last) runs.push_back({first, last - first});
  };
  for (Index index = 1; index != 0; index = blocks_[index].next) {
    const Block& block = blocks_[index];
    const bool idle =
        block.state == State::free || block.state == State::cached || block.state == State::retired;
    if (idle && end == block.start && end != start && block.lane == lane) {
      end = block.start + block.count;
    } else {
      close_run();
      start = block.start;
      end = idle ? block.start + block.count : block.start;
      lane = block.lane;
    }
  }
  close_run();
  return runs;
}

std::vector<std::uint32_t> Arena::live_blocks_of(Lane lane) const {
  std::vector<std::uint32_t> starts;
  for (Index index = 1; index != 0; index = blocks_[index].next) {
    const Block& block = blocks_[index];
    if (block.state == State::live && block.lane == lane) starts.push_back(block.start);
  }
  return starts;
}

std::uint32_t Arena::count_free_pages() const {
  std::uint32_t pages = 0;
  for (const PageRun& run : idle_runs()) pages += run.count;
  return pages;
}

}  // namespace pgk
