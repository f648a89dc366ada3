#include "device/cuda_mover.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <string>

#include "core/error.h"
#include "core/types.h"

namespace pgk {
namespace {

// Pages of one direction that are moved in one hold. At 55 GB/s those of 32 MiB are copied in 5 ms;
// that the last one is mapped comes on top, so fewer would be slower.
constexpr std::size_t kBatch = CudaFlags::kPages;
// The same for pages that only have to be compared: nearly all of the time goes into mapping.
constexpr std::size_t kCompareBatch = CudaFlags::kPages;
// Where streams of contexts are held as well, which are at work.
constexpr std::size_t kHeldBatch = 4;

template <typename T>
std::span<T> part(std::span<T> all, std::size_t from, std::size_t count) {
  from = std::min(from, all.size());
  return all.subspan(from, std::min(count, all.size() - from));
}

std::string hexadecimal(Address address) {
  std::array<char, 16> digits;
  const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), address, 16).ptr;
  return "0x" + std::string(digits.data(), end);
}

}  // namespace

CudaMover::CudaMover(const CudaDriver& driver, CUcontext context, CUdevice ordinal,
                     CudaMappings& mappings)
    : driver_(driver), ordinal_(ordinal), mappings_(mappings), holds_(driver, context) {}

void CudaMover::move(std::span<Move> moves, std::span<const CUstream> held, const Begin& begin) {
  const std::lock_guard lock(mutex_);
  if (!fingerprint_) {
    fingerprint_.emplace(driver_, ordinal_, holds_.stream(),
                         CudaFlags::address_of(holds_.flags().contents[0][0]));
  }
  std::vector<Move*> known;
  std::vector<Move*> outs;
  std::vector<Move*> ins;
  outs.reserve(moves.size());
  for (Move& move : moves) {
    const bool comparable = move.known && fingerprint_->is_available();
    (!move.to.on_host ? ins : comparable ? known : outs).push_back(&move);
  }
  const std::size_t compared = held.empty() ? kCompareBatch : kHeldBatch;
  for (std::size_t i = 0; i < known.size(); i += compared) {
    move_unchanged(part(Lane(known), i, compared), held, begin, outs);
  }
  const std::size_t copied = held.empty() ? kBatch : kHeldBatch;
  for (std::size_t i = 0; i < std::max(outs.size(), ins.size()); i += copied) {
    copy_and_move(part(Lane(outs), i, copied), part(Lane(ins), i, copied), held, begin);
  }
}

// `changed` has room for the batch.
void CudaMover::move_unchanged(Lane batch, std::span<const CUstream> held, const Begin& begin,
                               std::vector<Move*>& changed) {
  CudaFlags& flags = holds_.flags();
  const std::uint32_t number = holds_.next_number();
  CudaGraph graph(driver_, holds_.context());
  CUgraphNode last = graph.write({}, CudaFlags::address_of(flags.started), number);
  for (std::size_t i = 0; i < batch.size(); ++i) {
    const Move& move = *batch[i];
    last = fingerprint_->add_to(graph.graph(), {&last, 1}, move.address, move.from.bytes,
                                CudaFlags::address_of(flags.contents[0][i]));
    last = graph.write({last}, CudaFlags::address_of(flags.ready[0][i]), number);
  }
  graph.stop({last}, CudaFlags::address_of(flags.finished), CudaFlags::address_of(flags.gate),
             number);
  run(graph, number, Lanes{batch, Lane{}}, held, [&](Move& move, const Fingerprint& contents) {
    if (contents.low == move.known->low && contents.high == move.known->high) {
      remap(move, begin);
    } else {
      changed.push_back(&move);
    }
  });
}

void CudaMover::copy_and_move(Lane outs, Lane ins, std::span<const CUstream> held,
                              const Begin& begin) {
  CudaFlags& flags = holds_.flags();
  const Lanes lanes{outs, ins};
  const auto tells_contents = [&](const Move& move) {
    return !move.to.on_host && fingerprint_->is_available();
  };
  const std::uint32_t number = holds_.next_number();
  CudaGraph graph(driver_, holds_.context());
  const CUgraphNode start = graph.write({}, CudaFlags::address_of(flags.started), number);
  std::array<CUgraphNode, CudaFlags::kLanes> last{};
  for (std::size_t lane = 0; lane < lanes.size(); ++lane) {
    CUgraphNode copied = start;
    for (std::size_t i = 0; i < lanes[lane].size(); ++i) {
      Move& move = *lanes[lane][i];
      const Address alias = mappings_.alias_of(move.to);
      // Flags are a branch of their own, so that one copy follows another.
      copied = graph.copy({copied}, alias, move.address, move.to.bytes);
      CUgraphNode ready = copied;
      if (tells_contents(move)) {
        const std::array both{copied, last[lane]};
        ready = fingerprint_->add_to(graph.graph(), std::span(both).first(i == 0 ? 1 : 2), alias,
                                     move.to.bytes, CudaFlags::address_of(flags.contents[lane][i]));
      }
      last[lane] = graph.write({ready, ready == copied ? last[lane] : nullptr},
                               CudaFlags::address_of(flags.ready[lane][i]), number);
    }
  }
  graph.stop({last[0], last[1]}, CudaFlags::address_of(flags.finished),
             CudaFlags::address_of(flags.gate), number);
  run(graph, number, lanes, held, [&](Move& move, const Fingerprint& contents) {
    remap(move, begin);
    move.copied = true;
    if (tells_contents(move)) move.contents = contents;
  });
}

template <typename OnReady>
void CudaMover::run(CudaGraph& graph, std::uint32_t number, const Lanes& lanes,
                    std::span<const CUstream> held, const OnReady& on_ready) {
  graph.instantiate();
  CudaFlags& flags = holds_.flags();
  std::array<std::size_t, CudaFlags::kLanes> next{};
  std::size_t left = 0;
  for (const Lane lane : lanes) left += lane.size();

  CudaHold hold(holds_, number);
  hold.launch(graph.executable(), held);
  while (left > 0) {
    bool found = false;
    for (std::size_t lane = 0; lane < lanes.size(); ++lane) {
      const std::size_t i = next[lane];
      if (i == lanes[lane].size() || !CudaFlags::holds(flags.ready[lane][i], number)) continue;
      on_ready(*lanes[lane][i], flags.contents[lane][i]);
      ++next[lane];
      --left;
      found = true;
    }
    if (found) {
      hold.renew();
    } else {
      hold.pause();
    }
  }
}

void CudaMover::remap(Move& move, const Begin& begin) {
  begin(move.to.bytes);
  driver_.check(mappings_.unmap(move.address, move.from), "move (unmap)", move.from.bytes);
  const CUresult result = mappings_.map(move.address, move.to);
  if (result != CUDA_SUCCESS && mappings_.map(move.address, move.from) != CUDA_SUCCESS) {
    throw Error(ErrorCode::device, "cuda: move of " + format_bytes(move.from.bytes) +
                                       " failed: the page at " + hexadecimal(move.address) +
                                       " could not be mapped back");
  }
  driver_.check(result, "move (map)", move.to.bytes);
  move.done = true;
}

}  // namespace pgk
