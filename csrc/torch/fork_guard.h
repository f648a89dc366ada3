// Keeps a fork from tearing the allocator apart: no lock is held by a thread that does not exist
// in the child, and the child gets memory of its own where it had shared memory.
#pragma once

#include <memory>

#include "core/manager.h"

namespace pgk {

// Until the manager is destroyed.
void guard_forks(const std::shared_ptr<Manager>& manager);

}  // namespace pgk
