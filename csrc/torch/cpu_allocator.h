// The host device under torch: an allocator for CPU tensors that serves threads in a session from
// their context's arena and leaves everything else to the allocator it took over from.
#pragma once

#include <c10/core/Allocator.h>

#include <memory>

#include "core/manager.h"

namespace pgk {

// Makes it torch's CPU allocator. Contexts of any manager may be used in sessions then. Throws
// c10::Error if what it would take over from is not what it took over from before: pointers of
// both would have to be told apart.
void install_cpu_allocator();
// Puts back what was there. Blocks that are still alive are freed correctly all the same.
void uninstall_cpu_allocator();

}  // namespace pgk
