// The streams and events of the host device: queues of copies and waits that run in order, each
// as soon as nothing holds it back, on the thread that submitted it or that removed the obstacle.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "device/device.h"

namespace pgk {

class HostTimeline {
 public:
  StreamId create_stream(ProcessorSet processors);
  // The stream's work must be done.
  void destroy_stream(StreamId stream);
  void copy(Address destination, Address source, std::size_t bytes, StreamId stream);
  EventId record(StreamId stream);
  void wait(StreamId stream, EventId event);
  bool is_done(EventId event);
  bool is_idle(StreamId stream);
  bool is_capturing(StreamId stream);
  void synchronize_stream(StreamId stream);
  void synchronize_event(EventId event);
  void synchronize();
  void notify(EventId event, Alarm alarm);
  void hold(StreamId stream);
  void let_go(StreamId stream);
  void set_capturing(StreamId stream, bool capturing);
  // Waits until the streams are past what they hold, and are not captured. Throws Restless.
  void drain(const std::vector<StreamId>& streams, std::chrono::nanoseconds patience);
  // Calls `action` while no stream gets on. Instead returns the stream of work that touches the
  // memory and is still to run, if there is any.
  std::optional<StreamId> keep_away(Address address, std::size_t bytes,
                                    const std::function<void()>& action);
  ProcessorSet processors(StreamId stream);

 private:
  // An event is the number of a piece of work: it is done when that piece and so, by the order
  // of its stream, everything before it is done.
  struct Work {
    EventId number = 0;
    Address destination = 0;
    Address source = 0;
    std::size_t bytes = 0;
    EventId after = 0;

    bool touches(Address start, std::size_t length) const {
      const auto overlaps = [=, this](Address place) {
        return place < start + length && start < place + bytes;
      };
      return bytes > 0 && (overlaps(destination) || overlaps(source));
    }
  };
  struct Stream {
    std::deque<Work> pending;
    bool held = false;
    bool capturing = false;
    ProcessorSet processors = 0;
  };

  Stream& find(StreamId stream);
  bool is_gone(StreamId stream) const {
    return stream != 0 && stream < next_stream_ && !streams_.contains(stream);
  }
  EventId submit(StreamId stream, Work work);
  void run_all();
  bool done(EventId event) const;

  std::mutex mutex_;
  std::condition_variable progress_;
  std::map<StreamId, Stream> streams_;
  std::multimap<EventId, Alarm> alarms_;
  StreamId next_stream_ = 1;
  EventId next_event_ = 1;
};

}  // namespace pgk
