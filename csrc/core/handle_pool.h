// Physical memory that no arena has mapped at the moment: what reservations are made of, and what
// was given up and can be mapped again without the cost of releasing and creating it.
//
// Handles come in the page sizes of the contexts. For each size a number of the pooled handles
// is reserved; only takers with a claim to them get those. Not thread-safe: the manager locks.
#pragma once

#include <cstddef>
#include <map>
#include <vector>

#include "device/device.h"

namespace pgk {

class HandlePool {
 public:
  explicit HandlePool(Device& device) : device_(device) {}

  // A pooled or a new handle; `reserved` takes one of the reserved ones. Throws ErrorCode::device.
  Handle take(std::size_t bytes, bool reserved);
  void give_back(Handle handle, bool reserved);

  // Creates what is missing for `count` more reserved handles. Throws ErrorCode::device; the
  // number of reserved handles is then as before.
  void reserve(std::size_t bytes, std::size_t count);
  void unreserve(std::size_t bytes, std::size_t count);

  // Releases all handles that are not reserved. What the device refuses to release stays pooled.
  void trim();

  std::size_t reserved(std::size_t bytes) const;
  std::size_t pooled_bytes() const;
  // Bytes of all handles that exist, mapped ones included.
  std::size_t existing_bytes() const { return existing_bytes_; }
  std::size_t peak_bytes() const { return peak_bytes_; }
  // Of all handles since the beginning.
  std::size_t created_bytes() const { return created_bytes_; }
  void reset_peak() { peak_bytes_ = existing_bytes_; }

 private:
  struct Shelf {
    std::vector<Handle> handles;
    std::size_t reserved = 0;
    bool has_spare() const { return handles.size() > reserved; }
  };

  Handle create(std::size_t bytes);
  void release_spare(Shelf& shelf);

  Device& device_;
  std::map<std::size_t, Shelf> shelves_;  // by handle size
  std::size_t existing_bytes_ = 0;
  std::size_t peak_bytes_ = 0;
  std::size_t created_bytes_ = 0;
};

}  // namespace pgk
