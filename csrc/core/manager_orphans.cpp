// The manager's third part: what is left of contexts that are destroyed, and what a fork leaves.
#include <algorithm>
#include <memory>

#include "core/address_table.h"
#include "core/manager.h"
#include "core/scope_exit.h"

namespace pgk {
namespace {

using ContextLock = std::lock_guard<SpinLock>;

}  // namespace

// Orphans ------------------------------------------------------------------------------------

void Manager::collect_orphan(std::uint64_t id) {
  const std::lock_guard lock(mutex_);
  for (const auto& orphan : orphans_) {
    if (orphan->id() == id) {
      collect_orphans();
      return;
    }
  }
}

void Manager::collect_orphans() {
  for (std::size_t i = 0; i < orphans_.size();) {
    if (dismantle(*orphans_[i])) {
      orphans_.erase(orphans_.begin() + static_cast<std::ptrdiff_t>(i));
    } else {
      ++i;
    }
  }
}

// Gives back what no live block needs. True if nothing of the orphan is left; a device call that
// fails leaves the rest to the next attempt.
bool Manager::dismantle(Context& orphan) {
  const ContextLock lock(orphan.mutex_);
  const std::size_t range = orphan.arena_.page_count() * orphan.page_bytes();
  try {
    // The streams first: their work may still use the pages.
    while (orphan.arena_.live_blocks() == 0 && !orphan.own_streams_.empty()) {
      const StreamId stream = orphan.own_streams_.back().id;
      device_->destroy_stream(stream);
      // It was idle: nothing may still use what was freed in its order.
      std::replace(orphan.lanes_.begin(), orphan.lanes_.end(), stream, kNoStream);
      orphan.own_streams_.pop_back();
      if (stream == orphan.stream_) orphan.stream_ = kNoStream;
    }
    orphan.settle_fences();
    collect_retired(orphan);
    give_up_pages(orphan, SIZE_MAX);
    if (orphan.is_moving() || orphan.arena_.resident_pages() > 0) return false;
    // Whoever gets these addresses next must not be taken for this context.
    AddressTable::set(orphan.address_, range, 0, nullptr);
    const Address segments = orphan.address_of(orphan.arena_.upper_zone());
    ScopeExit restore([&] { AddressTable::set(orphan.address_, range, segments, &orphan); });
    device_->unreserve(orphan.address_, range);
    restore.dismiss();
  } catch (const Error&) {
    return false;
  }
  gone_ += orphan.counters_;
  std::size_t peaks = 0;
  for (const Context* context : all()) {
    if (context == &orphan) {
      peaks += orphan.arena_.peak_bytes();
    } else {
      const ContextLock other_lock(context->mutex_);
      peaks += context->arena_.peak_bytes();
    }
  }
  peak_with_gone_ = std::max(peak_with_gone_, peaks);
  ledger_.close(orphan.id());
  orphan.manager_of_orphan_.reset();
  return true;
}

void Manager::shut_down() {
  trim();
  const std::lock_guard lock(mutex_);
  shut_down_ = true;
}

bool Manager::is_shut_down() const {
  const std::lock_guard lock(mutex_);
  return shut_down_;
}

// Fork -----------------------------------------------------------------------------------------

std::vector<Context*> Manager::all() const {
  std::vector<Context*> contexts;
  for (const auto& context : orphans_) contexts.push_back(context.get());
  for (const auto& context : contexts_) contexts.push_back(context.get());
  return contexts;
}

Context* Manager::find(std::uint64_t id) const {
  const std::vector<Context*> contexts = all();
  const auto it = std::find_if(contexts.begin(), contexts.end(),
                               [id](const Context* context) { return context->id() == id; });
  return it == contexts.end() ? nullptr : *it;
}

void Manager::lock_all() {
  Lock lock(mutex_);
  // A page that moves is nowhere yet as far as the books go.
  moved_.wait(lock, [this] { return stopped_contexts_ == 0; });
  lock.release();
  host_pool_.lock();
  for (Context* context : all()) context->mutex_.lock();
}

void Manager::unlock_all() {
  for (Context* context : all()) context->mutex_.unlock();
  host_pool_.unlock();
  mutex_.unlock();
}

void Manager::detach_in_child() {
  forked_ = true;
  host_pool_.forget_in_child();
  // Who waits there does not exist here, and a destructor would wait for him.
  std::construct_at(&moved_);
  for (Context* context : all()) {
    context->state_ = Context::State::forked;
    context->sessions_.fetch_or(Context::kClosed);
    for (const auto& [page, backing] : context->pages_) {
      device_->privatise_in_child(context->address_of(page), backing.handle);
    }
  }
}

}  // namespace pgk
