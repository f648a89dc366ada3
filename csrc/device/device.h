// What the core needs from a device, in the fewest calls, with their preconditions stated once.
//
// A device hands out physical memory as handles and virtual addresses as ranges; mapping joins
// the two. Host memory can stand in for the device's, at the same addresses: slower, and not
// part of its capacity. Streams run copies in order, events mark points in them. The public calls
// count themselves and can be made to fail, on every device alike; implementations override do_*.
//
// Every call may throw ErrorCode::device (out of memory, of any kind, included) and has then
// changed nothing. All calls may be made from any thread.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/error.h"
#include "device/known_streams.h"

namespace pgk {

using Address = std::uintptr_t;

// Physical memory that exists whether or not it is mapped.
struct Handle {
  std::uint64_t id = 0;
  std::size_t bytes = 0;
  bool on_host = false;
};

// Never 0.
using EventId = std::uint64_t;

// Some of the device's groups of processors, a bit for each. None stands for all.
using ProcessorSet = std::uint64_t;

// What tells somebody who sleeps that an event is done.
using Alarm = std::function<void()>;

// Tells contents apart; what it is computed from is the device's business.
struct Fingerprint {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
};

// One handle takes another one's place at an address, with what it holds.
struct Move {
  Address address = 0;
  Handle from;  // mapped there
  Handle to;    // mapped nowhere, of the same size; one of the two is on the host
  // If `to` held this when it was mapped last: should `from` still hold the same, nothing is
  // copied. Cleared once the call has written to `to`.
  std::optional<Fingerprint> known;
  // What the call did.
  bool done = false;
  bool copied = false;
  std::optional<Fingerprint> contents;  // of what came back to the device, where it can be told
};

// ErrorCode::busy: a stream whose work did not end in time.
class Restless : public Error {
 public:
  Restless(StreamId stream, const std::string& text)
      : Error(ErrorCode::busy, text), stream_(stream) {}
  // kNoStream where it is not one that could be named.
  StreamId stream() const noexcept { return stream_; }

 private:
  StreamId stream_;
};

// How a move treats the work of others.
struct Manner {
  std::chrono::nanoseconds patience{};  // how long to wait for streams to come to rest, each time
  // Whether others are at work: they are held briefly, and not often. Asked again and again, while
  // nobody is held. Empty: nobody is.
  std::function<bool()> are_others_at_work{};
  std::vector<StreamId> own{};  // streams of who moves: they may be held for longer
};

class Device {
 public:
  struct Properties {
    std::string name;
    std::string label;                    // what sentences call it
    std::size_t capacity = 0;             // bytes of handles that can exist at a time
    std::size_t granularity = 0;          // sizes of handles and ranges are multiples of it
    bool is_host = false;                 // its memory is ordinary host memory
    bool can_move = false;                // create_host() and move() work
    bool can_hold = false;                // move() holds whoever is at work
    std::string holds;                    // whom, in words
    StreamId default_stream = kNoStream;  // kNoStream: there is none
    int least_priority = 0;               // of streams; lower numbers are more important
    int greatest_priority = 0;
    // The processors of each group that streams can be confined to, at most 64 groups; if there are
    // none, why.
    std::vector<unsigned> processor_groups;
    std::string why_undivided;
  };

  enum class Call : std::uint8_t {
    any,
    create,
    create_host,
    release,
    reserve,
    unreserve,
    map,
    unmap,
    move,
    create_stream,
    destroy_stream,
    copy,
    record,
    wait,
    synchronize,
    notify,
    drain,
  };
  static constexpr std::size_t kCalls = static_cast<std::size_t>(Call::drain) + 1;
  static const char* name_of(Call call);

  Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  virtual ~Device() = default;

  const Properties& properties() const { return properties_; }

  // New physical memory, contents undefined.
  Handle create(std::size_t bytes);
  // The same in host memory, which the device can map as well.
  Handle create_host(std::size_t bytes);
  // The handle must not be mapped.
  void release(Handle handle);

  // Addresses that fault until something is mapped there. `alignment` is a power of two.
  Address reserve(std::size_t bytes, std::size_t alignment);
  // A whole range as reserved, with nothing mapped in it.
  void unreserve(Address address, std::size_t bytes);

