// A graph of copies and of words that the CPU sees, put together node by node: one submission,
// within which nothing of anybody else can run on its stream.
//
// All calls need the device's context to be current, and throw ErrorCode::device.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>

#include "device/cuda_driver.h"
#include "device/device.h"

namespace pgk {

// Writes `value` to `flag`.
CUstreamBatchMemOpParams write_operation(CUdeviceptr flag, std::uint32_t value);
// Two operations of a stream: to write `value` to `flag`, and to wait until `gate` has reached it.
std::array<CUstreamBatchMemOpParams, 2> stop_operations(CUdeviceptr flag, CUdeviceptr gate,
                                                        std::uint32_t value);

class CudaGraph {
 public:
  // Null stands for no node; one that is named twice counts once.
  using Nodes = std::initializer_list<CUgraphNode>;

  CudaGraph(const CudaDriver& driver, CUcontext context);
  ~CudaGraph();
  CudaGraph(const CudaGraph&) = delete;
  CudaGraph& operator=(const CudaGraph&) = delete;

  CUgraph graph() const { return graph_; }
  CUgraphNode copy(Nodes after, Address destination, Address source, std::size_t bytes);
  // All work before it is visible to whoever sees the value.
  CUgraphNode write(Nodes after, CUdeviceptr flag, std::uint32_t value);
  // Waits until `gate` has reached the value, and writes it to `flag`.
  CUgraphNode start(CUdeviceptr gate, CUdeviceptr flag, std::uint32_t value);
  // The other way round.
  CUgraphNode stop(Nodes after, CUdeviceptr flag, CUdeviceptr gate, std::uint32_t value);

  // Makes it ready to be launched.
  void instantiate();
  CUgraphExec executable() const { return executable_; }

 private:
  CUgraphNode add(Nodes after, CUstreamBatchMemOpParams* operations, unsigned count);

  const CudaDriver& driver_;
  CUcontext context_;
  CUgraph graph_ = nullptr;
  CUgraphExec executable_ = nullptr;
};

}  // namespace pgk
