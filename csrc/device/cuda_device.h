// A CUDA device through the driver's virtual memory management: handles are physical VRAM, ranges
// are reserved addresses of the process's primary context, the one that torch uses.
//
// A stream's id is its driver handle, so that streams of others (torch's, the user's) can be named
// as well; the default stream is kDefaultStream. Streams of ours do not synchronise with the
// default stream and are never destroyed, since libraries keep raw handles of them: one that is
// given back serves the next context. Every call runs in relaxed capture mode, so that another
// thread's capture is not broken.
//
// Host memory that the device can map takes a recent driver; without it nothing can be moved.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "device/cuda_captures.h"
#include "device/cuda_driver.h"
#include "device/cuda_events.h"
#include "device/cuda_mappings.h"
#include "device/cuda_mover.h"
#include "device/cuda_processors.h"
#include "device/device.h"

namespace pgk {

class CudaDevice final : public Device, public std::enable_shared_from_this<CudaDevice> {
 public:
  // `capacity` in bytes limits the handles that exist at a time; 0 stands for all of the VRAM.
  CudaDevice(int ordinal, std::size_t capacity);
  // Handles and ranges must have been given back.
  ~CudaDevice() override;

  // CU_STREAM_LEGACY, the driver's name for what a null handle stands for.
  static constexpr StreamId kDefaultStream = 1;
  static StreamId id_of(const void* handle) {
    return handle == nullptr ? kDefaultStream : reinterpret_cast<StreamId>(handle);
  }

  bool is_done(EventId event) override;
  bool is_idle(StreamId stream) override;
  bool is_capturing(StreamId stream) override;
  std::size_t free_bytes() override;
  // A child of a fork cannot use CUDA at all; it never touches VRAM.
  void privatise_in_child(Address /*address*/, Handle /*handle*/) noexcept override {}

  int ordinal() const { return ordinal_; }
  // Around a capture of the calling thread on `stream`, which moves keep away from. begin_capture()
  // may block; throws ErrorCode::busy if it was in vain.
  std::uint64_t begin_capture(StreamId stream);
  // What begin_capture() returned.
  void end_capture(std::uint64_t number) { captures_.end(number); }
  // Of one on `stream` that nobody will end any more, should it go on.
  void abandon_capture(StreamId stream);
  using BesideCapture = CudaCaptures::Beside;
  void await_captures(std::chrono::nanoseconds patience) override;
  bool is_beside_capture() override { return captures_.is_beside(); }
  // Whether it is the calling thread's current device. Cheaper than to ask which one is.
  bool is_current() const {
    CUcontext current = nullptr;
    return driver_.cuCtxGetCurrent_fn(&current) == CUDA_SUCCESS && current == context_;
  }
  // Done once all work that any stream was given before is done. Null while something is captured,
  // which it would break. Drivers that cannot tell (before CUDA 12.5) have it wait for all.
  std::optional<EventId> record_all();
  // Makes the call while no capture begins. Throws Restless if one goes on.
  void without_captures(const std::function<void()>& call);
  // Memory outside of contexts, as cudaMalloc's; null if there is none. Giving it back waits for
  // the device.
  void* allocate_plain(std::size_t bytes);
  void free_plain(void* pointer);
  // Between this device and another one, in either direction, on a stream of the source's device.
  // Needs no peer access, which mapped memory does not have.
  void copy_between(Address destination, int destination_ordinal, Address source,
                    int source_ordinal, std::size_t bytes, StreamId stream);

 private:
  class Scope : public CudaScope {
   public:
    explicit Scope(const CudaDevice& device) : CudaScope(device.driver_, device.context_) {}
  };

  void prepare_moves();

  Handle do_create(std::size_t bytes) override;
  Handle do_create_host(std::size_t bytes) override;
  void do_release(Handle handle) override;
  Address do_reserve(std::size_t bytes, std::size_t alignment) override;
  void do_unreserve(Address address, std::size_t bytes) override;
  void do_map(Address address, Handle handle) override;
  void do_unmap(Address address, Handle handle) override;
  void do_move(std::span<Move> moves, const Manner& manner) override;
  void do_drain(std::chrono::nanoseconds /*patience*/) override {}
  StreamId do_create_stream(int priority, ProcessorSet processors) override;
  void do_destroy_stream(StreamId stream) override;
  void do_copy(Address destination, Address source, std::size_t bytes, StreamId stream) override;
  EventId do_record(StreamId stream) override;
  void do_wait(StreamId stream, EventId event) override;
  void do_synchronize_stream(StreamId stream) override;
  void do_synchronize_event(EventId event) override;
  void do_synchronize() override;
  void do_notify(EventId event, Alarm alarm) override;

  static CUstream handle_of(StreamId stream);
  CUstream find(StreamId stream) const;
  std::vector<CudaHold::Stream> streams_to_hold(const Manner& manner) const;

  struct Stream {
    int priority = 0;
    ProcessorSet processors = 0;
    bool in_use = true;
  };

  const CudaDriver& driver_;
  CUdevice ordinal_ = 0;
  CUcontext context_ = nullptr;
  CUmemAllocationProp memory_{};
  std::vector<CUmemAllocationProp> host_memory_;  // the first that can be had
  CudaMappings mappings_;
  CudaProcessors processors_;
  CudaCaptures captures_;
  CudaEvents events_;
  std::unique_ptr<CudaMover> mover_;  // null where moves are not possible

  mutable std::mutex mutex_;
  std::size_t created_bytes_ = 0;
  // Held over nothing: it may be taken while streams are held.
  mutable std::mutex streams_mutex_;
  std::unordered_map<StreamId, Stream> streams_;  // ours
};

}  // namespace pgk
