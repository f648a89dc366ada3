#include "torch/host_streams.h"

#include <utility>

#include "core/session.h"
#include "torch/operator_gate.h"

namespace pgk {
namespace {

thread_local StreamId current_stream = kNoStream;

class HostStreams final : public ThreadStreams {
 public:
  StreamId current() override { return current_stream; }
  std::shared_ptr<Context> context() override {
    Context* context = current_context();
    return context == nullptr ? nullptr : context->shared_from_this();
  }
  Saved enter(const std::shared_ptr<Context>& context) override {
    gate_operators(*this, context.get());
    return static_cast<Saved>(std::exchange(current_stream, context->stream()));
  }
  void leave(Saved saved, const std::shared_ptr<Context>& outer) override {
    gate_operators(*this, outer.get());
    current_stream = static_cast<StreamId>(saved);
  }
};

}  // namespace

ThreadStreams* host_streams() {
  static auto* streams = new HostStreams;  // threads may outlive static destructors
  return streams;
}

StreamId current_host_stream() {
  return current_stream;
}

}  // namespace pgk
