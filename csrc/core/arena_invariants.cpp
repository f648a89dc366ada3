// Arena::check_invariants(): what must hold between any two calls, checked from first principles
// by one walk over all records. For tests; the cost is linear in everything.
#include "core/arena.h"
#include "core/error.h"

namespace pgk {

void Arena::check_invariants() const {
  std::uint64_t position = 0;
  std::uint64_t live = 0;
  std::uint64_t fenced = 0;
  std::uint64_t hole_granules = 0;
  std::size_t records = 0;
  std::size_t live_count = 0;
  std::size_t cached_count = 0;
  std::size_t free_count = 0;
  std::size_t hole_count = 0;
  Index previous = 0;
  for (Index index = 1; index != 0; previous = index, index = blocks_[index].next) {
    const Block& block = blocks_[index];
    require(block.start == position && block.count > 0, "blocks tile the range in order");
    require(block.previous == previous, "neighbour links agree");
    position += block.count;
    ++records;
    if (block.state == State::hole) {
      require(block.start % page_granules_ == 0 && block.count % page_granules_ == 0,
              "holes are whole pages");
      require(blocks_[previous].state != State::hole, "neighbouring holes are merged");
      const auto it = holes_.find(block.start);
      require(it != holes_.end() && it->second == index, "every hole is indexed");
      for (std::uint32_t page = page_of(block.start); page < page_of(block.start + block.count);
           ++page) {
        require(starts_[page] == nullptr, "a hole has no page table");
      }
      hole_granules += block.count;
      ++hole_count;
      continue;
    }
    require(has_table(block.start) && start_entry(block.start) == index,
            "a resident block is found by its start");
    for (std::uint32_t page = page_of(block.start); page <= page_of(block.start + block.count - 1);
         ++page) {
      require(starts_[page] != nullptr, "a resident block lies on resident pages");
    }
    switch (block.state) {
      case State::live:
        live += block.count;
        ++live_count;
        break;
      case State::fenced:
        fenced += block.count;
        break;
      case State::cached:
        ++cached_count;
        break;
      case State::free:
        require(blocks_[previous].state != State::free || blocks_[previous].lane != block.lane,
                "neighbouring free blocks of a lane are merged");
        require(lanes_[block.lane].free.contains({block.count, block.start}),
                "every free block is indexed");
        ++free_count;
        break;
      case State::retired:
        require(block.start % page_granules_ == 0 && block.count % page_granules_ == 0,
                "retired blocks are whole pages");
        break;
      default:
        require(false, "a block in the range is in use");
    }
  }
  require(position == std::uint64_t{page_count_} * page_granules_, "blocks cover the range");
  require(hole_count == holes_.size(), "no stale hole entries");
  require(live_count == live_blocks_, "live blocks are counted");
  require(fenced == fenced_, "fenced bytes are those of the fenced blocks");
  require(live == used_ && used_ <= peak_, "used is the sum of the live blocks");
  require(std::uint64_t{resident_pages_} * page_granules_ + hole_granules == position,
          "pages are resident or holes");

  for (Lane lane = 0; lane < lanes_.size(); ++lane) {
    const FreeLists& lists = lanes_[lane];
    std::size_t binned = 0;
    for (std::uint32_t bin = 0; bin < kBins; ++bin) {
      for (Index index = lists.bins[bin]; index != 0; index = blocks_[index].link) {
        const Block& block = blocks_[index];
        require(block.state == State::cached && bin_of(block.count) == bin && block.lane == lane,
                "bins hold cached blocks of their size and lane");
        ++binned;
      }
    }
    require(binned == lists.cached_blocks, "every cached block of a lane is counted");
    cached_count -= binned;
    free_count -= lists.free.size();
  }
  require(cached_count == 0, "every cached block is in a bin");
  require(free_count == 0, "no stale index entries of free blocks");

  std::size_t unused = 0;
  for (Index index = unused_; index != 0; index = blocks_[index].link) ++unused;
  require(records + unused + 1 == blocks_.size(), "no record is lost");

  std::size_t entries = 0;
  for (std::uint32_t page = 0; page < page_count_; ++page) {
    if (starts_[page] == nullptr) continue;
    for (std::uint32_t granule = 0; granule < page_granules_; ++granule) {
      entries += starts_[page][granule] != 0;
    }
  }
  require(entries + hole_count == records, "no stale start entries");
}

}  // namespace pgk
