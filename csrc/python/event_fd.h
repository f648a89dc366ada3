// What an event loop can sleep on. Kept by everybody who may still ring it, so that the number is
// not another file's by then.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <system_error>

namespace pgk::python {

class EventFd {
 public:
  EventFd() : fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  }
  ~EventFd() { ::close(fd_); }
  EventFd(const EventFd&) = delete;
  EventFd& operator=(const EventFd&) = delete;

  int fileno() const { return fd_; }
  // It has not been rung, from here on.
  void clear() const {
    std::uint64_t times = 0;
    [[maybe_unused]] const auto read = ::read(fd_, &times, sizeof times);
  }
  // Fails only where it has been rung 2^64 times.
  void ring() const {
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto written = ::write(fd_, &one, sizeof one);
  }

 private:
  int fd_;
};

}  // namespace pgk::python
