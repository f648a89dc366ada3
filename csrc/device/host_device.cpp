#include "device/host_device.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/error.h"
#include "core/types.h"

namespace pgk {
namespace {

[[noreturn]] void fail(const char* call, std::size_t bytes, int error) {
  throw Error(ErrorCode::device, std::string("host: ") + call + " of " + format_bytes(bytes) +
                                     " failed: " + std::strerror(error));
}

void* pointer(Address address) {
  return reinterpret_cast<void*>(address);
}

// Replaces whatever is at `address` by addresses that fault.
bool make_inaccessible(Address address, std::size_t bytes) {
  return ::mmap(pointer(address), bytes, PROT_NONE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != MAP_FAILED;
}

}  // namespace

HostDevice::HostDevice(std::size_t capacity) {
  properties_.name = "host";
  properties_.is_host = true;
  properties_.capacity = capacity / kGranularity * kGranularity;
  properties_.granularity = kGranularity;
  if (properties_.capacity == 0 || capacity > kLargestCapacity) {
    throw Error(ErrorCode::invalid_value,
                "a capacity of " + format_bytes(capacity) + " is not between one page of " +
                    format_bytes(kGranularity) + " and " + format_bytes(kLargestCapacity));
  }
  file_ = ::memfd_create("pygpukit-host-device", MFD_CLOEXEC);
  if (file_ < 0) fail("memfd_create", properties_.capacity, errno);
}

HostDevice::~HostDevice() {
  ::close(file_);
}

std::size_t HostDevice::free_bytes() {
  const std::lock_guard lock(mutex_);
  return properties_.capacity - created_bytes_;
}

std::size_t HostDevice::committed_bytes() const {
  struct stat status{};
  if (::fstat(file_, &status) != 0) fail("fstat", 0, errno);
  return static_cast<std::size_t>(status.st_blocks) * 512;
}

Handle HostDevice::do_create(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  if (bytes > properties_.capacity - created_bytes_) {
    throw Error(ErrorCode::device, "host: create of " + format_bytes(bytes) +
                                       " failed: out of memory, " + format_bytes(created_bytes_) +
                                       " of " + format_bytes(properties_.capacity) + " exist");
  }
  auto& offsets = unused_offsets_[bytes];
  if (offsets.empty()) {
    if (::ftruncate(file_, static_cast<off_t>(file_bytes_ + bytes)) != 0) {
      fail("ftruncate", file_bytes_ + bytes, errno);
    }
    offsets.push_back(file_bytes_);
    file_bytes_ += bytes;
  }
  const Handle handle{offsets.back(), bytes};
  offsets.pop_back();
  created_bytes_ += bytes;
  return handle;
}

void HostDevice::do_release(Handle handle) {
  const std::lock_guard lock(mutex_);
  if (::fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(handle.id),
                  static_cast<off_t>(handle.bytes)) != 0) {
    fail("release", handle.bytes, errno);
  }
  unused_offsets_[handle.bytes].push_back(handle.id);
  created_bytes_ -= handle.bytes;
}

Address HostDevice::do_reserve(std::size_t bytes, std::size_t alignment) {
  const std::size_t padded = bytes + alignment;
  void* start =
      ::mmap(nullptr, padded, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) fail("reserve", bytes, errno);
  const Address from = reinterpret_cast<Address>(start);
  const Address aligned = round_up(from, alignment);
  if (aligned > from) ::munmap(start, aligned - from);
  const std::size_t behind = from + padded - (aligned + bytes);
  if (behind > 0) ::munmap(pointer(aligned + bytes), behind);
  return aligned;
}

void HostDevice::do_unreserve(Address address, std::size_t bytes) {
  if (::munmap(pointer(address), bytes) != 0) fail("unreserve", bytes, errno);
}

void HostDevice::do_map(Address address, Handle handle) {
  if (::mmap(pointer(address), handle.bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file_,
             static_cast<off_t>(handle.id)) == MAP_FAILED) {
    const int error = errno;
    make_inaccessible(address, handle.bytes);  // a failed MAP_FIXED may have removed the range
    fail("map", handle.bytes, error);
  }
}

void HostDevice::do_unmap(Address address, Handle handle) {
  if (!make_inaccessible(address, handle.bytes)) fail("unmap", handle.bytes, errno);
}

void HostDevice::privatise_in_child(Address address, Handle handle) noexcept {
  // Pages that the child never writes still show the parent's later writes.
  if (::mmap(pointer(address), handle.bytes, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, file_,
             static_cast<off_t>(handle.id)) == MAP_FAILED) {
    std::abort();  // going on would write to the parent's memory
  }
}

}  // namespace pgk
