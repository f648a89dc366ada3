// Blocks of a memory pool as tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "core/memory_pool.h"

namespace pgk {

// A flat tensor that is the block's memory, restored first if it is evicted. The block is pinned,
// and its memory valid, as long as the storage lives. Throws as MemoryPool::pin() does, and
// ErrorCode::invalid_value if the size is not a multiple of the item size.
at::Tensor pool_tensor(MemoryPool& pool, MemoryPool::Id block, at::ScalarType dtype);

}  // namespace pgk
