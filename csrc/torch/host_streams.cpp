#include "torch/host_streams.h"

#include <utility>

namespace pgk {
namespace {

thread_local StreamId current_stream = kNoStream;

class HostStreams final : public ThreadStreams {
 public:
  StreamId current() override { return current_stream; }
  Saved enter(const std::shared_ptr<Context>& context) override {
    return static_cast<Saved>(std::exchange(current_stream, context->stream()));
  }
  void leave(Saved saved, const std::shared_ptr<Context>& /*outer*/) override {
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
