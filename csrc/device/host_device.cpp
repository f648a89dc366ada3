#include "device/host_device.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
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

// A handle's memory at an address of its own, for the time of a comparison.
class View {
 public:
  View(int file, Handle handle)
      : bytes_(handle.bytes),
        data_(::mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, file, static_cast<off_t>(handle.id))) {
    if (data_ == MAP_FAILED) fail("view", bytes_, errno);
  }
  ~View() { ::munmap(data_, bytes_); }
  View(const View&) = delete;
  View& operator=(const View&) = delete;

  bool equals(Address address) const { return std::memcmp(data_, pointer(address), bytes_) == 0; }

 private:
  std::size_t bytes_;
  void* data_;
};

void write_all(int file, Address source, Handle handle) {
  for (std::size_t done = 0; done < handle.bytes;) {
    const ssize_t written = ::pwrite(file, pointer(source + done), handle.bytes - done,
                                     static_cast<off_t>(handle.id + done));
    if (written <= 0) fail("move", handle.bytes, errno);
    done += static_cast<std::size_t>(written);
  }
}

}  // namespace

MemoryFile::MemoryFile(const char* name, bool on_host)
    : file_(::memfd_create(name, MFD_CLOEXEC)), on_host_(on_host) {
  if (file_ < 0) fail("memfd_create", 0, errno);
}

MemoryFile::~MemoryFile() {
  ::close(file_);
}

Handle MemoryFile::take(std::size_t bytes) {
  auto& offsets = unused_offsets_[bytes];
  if (offsets.empty()) {
    if (::ftruncate(file_, static_cast<off_t>(file_bytes_ + bytes)) != 0) {
      fail("ftruncate", file_bytes_ + bytes, errno);
    }
    offsets.push_back(file_bytes_);
    file_bytes_ += bytes;
  }
  const Handle handle{offsets.back(), bytes, on_host_};
  offsets.pop_back();
  taken_bytes_ += bytes;
  return handle;
}

void MemoryFile::give_back(Handle handle) {
  if (::fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(handle.id),
                  static_cast<off_t>(handle.bytes)) != 0) {
    fail("release", handle.bytes, errno);
  }
  unused_offsets_[handle.bytes].push_back(handle.id);
  taken_bytes_ -= handle.bytes;
}

std::size_t MemoryFile::committed_bytes() const {
  struct stat status{};
  if (::fstat(file_, &status) != 0) fail("fstat", 0, errno);
  return static_cast<std::size_t>(status.st_blocks) * 512;
}

HostDevice::HostDevice(std::size_t capacity, std::vector<unsigned> processor_groups) {
  properties_.name = "host";
  properties_.label = "The host device";
  properties_.is_host = true;
  properties_.can_move = true;
  properties_.holds = "nobody: threads that work cannot be stopped";
  properties_.capacity = capacity / kGranularity * kGranularity;
  properties_.granularity = kGranularity;
  const bool has_empty = std::count(processor_groups.begin(), processor_groups.end(), 0U) > 0;
  if (processor_groups.size() > 64 || has_empty) {
    throw Error(ErrorCode::invalid_value,
                "processor_groups must be at most 64, of one processor or more each");
  }
  properties_.processor_groups = std::move(processor_groups);
  properties_.why_undivided = "host: threads choose their processors, not streams";
  if (properties_.capacity == 0 || capacity > kLargestCapacity) {
    throw Error(ErrorCode::invalid_value,
                "a capacity of " + format_bytes(capacity) + " is not between one page of " +
                    format_bytes(kGranularity) + " and " + format_bytes(kLargestCapacity));
  }
}

std::size_t HostDevice::free_bytes() {
  const std::lock_guard lock(mutex_);
  return properties_.capacity - memory_.taken_bytes();
}

Handle HostDevice::do_create(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  if (bytes > properties_.capacity - memory_.taken_bytes()) {
    throw Error(ErrorCode::device, "host: create of " + format_bytes(bytes) +
                                       " failed: out of memory, " +
                                       format_bytes(memory_.taken_bytes()) + " of " +
                                       format_bytes(properties_.capacity) + " exist");
  }
  return memory_.take(bytes);
}

Handle HostDevice::do_create_host(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  return backup_.take(bytes);
}

void HostDevice::do_release(Handle handle) {
  const std::lock_guard lock(mutex_);
  file_of(handle).give_back(handle);
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
  if (::mmap(pointer(address), handle.bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
             file_of(handle).descriptor(), static_cast<off_t>(handle.id)) == MAP_FAILED) {
    const int error = errno;
    make_inaccessible(address, handle.bytes);  // a failed MAP_FIXED may have removed the range
    fail("map", handle.bytes, error);
  }
}

void HostDevice::do_unmap(Address address, Handle handle) {
  if (!make_inaccessible(address, handle.bytes)) fail("unmap", handle.bytes, errno);
}

void HostDevice::do_move(std::span<Move> moves, const Manner& /*manner*/) {
  for (Move& move : moves) {
    begin(Call::move, move.to.bytes);
    const auto touched_by =
        timeline_.keep_away(move.address, move.from.bytes, [&] { move_page(move); });
    if (!touched_by) continue;
    ++refused_moves_;
    throw Restless(*touched_by, "host: work that is queued on stream " +
                                    std::to_string(*touched_by) + " touches the page");
  }
}

void HostDevice::move_page(Move& move) {
  const int file = file_of(move.to).descriptor();
  move.copied = !move.known || !View(file, move.to).equals(move.address);
  if (move.copied) {
    move.known.reset();
    write_all(file, move.address, move.to);
  }
  // In one step: who reads there meanwhile sees the same bytes. Only the kernel's own memory can be
  // short here, and the old mapping is gone then.
  if (::mmap(pointer(move.address), move.to.bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
             file, static_cast<off_t>(move.to.id)) == MAP_FAILED) {
    const int error = errno;
    do_map(move.address, move.from);
    fail("move", move.to.bytes, error);
  }
  move.done = true;
  // Contents are compared, not told by a number: that there is one is enough.
  if (!move.to.on_host) move.contents = Fingerprint{};
}

void HostDevice::privatise_in_child(Address address, Handle handle) noexcept {
  // Pages that the child never writes still show the parent's later writes.
  if (::mmap(pointer(address), handle.bytes, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, file_of(handle).descriptor(),
             static_cast<off_t>(handle.id)) == MAP_FAILED) {
    std::abort();  // going on would write to the parent's memory
  }
}

}  // namespace pgk
