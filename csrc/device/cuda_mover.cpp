#include "device/cuda_mover.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <string>
#include <thread>

#include "core/error.h"
#include "core/types.h"

namespace pgk {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

// What is moved in one hold: of each direction what is copied in it, in 5 ms at 55 GB/s, and of
// unchanged pages, nearly all of whose time goes into mapping host memory, 0.5 ms per 32 MiB.
constexpr std::size_t kBatch = 256 * kMiB;
// Where streams are at work that had to be waited for, so that there are few holds.
constexpr std::size_t kLargeBatch = 512 * kMiB;
// Of pages that were copied ahead, where a hold does nothing else: the shorter the better for
// whoever is held, as far as to begin one takes little of its time.
constexpr std::size_t kCopiedBatch = 64 * kMiB;
// Where sessions of others are open.
constexpr std::size_t kSmallBatch = 32 * kMiB;
// How long it is before streams that did not come to rest are held again, at first and at most.
constexpr auto kFirstPause = std::chrono::microseconds(100);
constexpr auto kLongestPause = std::chrono::milliseconds(8);
constexpr auto kLeastTurn = std::chrono::milliseconds(100);  // to wait for another move
// Our work waits in its hardware queue meanwhile, and cudaFree for our work.
constexpr auto kLongestLull = std::chrono::milliseconds(10);

// Appends the first pages of the queue: one at least, and others as far as `limit` bytes allow.
template <typename Queue, typename Lane, typename ToStep>
void take(Queue& queue, std::size_t limit, Lane& lane, const ToStep& to_step) {
  std::size_t bytes = 0;
  while (!queue.empty() && lane.size() < CudaFlags::kPages) {
    bytes += queue.front()->from.bytes;
    if (!lane.empty() && bytes > limit) return;
    lane.push_back(to_step(queue.front()));
    queue.pop_front();
  }
}

bool are_same(const Fingerprint& a, const Fingerprint& b) {
  return a.low == b.low && a.high == b.high;
}

std::string hexadecimal(Address address) {
  std::array<char, 16> digits;
  const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), address, 16).ptr;
  return "0x" + std::string(digits.data(), end);
}

}  // namespace

CudaMover::CudaMover(const CudaDriver& driver, CUcontext context, CUdevice ordinal,
                     CudaMappings& mappings, CudaCaptures& captures)
    : driver_(driver),
      ordinal_(ordinal),
      mappings_(mappings),
      captures_(captures),
      holds_(driver, context),
      staging_(driver, ordinal, mappings, holds_.flags()) {}

void CudaMover::prepare() {
  const std::lock_guard lock(preparing_);
  if (fingerprint_) return;
  fingerprint_.emplace(driver_, ordinal_, holds_.stream(),
                       CudaFlags::address_of(holds_.flags().contents[0][0]));
}

void CudaMover::move(std::span<Move> moves, const Manner& manner, const Asks& asks) {
  // Whoever waits has stopped contexts, which others may wait for.
  const std::unique_lock lock(mutex_,
                              std::max<std::chrono::nanoseconds>(manner.patience, kLeastTurn));
  if (!lock) throw Restless(kNoStream, "cuda: other pages are being moved");
  prepare();
  is_waited_for_ = false;
  // However this ends, nothing may write to handles afterwards.
  struct Clearing {
    CudaStaging& staging;
    ~Clearing() { staging.clear(); }
  } const clearing{staging_};

  Left left = sort(moves);
  while (!left.is_empty() || !staging_.is_empty()) {
    is_gentle_ = manner.are_others_at_work && manner.are_others_at_work();
    if (fingerprint_->is_available()) {
      copy_ahead(left);
    } else {
      left.changed.insert(left.changed.end(), left.outs.begin(), left.outs.end());
      left.outs.clear();
    }
    const Batch batch = next_batch(left);
    if (std::all_of(batch.begin(), batch.end(), [](const Lane& lane) { return lane.empty(); })) {
      staging_.await_oldest();
      continue;
    }
    carry_out(batch, manner, asks);
    for (const Step& step : batch[kCompared]) {
      if (step.move->done) continue;
      (step.copied ? left.changed : left.outs).push_back(step.move);
      // Pages that are written to all the time would never be the same as their copies.
      if (step.copied) {
        left.changed.insert(left.changed.end(), left.outs.begin(), left.outs.end());
        left.outs.clear();
      }
    }
  }
}

