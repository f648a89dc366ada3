// The parts of moving pages that manager_moves.cpp and manager_room.cpp share.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/manager.h"

namespace pgk {

// Contexts that are held still while their pages move. Nobody enters them, allocates in them or
// unmaps their pages meanwhile; freeing goes on. With the manager's lock, but for the destructor.
class Manager::Stopped {
 public:
  // Victims may be let go of without having moved, so others who lack them wait for that. Nobody
  // waits for a thread while he has stopped some, and for streams, which may wait for threads, not
  // long at a time.
  Stopped(Manager& manager, bool victims) : manager_(manager), victims_(victims) {}
  ~Stopped();
  Stopped(const Stopped&) = delete;
  Stopped& operator=(const Stopped&) = delete;

  // False if it is stopped already, or in use and `even_if_used` is not set.
  bool stop(Context& context, bool even_if_used = false);
  bool contains(const Context& context) const;
  std::size_t count() const { return contexts_.size(); }
  // Lets all go, and wakes who waits for them.
  void let_go();
  // How long they may stay stopped for streams to come to rest, at a time; longer after each time
  // that it was in vain. A stream may wait for a thread, and that for one of them.
  std::chrono::nanoseconds patience() const { return patience_; }
  void be_more_patient() { patience_ *= 2; }
  // Until the end of this object nobody enters it anew once it is idle.
  void have_yield(Context& context);

 private:
  struct Entry {
    std::shared_ptr<Context> context;
    std::vector<std::shared_ptr<Context>> consumers;
  };

  void keep_out_consumers(Entry& entry);
  void let_go(const Entry& entry);

  Manager& manager_;
  const bool victims_;
  std::chrono::nanoseconds patience_ = std::chrono::milliseconds(100);
  std::vector<Entry> contexts_;
  std::vector<std::shared_ptr<Context>> yielding_;
};

// What a claimant wants: that so many bytes are free for it. Nobody: on the device.
struct Manager::Need {
  Context* claimant = nullptr;
  std::size_t room = 0;
  bool of_base = false;
  Clock::time_point deadline;  // for contexts in use that must yield, and streams to come to rest
  bool returns = false;        // it comes back, and leaves its place in host memory

  // What of the host memory that others need is the claimant's own.
  std::size_t returning() const { return returns ? room : 0; }
  Tier tier() const { return claimant == nullptr ? Tier::best_effort : claimant->tier(); }
};

// Pages that move in one go.
struct Manager::Round {
  struct Page {
    Context* context = nullptr;
    std::uint32_t number = 0;
    bool had_backup = false;  // the target of a move out was the page's own
    Move move;
  };
  // Each way: enough to keep copies and mapping busy at the same time, and few enough that what is
  // freed is soon somebody else's.
  static constexpr std::size_t kMostPages = 16;
  static constexpr std::chrono::nanoseconds kLeastPatience = std::chrono::milliseconds(1);
  static constexpr std::chrono::nanoseconds kTimePerGiB = std::chrono::seconds(4);
  static constexpr std::chrono::nanoseconds kTimePerPage = std::chrono::milliseconds(50);

  std::vector<Page> pages;
  std::size_t outs = 0;
  const Context* claimant = nullptr;
  std::chrono::nanoseconds patience{};  // for streams to come to rest
  std::shared_ptr<Context> in_use;      // it has to yield, and the device cannot make it

  Round(const Context* claimant, const Stopped& victims, Clock::time_point deadline)
      : claimant(claimant),
        patience(std::max<std::chrono::nanoseconds>(
            std::min<std::chrono::nanoseconds>(victims.patience(), deadline - Clock::now()),
            kLeastPatience)) {
    pages.reserve(2 * kMostPages);
  }
  // How much longer its deadline is for what has come where it was to come: by that, what waits for
  // work of others ends also if it gets on, only slowly.
  std::chrono::nanoseconds time_for_moved() const {
    std::chrono::nanoseconds time{};
    for (const Page& page : pages) {
      if (page.move.done) {
        time += std::max<std::chrono::nanoseconds>(
            kTimePerPage, kTimePerGiB / 1024 * (page.move.from.bytes / MiB));
      }
    }
    return time;
  }
  std::size_t outs_left() const { return kMostPages - outs; }
  std::size_t ins_left() const { return kMostPages - (pages.size() - outs); }
};

// A context on its way back, over all tries.
struct Manager::Return {
  Context& context;
  Stopped victims;
  Need need;
  bool is_first = true;
  Reliefs::Left reliefs;
  bool is_relieved = false;  // nobody can do without something any more

  Return(Manager& manager, Context& context)
      : context(context),
        victims(manager, /*victims=*/true),
        need{&context, 0, false, Clock::now() + manager.claim_timeout_, /*returns=*/true} {}
};

}  // namespace pgk
