#include "device/device.h"

#include <algorithm>
#include <utility>

#include "core/types.h"

namespace pgk {

const char* Device::name_of(Call call) {
  static constexpr std::array names{
      "any",    "create", "create_host", "release",       "reserve",        "unreserve",
      "map",    "unmap",  "move",        "create_stream", "destroy_stream", "copy",
      "record", "wait",   "synchronize", "notify",        "drain"};
  static_assert(names.size() == kCalls);
  return names[static_cast<std::size_t>(call)];
}

bool Device::due(Call call) {
  Counter& counter = counters_[static_cast<std::size_t>(call)];
  const std::uint64_t number = counter.calls.fetch_add(1, std::memory_order_relaxed) + 1;
  return number == counter.fail_at.load(std::memory_order_relaxed);
}

void Device::begin(Call call, std::size_t bytes) {
  const bool fails = due(Call::any);
  if (due(call) || fails) {
    throw Error(ErrorCode::device, properties_.name + ": " + name_of(call) +
                                       (bytes != 0 ? " of " + format_bytes(bytes) : "") +
                                       " failed: injected fault");
  }
}

void Device::require_multiple(Call call, std::size_t value) const {
  if (value == 0 || value % properties_.granularity != 0) {
    throw Error(ErrorCode::invalid_value, properties_.name + ": " + name_of(call) + ": " +
                                              std::to_string(value) +
                                              " is not a positive multiple of the granularity of " +
                                              format_bytes(properties_.granularity));
  }
}

void Device::inject_fault(std::uint64_t n, Call call) {
  Counter& counter = counters_[static_cast<std::size_t>(call)];
  counter.fail_at.store(n == 0 ? 0 : counter.calls.load() + n);
}

std::uint64_t Device::count(Call call) const {
  return counters_[static_cast<std::size_t>(call)].calls.load();
}

Handle Device::create(std::size_t bytes) {
  require_multiple(Call::create, bytes);
  begin(Call::create, bytes);
  return do_create(bytes);
}

Handle Device::create_host(std::size_t bytes) {
  require_multiple(Call::create_host, bytes);
  begin(Call::create_host, bytes);
  return do_create_host(bytes);
}

void Device::release(Handle handle) {
  begin(Call::release, handle.bytes);
  do_release(handle);
}

Address Device::reserve(std::size_t bytes, std::size_t alignment) {
  require_multiple(Call::reserve, bytes);
  require_multiple(Call::reserve, alignment);
  begin(Call::reserve, bytes);
  return do_reserve(bytes, alignment);
}

void Device::unreserve(Address address, std::size_t bytes) {
  begin(Call::unreserve, bytes);
  do_unreserve(address, bytes);
}

void Device::map(Address address, Handle handle) {
  require_multiple(Call::map, address);
  begin(Call::map, handle.bytes);
  do_map(address, handle);
}

void Device::unmap(Address address, Handle handle) {
  begin(Call::unmap, handle.bytes);
  do_unmap(address, handle);
}

void Device::drain(std::chrono::nanoseconds patience) {
  begin(Call::drain);
  do_drain(patience);
}

void Device::move(std::span<Move> moves, const Manner& manner) {
  for (const Move& move : moves) {
    if (move.from.bytes != move.to.bytes || move.from.on_host == move.to.on_host) {
      throw Error(ErrorCode::invalid_value,
                  properties_.name + ": a move is between the device and as much host memory");
    }
  }
  if (!moves.empty()) do_move(moves, manner);
}

StreamId Device::create_stream(int priority, ProcessorSet processors) {
  begin(Call::create_stream);
  const std::size_t groups = properties_.processor_groups.size();
  if (groups < 64 && processors >> groups != 0) {
    throw Error(ErrorCode::invalid_value, properties_.name + ": there are " +
                                              std::to_string(groups) + " groups of processors");
  }
  const StreamId stream = do_create_stream(
      std::clamp(priority, properties_.greatest_priority, properties_.least_priority), processors);
  known_.add(stream);
  return stream;
}

void Device::destroy_stream(StreamId stream) {
  begin(Call::destroy_stream);
  do_destroy_stream(stream);
}

void Device::copy(Address destination, Address source, std::size_t bytes, StreamId stream) {
  begin(Call::copy, bytes);
  do_copy(destination, source, bytes, stream);
}

EventId Device::record(StreamId stream) {
  begin(Call::record);
  return do_record(stream);
}

void Device::wait(StreamId stream, EventId event) {
  begin(Call::wait);
  do_wait(stream, event);
}

void Device::synchronize_stream(StreamId stream) {
  begin(Call::synchronize);
  do_synchronize_stream(stream);
}

void Device::synchronize_event(EventId event) {
  begin(Call::synchronize);
  do_synchronize_event(event);
}

void Device::synchronize() {
  begin(Call::synchronize);
  do_synchronize();
}

void Device::notify(EventId event, Alarm alarm) {
  begin(Call::notify);
  do_notify(event, std::move(alarm));
}

}  // namespace pgk
