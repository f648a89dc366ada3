// Which groups of a device's processors belong to whom: pure accounting.
//
// A share is granted in whole groups, rounded down. Whoever's share makes the sum 1 gets all groups
// that are left, so that nothing is lost to rounding.
#pragma once

#include <cstddef>
#include <map>
#include <vector>

#include "device/device.h"

namespace pgk {

class ProcessorShares {
 public:
  using Id = std::size_t;
  // Without groups shares are only summed up.
  explicit ProcessorShares(std::vector<unsigned> groups);

  // Takes the groups for `share` (above 0) of all processors. Throws ErrorCode::admission if the
  // shares would exceed 1, or if it is too little for a group.
  Id take(double share);
  void give_back(Id id);

  // Of one that was taken; empty if there are no groups.
  ProcessorSet set(Id id) const { return taken_.at(id).set; }
  // What nobody has taken; empty if that is nothing, or everything.
  ProcessorSet left() const;
  unsigned count(ProcessorSet set) const;
  double sum() const;

 private:
  struct Share {
    double share = 0;
    ProcessorSet set = 0;
  };

  ProcessorSet free() const;
  ProcessorSet most_within(double processors) const;

  std::vector<unsigned> groups_;
  std::map<Id, Share> taken_;
  Id next_ = 1;
};

}  // namespace pgk
