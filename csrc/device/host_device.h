// Host memory as a device: a memory file of fixed capacity whose parts are mapped into reserved
// ranges, page for page as a GPU's virtual memory works. Memory is committed when it is touched
// and given back when its handle is released. What stands in for it lies in a second file.
//
// A move changes the mapping in one step, so nobody ever faults. No stream gets on meanwhile; but
// threads cannot be held: what another thread writes while a page is copied may be lost. A page
// that queued work touches is not moved: whoever wants it moved has to wait for that first.
//
// Streams run on whoever submits or unblocks their work, in order and without threads of their
// own, so that tests can hold a stream and see exactly what that holds back.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "device/device.h"
#include "device/host_timeline.h"

namespace pgk {

// A sparse file in memory that handles are parts of.
class MemoryFile {
 public:
  MemoryFile(const char* name, bool on_host);
  ~MemoryFile();
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  // Throw ErrorCode::device.
  Handle take(std::size_t bytes);
  void give_back(Handle handle);

  int descriptor() const { return file_; }
  std::size_t taken_bytes() const { return taken_bytes_; }
  // Bytes of host memory that it occupies now.
  std::size_t committed_bytes() const;

 private:
  int file_;
  bool on_host_;
  std::size_t file_bytes_ = 0;  // handles of one size reuse each other's offsets
  std::size_t taken_bytes_ = 0;
  std::map<std::size_t, std::vector<std::uint64_t>> unused_offsets_;
};

class HostDevice final : public Device {
 public:
  static constexpr std::size_t kGranularity = std::size_t{2} << 20;

  static constexpr std::size_t kLargestCapacity = std::size_t{512} << 30;

  // `capacity` is rounded down to the granularity and must leave at least one page. Groups of
  // processors are for tests: streams only remember theirs.
  explicit HostDevice(std::size_t capacity, std::vector<unsigned> processor_groups = {});

  bool is_done(EventId event) override { return timeline_.is_done(event); }
  bool is_idle(StreamId stream) override { return timeline_.is_idle(stream); }
  bool is_capturing(StreamId stream) override { return timeline_.is_capturing(stream); }
  std::size_t free_bytes() override;
  void privatise_in_child(Address address, Handle handle) noexcept override;

  // For tests: work submitted to a held stream waits until it is let go.
  void hold(StreamId stream) { timeline_.hold(stream); }
  void let_go(StreamId stream) { timeline_.let_go(stream); }
  // For tests: no event can be recorded on a stream as long as it is captured.
  void set_capturing(StreamId stream, bool capturing) {
    timeline_.set_capturing(stream, capturing);
  }

  // For tests: what the stream was confined to.
  ProcessorSet processors(StreamId stream) { return timeline_.processors(stream); }

  // For tests: how often a page was not moved because of queued work.
  std::uint64_t refused_moves() const { return refused_moves_.load(); }

  // Bytes of host memory that the device occupies now, and what stands in for it.
  std::size_t committed_bytes() const { return memory_.committed_bytes(); }
  std::size_t backup_bytes() const { return backup_.committed_bytes(); }

 private:
  Handle do_create(std::size_t bytes) override;
  Handle do_create_host(std::size_t bytes) override;
  void do_release(Handle handle) override;
  Address do_reserve(std::size_t bytes, std::size_t alignment) override;
  void do_unreserve(Address address, std::size_t bytes) override;
  void do_map(Address address, Handle handle) override;
  void do_unmap(Address address, Handle handle) override;
  void do_move(std::span<Move> moves, const Manner& manner) override;
  void move_page(Move& move);
  void do_drain(std::chrono::nanoseconds patience) override {
    timeline_.drain(known_.all(), patience);
  }
  StreamId do_create_stream(int /*priority*/, ProcessorSet processors) override {
    return timeline_.create_stream(processors);
  }
  void do_destroy_stream(StreamId stream) override {
    timeline_.destroy_stream(stream);
    known_.remove(stream);
  }
  void do_copy(Address destination, Address source, std::size_t bytes, StreamId stream) override {
    timeline_.copy(destination, source, bytes, stream);
  }
  EventId do_record(StreamId stream) override { return timeline_.record(stream); }
  void do_wait(StreamId stream, EventId event) override { timeline_.wait(stream, event); }
  void do_synchronize_stream(StreamId stream) override { timeline_.synchronize_stream(stream); }
  void do_synchronize_event(EventId event) override { timeline_.synchronize_event(event); }
  void do_synchronize() override { timeline_.synchronize(); }
  void do_notify(EventId event, Alarm alarm) override { timeline_.notify(event, std::move(alarm)); }

  MemoryFile& file_of(Handle handle) { return handle.on_host ? backup_ : memory_; }

  std::mutex mutex_;
  MemoryFile memory_{"pygpukit-host-device", false};
  MemoryFile backup_{"pygpukit-host-backup", true};
  HostTimeline timeline_;
  std::atomic<std::uint64_t> refused_moves_{0};
};

}  // namespace pgk
