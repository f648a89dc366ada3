// Keeps a fork from tearing the allocator apart: no lock is held by a thread that does not exist
// in the child, and the child gets memory of its own where it had shared memory.
#pragma once

#include <memory>

#include "core/manager.h"
#include "core/memory_pool.h"

namespace pgk {

// Until the manager, or the pool, is destroyed.
void guard_forks(const std::shared_ptr<Manager>& manager);
void guard_pool_forks(const std::shared_ptr<MemoryPool>& pool);

}  // namespace pgk