CudaMover::Left CudaMover::sort(std::span<Move> moves) const {
  Left left;
  for (Move& move : moves) {
    const bool comparable = move.known && fingerprint_->is_available();
    (!move.to.on_host ? left.ins : comparable ? left.known : left.outs).push_back(&move);
  }
  return left;
}

void CudaMover::copy_ahead(Left& left) {
  // For the next hold, and to be copied during it. More would take the copy engine from mapping,
  // which needs it as well.
  const std::size_t ahead = 2 * copied_batch(!left.ins.empty());
  while (!left.outs.empty()) {
    Move& next = *left.outs.front();
    if (staging_.is_full(next.from.bytes, ahead)) return;
    if (!staging_.has_room(next.from.bytes)) {
      if (!staging_.is_empty()) return;
      if (!staging_.make_room(next.from.bytes)) {
        left.changed.insert(left.changed.end(), left.outs.begin(), left.outs.end());
        left.outs.clear();
        return;
      }
    }
    staging_.add(next, *fingerprint_);
    left.outs.pop_front();
  }
}

std::size_t CudaMover::batch() const {
  if (is_gentle_) return kSmallBatch;
  return is_waited_for_ ? kLargeBatch : kBatch;
}

// What a hold takes of pages that were copied ahead. Beside copies there is time for more.
std::size_t CudaMover::copied_batch(bool brings_in) const {
  const bool is_large = brings_in || is_waited_for_;
  return std::min(batch(), is_large ? kBatch : kCopiedBatch);
}

CudaMover::Batch CudaMover::next_batch(Left& left) {
  Batch batch;
  const auto copy = [](Move* move) { return Step{move, std::nullopt, true}; };
  const auto is_full = [&] {
    const auto has_steps = [](const Lane& lane) { return !lane.empty(); };
    return is_gentle_ && std::any_of(batch.begin(), batch.end(), has_steps);
  };
  take_copied(batch[kCompared], copied_batch(!left.ins.empty()));
  if (batch[kCompared].empty()) {
    take(left.known, this->batch(), batch[kCompared],
         [](Move* move) { return Step{move, move->known, false}; });
  }
  if (is_full()) return batch;
  take(left.ins, this->batch(), batch[kIn], copy);
  if (is_full()) return batch;
  // Copies ahead of holds would only slow these down.
  if (left.outs.empty() && staging_.is_empty()) {
    take(left.changed, this->batch(), batch[kOut], copy);
  }
  return batch;
}

void CudaMover::take_copied(Lane& lane, std::size_t limit) {
  std::size_t bytes = 0;
  while (lane.size() < CudaFlags::kPages) {
    Move* move = staging_.oldest_copied();
    if (move == nullptr) return;
    bytes += move->from.bytes;
    if (!lane.empty() && bytes > limit) return;
    lane.push_back({move, staging_.fingerprint_of_oldest(), true});
    staging_.remove_oldest();
  }
}

// Until it has been done once. What was submitted for a hold that was given up does nothing but
// copy in vain.
void CudaMover::carry_out(const Batch& batch, const Manner& manner, const Asks& asks) {
  const auto deadline = CudaHold::Clock::now() + manner.patience;
  std::chrono::microseconds pause = kFirstPause;
  std::vector<CUstream> active;
  for (;;) {
    try {
      hold_for(batch, manner, asks, std::min<std::chrono::microseconds>(10 * pause, kLongestLull),
               active);
      is_waited_for_ = !active.empty();
      return;
    } catch (const Restless&) {
      if (CudaHold::Clock::now() + pause >= deadline) throw;
    }
    std::this_thread::sleep_for(pause);
    pause = std::min<std::chrono::microseconds>(2 * pause, kLongestPause);
  }
}