  // Makes the handle's memory readable and writable at `address`, inside a reserved range.
  void map(Address address, Handle handle);
  // A whole handle's mapping.
  void unmap(Address address, Handle handle);
  // From now on, work on `stream`, whoever submits it, may use memory of the device. Streams of
  // create_stream() are known from the beginning, and so is the default stream.
  void announce(StreamId stream) { known_.add(stream); }
  std::vector<StreamId> known_streams() const { return known_.all(); }
  // Blocks until every known stream is past what it holds now; where move() holds streams it does
  // so itself. Throws Restless.
  void drain(std::chrono::nanoseconds patience);
  // Carries out the moves. Work on known streams is either before the move of a page or after it:
  // it is waited for, or held back. Call drain() first. Blocks. If it throws, each move is either
  // done or has changed nothing; ErrorCode::busy, as Restless where a stream is to blame, if work
  // could not be kept away from a page.
  void move(std::span<Move> moves, const Manner& manner);

  // `priority` is clamped to the range in properties(). Kernels that are launched on the stream, or
  // captured on it, run on `processors` alone.
  StreamId create_stream(int priority, ProcessorSet processors = 0);
  void destroy_stream(StreamId stream);
  // Both ends are mapped device memory or ordinary host memory, valid until the copy has run.
  void copy(Address destination, Address source, std::size_t bytes, StreamId stream);
  // Done once all work submitted to the stream before is done. An event stays valid forever.
  EventId record(StreamId stream);
  // Work submitted to `stream` from now on starts after `event` is done.
  void wait(StreamId stream, EventId event);
  // Block the caller, the last one until all streams are done.
  void synchronize_stream(StreamId stream);
  void synchronize_event(EventId event);
  void synchronize();
  // Calls `alarm` once `event` is done, on any thread, or at once. It must be brief and call
  // nothing of the device. If the work before the event fails it may never be called: is_done()
  // tells.
  void notify(EventId event, Alarm alarm);
  // Waits for captures to end, which moves keep away from. Throws Restless.
  virtual void await_captures(std::chrono::nanoseconds /*patience*/) {}
  // Whether the calling thread captures, or works for a capture: then it must not wait for a move
  // that waits for captures.
  virtual bool is_beside_capture() { return false; }
  virtual bool is_done(EventId event) = 0;
  // Whether all work submitted to the stream so far is done. Not for a stream that is captured; one
  // that was destroyed may be asked about.
  virtual bool is_idle(StreamId stream) = 0;
  // Whether the stream's work is being captured into a graph: no event can be recorded on it.
  virtual bool is_capturing(StreamId stream) = 0;
  // What create() could still have, as far as the device can tell.
  virtual std::size_t free_bytes() = 0;

  // In the child of a fork: gives it a mapping of its own, so that its writes do not reach the
  // parent. Async-signal-safe.
  virtual void privatise_in_child(Address address, Handle handle) noexcept = 0;

  // Makes the n-th call from now on fail, once; n = 1 is the next, 0 cancels. For tests.
  void inject_fault(std::uint64_t n, Call call = Call::any);
  // How often `call` was made, failed ones included.
  std::uint64_t count(Call call) const;

 protected:
  // Before each move, too.
  void begin(Call call, std::size_t bytes = 0);

  Properties properties_;
  KnownStreams known_;

 private:
  virtual Handle do_create(std::size_t bytes) = 0;
  virtual Handle do_create_host(std::size_t bytes) = 0;
  virtual void do_release(Handle handle) = 0;
  virtual Address do_reserve(std::size_t bytes, std::size_t alignment) = 0;
  virtual void do_unreserve(Address address, std::size_t bytes) = 0;
  virtual void do_map(Address address, Handle handle) = 0;
  virtual void do_unmap(Address address, Handle handle) = 0;
  virtual void do_move(std::span<Move> moves, const Manner& manner) = 0;
  virtual void do_drain(std::chrono::nanoseconds patience) = 0;
  virtual StreamId do_create_stream(int priority, ProcessorSet processors) = 0;
  virtual void do_destroy_stream(StreamId stream) = 0;
  virtual void do_copy(Address destination, Address source, std::size_t bytes, StreamId stream) = 0;
  virtual EventId do_record(StreamId stream) = 0;
  virtual void do_wait(StreamId stream, EventId event) = 0;
  virtual void do_synchronize_stream(StreamId stream) = 0;
  virtual void do_synchronize_event(EventId event) = 0;
  virtual void do_synchronize() = 0;
  virtual void do_notify(EventId event, Alarm alarm) = 0;

  bool due(Call call);
  void require_multiple(Call call, std::size_t value) const;

  struct Counter {
    std::atomic<std::uint64_t> calls{0};
    std::atomic<std::uint64_t> fail_at{0};
  };
  std::array<Counter, kCalls> counters_;
};

}  // namespace pgk
