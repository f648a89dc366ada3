#include "core/handle_pool.h"

#include <algorithm>

#include "core/error.h"
#include "core/scope_exit.h"

namespace pgk {

void HandlePool::release_spare(Shelf& shelf) {
  const Handle handle = shelf.handles.back();
  device_.release(handle);
  shelf.handles.pop_back();
  existing_bytes_ -= handle.bytes;
}

Handle HandlePool::create(std::size_t bytes) {
  // Spare handles of other sizes occupy physical memory that the books count as free.
  for (auto& [size, shelf] : shelves_) {
    while (existing_bytes_ + bytes > device_.properties().capacity && shelf.has_spare()) {
      release_spare(shelf);
    }
  }
  Handle handle;
  try {
    handle = device_.create(bytes);
  } catch (const Error&) {
    // Others than this pool may have taken the device's memory.
    const std::size_t before = existing_bytes_;
    trim();
    if (existing_bytes_ == before) throw;
    handle = device_.create(bytes);
  }
  existing_bytes_ += bytes;
  created_bytes_ += bytes;
  peak_bytes_ = std::max(peak_bytes_, existing_bytes_);
  return handle;
}

Handle HandlePool::take(std::size_t bytes, bool reserved) {
  Shelf& shelf = shelves_[bytes];
  if (!reserved && !shelf.has_spare()) return create(bytes);
  const Handle handle = shelf.handles.back();
  shelf.handles.pop_back();
  if (reserved) --shelf.reserved;
  return handle;
}

void HandlePool::give_back(Handle handle, bool reserved) {
  Shelf& shelf = shelves_[handle.bytes];
  shelf.handles.push_back(handle);
  if (reserved) ++shelf.reserved;
}

void HandlePool::reserve(std::size_t bytes, std::size_t count) {
  Shelf& shelf = shelves_[bytes];
  std::size_t done = 0;
  ScopeExit undo([&] { shelf.reserved -= done; });
  for (; done < count; ++done) {
    // Each is claimed at once, or creating the next could release it to make room.
    if (!shelf.has_spare()) shelf.handles.push_back(create(bytes));
    ++shelf.reserved;
  }
  undo.dismiss();
}

void HandlePool::unreserve(std::size_t bytes, std::size_t count) {
  shelves_[bytes].reserved -= count;
}

void HandlePool::trim() {
  for (auto& [size, shelf] : shelves_) {
    try {
      while (shelf.has_spare()) release_spare(shelf);
    } catch (const Error&) {
      // Still pooled and counted; the next trim or a taker gets it.
    }
  }
}

std::size_t HandlePool::reserved(std::size_t bytes) const {
  const auto it = shelves_.find(bytes);
  return it == shelves_.end() ? 0 : it->second.reserved;
}

std::size_t HandlePool::pooled_bytes() const {
  std::size_t bytes = 0;
  for (const auto& [size, shelf] : shelves_) bytes += size * shelf.handles.size();
  return bytes;
}

}  // namespace pgk
