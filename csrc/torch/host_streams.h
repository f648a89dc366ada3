// The host device has no current stream in torch, since CPU operators are done when they return.
// For sessions each thread has one here: what is in it are copies, events and waits.
#pragma once

#include "core/thread_streams.h"

namespace pgk {

// For sessions of contexts on host devices; lives forever.
ThreadStreams* host_streams();

// The calling thread's; kNoStream outside of sessions.
StreamId current_host_stream();

}  // namespace pgk
