#include "device/host_timeline.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <utility>

#include "core/error.h"

namespace pgk {

HostTimeline::Stream& HostTimeline::find(StreamId stream) {
  const auto it = streams_.find(stream);
  if (it == streams_.end()) {
    throw Error(ErrorCode::invalid_value, "host: no stream " + std::to_string(stream));
  }
  return it->second;
}

StreamId HostTimeline::create_stream(ProcessorSet processors) {
  const std::lock_guard lock(mutex_);
  streams_[next_stream_].processors = processors;
  return next_stream_++;
}

ProcessorSet HostTimeline::processors(StreamId stream) {
  const std::lock_guard lock(mutex_);
  return find(stream).processors;
}

void HostTimeline::destroy_stream(StreamId stream) {
  const std::lock_guard lock(mutex_);
  if (!find(stream).pending.empty()) {
    throw Error(ErrorCode::busy, "host: stream " + std::to_string(stream) + " has unfinished work");
  }
  streams_.erase(stream);
}

EventId HostTimeline::submit(StreamId stream, Work work) {
  const std::lock_guard lock(mutex_);
  Stream& queue = find(stream);
  if (queue.capturing) {
    throw Error(ErrorCode::busy, "host: stream " + std::to_string(stream) + " is being captured");
  }
  work.number = next_event_++;
  queue.pending.push_back(work);
  run_all();
  return work.number;
}

void HostTimeline::copy(Address destination, Address source, std::size_t bytes, StreamId stream) {
  submit(stream, {.destination = destination, .source = source, .bytes = bytes});
}

EventId HostTimeline::record(StreamId stream) {
  return submit(stream, {});
}

void HostTimeline::wait(StreamId stream, EventId event) {
  submit(stream, {.after = event});
}

bool HostTimeline::done(EventId event) const {
  return std::none_of(streams_.begin(), streams_.end(), [event](const auto& entry) {
    const auto& pending = entry.second.pending;
    return std::any_of(pending.begin(), pending.end(),
                       [event](const Work& work) { return work.number == event; });
  });
}

// One stream's progress can free another, so it goes round until nothing moves.
void HostTimeline::run_all() {
  for (bool moved = true; moved;) {
    moved = false;
    for (auto& [id, stream] : streams_) {
      while (!stream.held && !stream.pending.empty()) {
        const Work work = stream.pending.front();
        if (!done(work.after)) break;
        if (work.bytes > 0) {
          std::memcpy(reinterpret_cast<void*>(work.destination),
                      reinterpret_cast<const void*>(work.source), work.bytes);
        }
        stream.pending.pop_front();
        moved = true;
      }
    }
  }
  std::erase_if(alarms_, [this](const auto& entry) {
    if (!done(entry.first)) return false;
    entry.second();
    return true;
  });
  progress_.notify_all();
}

bool HostTimeline::is_done(EventId event) {
  const std::lock_guard lock(mutex_);
  return done(event);
}

bool HostTimeline::is_idle(StreamId stream) {
  const std::lock_guard lock(mutex_);
  if (is_gone(stream)) return true;
  const Stream& queue = find(stream);
  return queue.pending.empty() && !queue.held;
}

bool HostTimeline::is_capturing(StreamId stream) {
  const std::lock_guard lock(mutex_);
  return !is_gone(stream) && find(stream).capturing;
}

void HostTimeline::drain(const std::vector<StreamId>& streams, std::chrono::nanoseconds patience) {
  const auto deadline = std::chrono::steady_clock::now() + patience;
  std::unique_lock lock(mutex_);
  const auto refuse = [](StreamId stream, const char* why) {
    throw Restless(stream, "host: stream " + std::to_string(stream) + why);
  };
  for (const StreamId stream : streams) {
    const auto is_over = [&] {
      const auto known = streams_.find(stream);
      return known == streams_.end() || !known->second.capturing;
    };
    if (!progress_.wait_until(lock, deadline, is_over)) refuse(stream, " is being captured");
    const auto known = streams_.find(stream);
    const bool is_idle = known == streams_.end() || known->second.pending.empty();
    const EventId last = is_idle ? 0 : known->second.pending.back().number;
    if (!progress_.wait_until(lock, deadline, [&] { return done(last); })) {
      refuse(stream, " has not come to rest");
    }
  }
}

std::optional<StreamId> HostTimeline::keep_away(Address address, std::size_t bytes,
                                                const std::function<void()>& action) {
  const std::lock_guard lock(mutex_);
  for (const auto& [id, stream] : streams_) {
    const auto touches = [&](const Work& work) { return work.touches(address, bytes); };
    if (std::any_of(stream.pending.begin(), stream.pending.end(), touches)) return id;
  }
  action();
  return std::nullopt;
}

void HostTimeline::synchronize_stream(StreamId stream) {
  std::unique_lock lock(mutex_);
  const EventId last = find(stream).pending.empty() ? 0 : find(stream).pending.back().number;
  progress_.wait(lock, [&] { return done(last); });
}

void HostTimeline::synchronize_event(EventId event) {
  std::unique_lock lock(mutex_);
  progress_.wait(lock, [&] { return done(event); });
}

void HostTimeline::synchronize() {
  std::unique_lock lock(mutex_);
  progress_.wait(lock, [&] {
    return std::all_of(streams_.begin(), streams_.end(),
                       [](const auto& entry) { return entry.second.pending.empty(); });
  });
}

void HostTimeline::notify(EventId event, Alarm alarm) {
  const std::lock_guard lock(mutex_);
  alarms_.emplace(event, std::move(alarm));
  run_all();
}

void HostTimeline::hold(StreamId stream) {
  const std::lock_guard lock(mutex_);
  find(stream).held = true;
}

void HostTimeline::let_go(StreamId stream) {
  const std::lock_guard lock(mutex_);
  find(stream).held = false;
  run_all();
}

void HostTimeline::set_capturing(StreamId stream, bool capturing) {
  const std::lock_guard lock(mutex_);
  find(stream).capturing = capturing;
  progress_.notify_all();
}

}  // namespace pgk