void CudaMover::hold_for(const Batch& batch, const Manner& manner, const Asks& asks,
                         std::chrono::nanoseconds lull, std::vector<CUstream>& active) {
  const auto has_steps = [](const Lane& lane) { return !lane.empty(); };
  const auto kind = std::find_if(batch.begin(), batch.end(), has_steps) - batch.begin();
  const auto begin = holds_.pace().next(CudaPace::Clock::now(), static_cast<std::size_t>(kind));
  if (is_gentle_) std::this_thread::sleep_until(begin);
  const CudaCaptures::KeptOut captures =
      captures_.keep_out(CudaCaptures::Clock::now() + manner.patience);
  const bool is_at_once = CudaHolds::has_context_wait(driver_) && !captures.is_beside_capture();
  const std::uint32_t number = holds_.next_number();
  // Nothing is to be mapped for it while streams are held.
  for (const Kind lane : {kOut, kIn}) {
    for (const Step& step : batch[lane]) mappings_.alias_of(step.move->to);
  }
  CudaHold hold(holds_, number);
  hold.note_active(asks.streams, active);
  hold.take([&](CudaHold& taken) { queue_steps(taken, batch, number); },
            {.streams = asks.streams,
             .way = is_at_once ? CudaHold::Way::context : CudaHold::Way::streams,
             .patience = manner.patience,
             .lull = lull,
             .active = active});
  finish_steps(hold, number, batch, asks);
}

void CudaMover::finish_steps(CudaHold& hold, std::uint32_t number, const Batch& batch,
                             const Asks& asks) {
  CudaFlags& flags = holds_.flags();
  std::array<std::size_t, CudaFlags::kLanes> next{};
  std::size_t left = 0;
  for (const Lane& lane : batch) left += lane.size();
  while (left > 0) {
    bool found = false;
    for (std::size_t lane = 0; lane < batch.size(); ++lane) {
      const std::size_t i = next[lane];
      if (i == batch[lane].size() || !CudaFlags::holds(flags.ready[lane][i], number)) continue;
      finish(batch[lane][i], flags.contents[lane][i], asks);
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

// Copies of both directions go on at once. Else there is no branch: it could come to a hardware
// queue in which a stream is held.
void CudaMover::queue_steps(CudaHold& hold, const Batch& batch, std::uint32_t number) {
  for (std::size_t i = 0; i < batch[kCompared].size(); ++i) {
    const Move& move = *batch[kCompared][i].move;
    tell_of(hold.stream(), kCompared, i, move.address, move.from.bytes, number);
  }
  const bool has_branch = !batch[kOut].empty() && !batch[kIn].empty();
  if (has_branch) hold.fork();
  queue_copies(has_branch ? hold.branch() : hold.stream(), batch, kIn, number);
  queue_copies(hold.stream(), batch, kOut, number);
  if (has_branch) hold.join();
}

void CudaMover::queue_copies(CUstream stream, const Batch& batch, Kind lane, std::uint32_t number) {
  for (std::size_t i = 0; i < batch[lane].size(); ++i) {
    Move& move = *batch[lane][i].move;
    const std::size_t bytes = move.to.bytes;
    move.known.reset();
    const Address alias = mappings_.alias_of(move.to);
    driver_.check(driver_.cuMemcpyAsync_fn(alias, move.address, bytes, stream), "move (copy)",
                  bytes);
    if (tells_contents(move)) {
      tell_of(stream, lane, i, alias, bytes, number);
    } else {
      auto write = write_operation(holds_.flags().ready[lane][i], number);
      driver_.check(driver_.cuStreamBatchMemOp_fn(stream, 1, &write, 0), "move (tell)");
    }
  }
}

void CudaMover::tell_of(CUstream stream, Kind lane, std::size_t i, Address address,
                        std::size_t bytes, std::uint32_t number) {
  CudaFlags& flags = holds_.flags();
  fingerprint_->launch_and_tell(stream, address, bytes,
                                CudaFlags::address_of(flags.contents[lane][i]),
                                CudaFlags::address_of(flags.ready[lane][i]), number);
}

bool CudaMover::tells_contents(const Move& move) const {
  return !move.to.on_host && fingerprint_->is_available();
}

void CudaMover::finish(const Step& step, const Fingerprint& contents, const Asks& asks) {
  if (step.expected && !are_same(*step.expected, contents)) return;
  remap(*step.move, asks);
  step.move->copied = step.copied;
  if (tells_contents(*step.move)) step.move->contents = contents;
}

void CudaMover::remap(Move& move, const Asks& asks) {
  asks.begin(move.to.bytes);
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
