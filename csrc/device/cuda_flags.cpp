#include "device/cuda_flags.h"

namespace pgk {

CUstreamBatchMemOpParams write_operation(std::uint32_t& flag, std::uint32_t value) {
  CUstreamBatchMemOpParams operation{};
  operation.writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32;
  operation.writeValue.address = CudaFlags::address_of(flag);
  operation.writeValue.value = value;
  operation.writeValue.flags = CU_STREAM_WRITE_VALUE_DEFAULT;
  return operation;
}

CUstreamBatchMemOpParams wait_operation(std::uint32_t& flag, std::uint32_t value) {
  CUstreamBatchMemOpParams operation{};
  operation.waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32;
  operation.waitValue.address = CudaFlags::address_of(flag);
  operation.waitValue.value = value;
  // Not equal: who comes late finds the flag raised for a later value.
  operation.waitValue.flags = CU_STREAM_WAIT_VALUE_GEQ;
  return operation;
}

}  // namespace pgk
