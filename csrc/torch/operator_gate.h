// Operators of threads in contexts that yield pass the gate, one by one (core/compute_gate.h).
#pragma once

#include <memory>

#include "core/thread_streams.h"

namespace pgk {

// The calling thread, whose streams these are, is in `context` from now on, or in none. Torch hands
// what follows from it to the threads that work for this one: those of a backward pass.
void gate_operators(ThreadStreams& streams, const Context* context);

// Passes the gate once by hand, if the thread is in a context that yields: for work that is no
// operator.
void pass_gate();

}  // namespace pgk
