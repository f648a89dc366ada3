#include "core/handle_pool.h"

#include <algorithm>

#include "core/error.h"

namespace pgk {
namespace {

std::size_t kept(const HandlePool::Keep& keep, std::size_t bytes) {
  const auto it = keep.find(bytes);
  return it == keep.end() ? 0 : it->second;
}

}  // namespace

void HandlePool::release_one(std::vector<Handle>& handles) {
  const Handle handle = handles.back();
  device_.release(handle);
  handles.pop_back();
  existing_bytes_ -= handle.bytes;
}

Handle HandlePool::create(std::size_t bytes, const Keep& keep) {
  // Handles of other sizes occupy physical memory that the books count as free.
  for (auto& [size, handles] : shelves_) {
    while (existing_bytes_ + bytes > device_.properties().capacity &&
           handles.size() > kept(keep, size)) {
      release_one(handles);
    }
  }
  Handle handle;
  try {
    handle = device_.create(bytes);
  } catch (const Error&) {
    // Others than this pool may have taken the device's memory.
    const std::size_t before = existing_bytes_;
    trim(keep);
    if (existing_bytes_ == before) throw;
    handle = device_.create(bytes);
  }
  existing_bytes_ += bytes;
  created_bytes_ += bytes;
  peak_bytes_ = std::max(peak_bytes_, existing_bytes_);
  return handle;
}

Handle HandlePool::take(std::size_t bytes, const Keep& should, const Keep& must) {
  std::vector<Handle>& handles = shelves_[bytes];
  if (handles.size() <= kept(should, bytes)) {
    try {
      return create(bytes, should);
    } catch (const Error&) {
      // Not for whatever else may have gone wrong.
      if (existing_bytes_ + bytes <= device_.properties().capacity &&
          device_.free_bytes() >= bytes) {
        throw;
      }
      if (handles.size() <= kept(must, bytes)) return create(bytes, must);
    }
  }
  const Handle handle = handles.back();
  handles.pop_back();
  return handle;
}

void HandlePool::fill(std::size_t bytes, std::size_t count, const Keep& keep) {
  std::vector<Handle>& handles = shelves_[bytes];
  const std::size_t goal = std::min(handles.size(), kept(keep, bytes)) + count;
  // What is there already must not be released to make room for the next.
  Keep staying = keep;
  while (handles.size() < goal) {
    staying[bytes] = handles.size();
    handles.push_back(create(bytes, staying));
  }
}

void HandlePool::even_out(const Keep& keep) {
  for (const auto& [bytes, count] : keep) {
    const std::size_t has = pooled(bytes);
    try {
      if (has < count) fill(bytes, count - has, keep);
    } catch (const Error&) {
      // There is not enough; what was lent comes back by itself.
    }
  }
}

void HandlePool::make_up(const Keep& keep, std::size_t lent) {
  std::size_t needed = 0;
  for (const auto& [size, count] : keep) needed += size * count;
  const std::size_t bytes = device_.properties().granularity;
  try {
    while (pooled_bytes() + lent < needed &&
           existing_bytes_ + bytes <= device_.properties().capacity) {
      shelves_[bytes].push_back(create(bytes, keep));
    }
  } catch (const Error&) {
    // It comes back with what was lent.
  }
}

void HandlePool::trim(const Keep& keep) {
  for (auto& [size, handles] : shelves_) {
    try {
      while (handles.size() > kept(keep, size)) release_one(handles);
    } catch (const Error&) {
      // Still pooled and counted; the next trim or a taker gets it.
    }
  }
}

std::size_t HandlePool::pooled(std::size_t bytes) const {
  const auto it = shelves_.find(bytes);
  return it == shelves_.end() ? 0 : it->second.size();
}

std::size_t HandlePool::pooled_bytes() const {
  std::size_t bytes = 0;
  for (const auto& [size, handles] : shelves_) bytes += size * handles.size();
  return bytes;
}

}  // namespace pgk
