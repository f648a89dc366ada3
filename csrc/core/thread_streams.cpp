#include "core/thread_streams.h"

#include "core/blocking.h"
#include "core/error.h"

namespace pgk {

// A session may outlive a context that it does not keep active.
bool ThreadStreams::has_work(const Context& context, StreamId stream) {
  return stream != kNoStream && !context.device().is_capturing(stream) &&
         !context.device().is_idle(stream);
}

void ThreadStreams::begin(const Context& context, bool ordered) {
  const StreamId outside = current();
  const StreamId inside = context.stream();
  if (outside == inside || outside == kNoStream) return;
  Device& device = context.device();
  if (device.is_capturing(outside)) {
    throw Error(ErrorCode::session, "context '" + context.name() +
                                        "' cannot be entered in the middle of a graph capture; "
                                        "enter first, then capture");
  }
  if (ordered && !device.is_idle(outside)) device.wait(inside, device.record(outside));
}

void ThreadStreams::finish(const Context& context) {
  const StreamId stream = context.stream();
  if (!has_work(context, stream)) return;
  const Blocking blocking;
  context.device().synchronize_stream(stream);
}

void ThreadStreams::follow(const Context& context) {
  const StreamId outside = current();
  const StreamId inside = context.stream();
  if (outside == inside || !has_work(context, inside)) return;
  if (outside == kNoStream) {
    finish(context);
  } else {
    context.device().wait(outside, context.device().record(inside));
  }
}

}  // namespace pgk
