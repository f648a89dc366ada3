// Streams that stand still while memory changes its place under them.
//
// What is to be done meanwhile is queued in a stream of ours before: it waits for `go`, and an
// event behind it for `gate`. Everybody is kept from going on: all streams of the device's context
// at once, also those that are made afterwards, by having the context wait for the event. Nothing
// tells where in a stream that wait is. So a stream stands still once it is idle; and one that is
// at work, whose owner may submit more and more behind the wait, is stopped by operations in it
// before: one writes a number to a flag, the other waits for `gate`. When all are idle or have
// written their flags, `go` is given; at the end `gate` is opened.
//
// While a stream is stopped, some calls of the driver block whoever makes them until it goes on,
// among them cudaFree and the first launch of a kernel, and such a thread may have locks of the
// driver that our submissions need. So a watchdog, which calls nothing of the driver, opens `go`
// and `gate` unless all stand still in time, and nothing is moved. From then on nothing is
// submitted.
//
// Stopped streams, and our own, each block one of the few hardware queues that all streams share:
// so only few can be stopped at a time, while the context's wait holds any number.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "device/cuda_driver.h"
#include "device/cuda_holds.h"
#include "device/cuda_watchdog.h"
#include "device/device.h"

namespace pgk {

// One hold, from its first submission until it is opened. One at a time for a device.
class CudaHold {
 public:
  using Clock = std::chrono::steady_clock;
  struct Stream {
    CUstream handle = nullptr;
    bool is_patient = false;  // it may stand still for longer: nobody's who matters most
  };
  // Those that have to be at rest. May be called while streams are held.
  using Streams = std::function<std::vector<Stream>()>;
  // Who is kept from going on: the whole context; or each of the streams, by stops. The latter is
  // for drivers that lack the former, and beside captures, which it would break. (Memory that its
  // owner alone may touch will need neither.)
  enum class Way { context, streams };

  CudaHold(CudaHolds& holds, std::uint32_t number) : holds_(holds), number_(number) {}
  // Opens it, and waits until nothing of our work runs any more.
  ~CudaHold();
  CudaHold(const CudaHold&) = delete;
  CudaHold& operator=(const CudaHold&) = delete;

  // Adds those that are at work to `active`. Before take().
  void note_active(const Streams& streams, std::vector<CUstream>& active) const;
  struct Terms {
    const Streams& streams;
    Way way = Way::context;
    // How long patient streams may take to do what they hold, while nobody is kept from going on.
    std::chrono::nanoseconds patience{};
    // How long those that are not stopped yet are watched for the moment in which all are idle.
    std::chrono::nanoseconds lull{};
    // Those that may be given more work at any moment, whether or not they are idle now.
    const std::vector<CUstream>& active;
  };
  // Queues what is to be done while everybody stands still, in our stream and, between fork() and
  // join(), in the branch.
  using Work = std::function<void(CudaHold&)>;
  // When this returns the work runs, everybody stands still, and no call of the driver's is left to
  // make but those of mapping. Throws Restless if that could not be had in time.
  void take(const Work& work, const Terms& terms);
  CUstream stream() const { return stream_; }
  CUstream branch() const { return branch_; }
  void fork();
  void join();
  // Between looks at flags. Throws ErrorCode::busy if none come any more, ErrorCode::device if the
  // device has failed.
  void pause();
  // After a flag that was seen.
  void renew() { since_ = Clock::now(); }

 private:
  struct Stop {
    CUstream stream = nullptr;
    std::uint32_t* flag = nullptr;
  };

  std::vector<Stop> stop(const std::vector<CUstream>& streams);
  void await_backlog(const std::vector<CUstream>& streams, std::chrono::nanoseconds patience) const;
  void probe();
  void submit(const Work& work);
  template <typename... Operations>
  void queue(CUstream stream, const char* what, Operations... operations);
  void hold_all(const Work& work, const Terms& terms);
  void stop_each(const Work& work, const Terms& terms);
  std::vector<CUstream> active(const Terms& terms, bool patient_ones) const;
  void await_lull(const std::vector<CUstream>& streams, std::chrono::nanoseconds lull);
  bool is_capturing(CUstream stream) const;
  bool is_idle(CUstream stream) const;
  void await_stops(std::vector<Stop> stops);
  void await_rest(const Streams& streams, const std::vector<Stop>& stopped);
  void watch_for(std::chrono::nanoseconds time, CUstream for_whom);
  bool has_failed() const;
  void ask_device();
  [[noreturn]] static void give_up(CUstream stream, const char* why);

  CudaHolds& holds_;
  std::uint32_t number_;
  CUstream stream_ = holds_.stream();
  CUstream branch_ = holds_.branch();
  enum class Submitted { nothing, part, all } submitted_ = Submitted::nothing;
  std::shared_ptr<CudaWatchdog> watchdog_;  // null until streams are kept from going on
  Clock::time_point start_{};  // when the first stream was kept from going on, patient ones apart
  Clock::time_point since_ = Clock::now();
  Clock::time_point asked_at_{};
  std::shared_ptr<std::atomic<CUresult>> failure_;  // null until the device is asked
};

}  // namespace pgk
