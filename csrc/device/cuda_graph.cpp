#include "device/cuda_graph.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace pgk {
namespace {

std::vector<CUgraphNode> existing(CudaGraph::Nodes nodes) {
  std::vector<CUgraphNode> result;
  for (CUgraphNode node : nodes) {
    const bool again = std::find(result.begin(), result.end(), node) != result.end();
    if (node != nullptr && !again) result.push_back(node);
  }
  return result;
}

}  // namespace

CUstreamBatchMemOpParams write_operation(CUdeviceptr flag, std::uint32_t value) {
  CUstreamBatchMemOpParams operation{};
  operation.writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32;
  operation.writeValue.address = flag;
  operation.writeValue.value = value;
  operation.writeValue.flags = CU_STREAM_WRITE_VALUE_DEFAULT;
  return operation;
}

std::array<CUstreamBatchMemOpParams, 2> stop_operations(CUdeviceptr flag, CUdeviceptr gate,
                                                        std::uint32_t value) {
  CUstreamBatchMemOpParams wait{};
  wait.waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32;
  wait.waitValue.address = gate;
  wait.waitValue.value = value;
  // Not equal: who comes late finds the gate opened for a later value.
  wait.waitValue.flags = CU_STREAM_WAIT_VALUE_GEQ;
  return {write_operation(flag, value), wait};
}

CudaGraph::CudaGraph(const CudaDriver& driver, CUcontext context)
    : driver_(driver), context_(context) {
  driver_.check(driver_.cuGraphCreate_fn(&graph_, 0), "move (graph)");
}

// One that still runs is freed by the driver once it is done.
CudaGraph::~CudaGraph() {
  if (executable_ != nullptr) driver_.cuGraphExecDestroy_fn(executable_);
  driver_.cuGraphDestroy_fn(graph_);
}

CUgraphNode CudaGraph::copy(Nodes after, Address destination, Address source, std::size_t bytes) {
  CUDA_MEMCPY3D parameters{};
  parameters.srcMemoryType = parameters.dstMemoryType = CU_MEMORYTYPE_UNIFIED;
  parameters.srcDevice = source;
  parameters.dstDevice = destination;
  parameters.WidthInBytes = bytes;
  parameters.Height = parameters.Depth = 1;
  const auto nodes = existing(after);
  CUgraphNode node = nullptr;
  driver_.check(driver_.cuGraphAddMemcpyNode_fn(&node, graph_, nodes.data(), nodes.size(),
                                                &parameters, context_),
                "move (copy node)", bytes);
  return node;
}

CUgraphNode CudaGraph::write(Nodes after, CUdeviceptr flag, std::uint32_t value) {
  CUstreamBatchMemOpParams operation = write_operation(flag, value);
  return add(after, &operation, 1);
}

CUgraphNode CudaGraph::start(CUdeviceptr gate, CUdeviceptr flag, std::uint32_t value) {
  auto operations = stop_operations(flag, gate, value);
  std::swap(operations[0], operations[1]);
  return add({}, operations.data(), operations.size());
}

CUgraphNode CudaGraph::stop(Nodes after, CUdeviceptr flag, CUdeviceptr gate, std::uint32_t value) {
  auto operations = stop_operations(flag, gate, value);
  return add(after, operations.data(), operations.size());
}

CUgraphNode CudaGraph::add(Nodes after, CUstreamBatchMemOpParams* operations, unsigned count) {
  CUDA_BATCH_MEM_OP_NODE_PARAMS parameters{};
  parameters.ctx = context_;
  parameters.count = count;
  parameters.paramArray = operations;
  const auto nodes = existing(after);
  CUgraphNode node = nullptr;
  driver_.check(
      driver_.cuGraphAddBatchMemOpNode_fn(&node, graph_, nodes.data(), nodes.size(), &parameters),
      "move (memory operation node)");
  return node;
}

void CudaGraph::instantiate() {
  driver_.check(driver_.cuGraphInstantiateWithFlags_fn(&executable_, graph_, 0),
                "move (instantiate)");
}

}  // namespace pgk
