// Physical memory that no arena has mapped at the moment: what reservations are made of, and what
// was given up and can be mapped again without the cost of releasing and creating it.
//
// Handles come in the page sizes of the contexts. How many of each size have to stay for others is
// the caller's to say, each time: the pool knows nothing of contexts. Not thread-safe: the manager
// locks.
#pragma once

#include <cstddef>
#include <map>
#include <vector>

#include "device/device.h"

namespace pgk {

class HandlePool {
 public:
  // How many handles of each size must stay.
  using Keep = std::map<std::size_t, std::size_t>;

  explicit HandlePool(Device& device) : device_(device) {}

  // A pooled handle beyond what should stay, else a new one, for which others beyond that are
  // released if the device is full, else one beyond what must stay. Throws ErrorCode::device.
  Handle take(std::size_t bytes, const Keep& should = {}, const Keep& must = {});
  void give_back(Handle handle) { shelves_[handle.bytes].push_back(handle); }

  // Creates what is missing for `count` handles beyond what must stay. Throws ErrorCode::device;
  // those created by then are kept.
  void fill(std::size_t bytes, std::size_t count, const Keep& keep);
  // As far as it can be done, makes handles of each size as many as should stay, out of others.
  void even_out(const Keep& keep);

  // Where less is pooled than what should stay and is not `lent`, makes small handles that stand in
  // for it, as far as the device has memory: else others could take that.
  void make_up(const Keep& keep, std::size_t lent);

  // Releases all that need not stay. What the device refuses to release stays pooled.
  void trim(const Keep& keep = {});

  std::size_t pooled(std::size_t bytes) const;
  std::size_t pooled_bytes() const;
  // Bytes of all handles that exist, mapped ones included.
  std::size_t existing_bytes() const { return existing_bytes_; }
  std::size_t peak_bytes() const { return peak_bytes_; }
  // Of all handles since the beginning.
  std::size_t created_bytes() const { return created_bytes_; }
  void reset_peak() { peak_bytes_ = existing_bytes_; }

 private:
  Handle create(std::size_t bytes, const Keep& keep);
  void release_one(std::vector<Handle>& handles);

  Device& device_;
  std::map<std::size_t, std::vector<Handle>> shelves_;  // by handle size
  std::size_t existing_bytes_ = 0;
  std::size_t peak_bytes_ = 0;
  std::size_t created_bytes_ = 0;
};

}  // namespace pgk
