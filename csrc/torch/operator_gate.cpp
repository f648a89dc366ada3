#include "torch/operator_gate.h"

#include <ATen/record_function.h>

#include <atomic>
#include <optional>

#include "core/session.h"

namespace pgk {
namespace {

// Of the last device that a thread entered a context of: there is one in a process.
std::atomic<ThreadStreams*> thread_streams{nullptr};
thread_local std::optional<at::CallbackHandle> watching;
thread_local ComputeGate::RunAhead run_ahead;

std::unique_ptr<at::ObserverContext> before_operator(const at::RecordFunction& /*function*/) {
  pass_gate();
  return nullptr;
}

}  // namespace

void pass_gate() {
  ThreadStreams* streams = thread_streams.load(std::memory_order_acquire);
  if (streams == nullptr) return;
  const std::shared_ptr<Context> context = streams->context();
  if (!context || !context->yields() || Step::is_under_way()) return;  // a replay may be in one
  const StreamId stream = streams->current();
  if (stream != kNoStream) context->gate().pass(stream, run_ahead);
}

void gate_operators(ThreadStreams& streams, const Context* context) {
  const bool is_wanted = context != nullptr && context->yields() && !Step::is_under_way();
  if (is_wanted == watching.has_value()) return;
  if (is_wanted) {
    thread_streams.store(&streams, std::memory_order_release);
    watching = at::addThreadLocalCallback(
        at::RecordFunctionCallback(before_operator).scopes({at::RecordScope::FUNCTION}));
  } else {
    at::removeCallback(*watching);
    watching.reset();
  }
}

}  // namespace pgk
