// Tells whether a page still holds what it held, at the speed of the device's memory, so that what
// did not change need not be copied again.
//
// The hash is NH of UMAC (Black, Halevi, Krawczyk, Krovetz, Rogaway, CRYPTO '99) with words of 64
// bits: the sum over all pairs of words of (x + a)(y + b) modulo 2^128, with keys a and b of each
// pair's own. For truly random keys any two different contents of a page have the same sum with a
// probability of 2^-64 at most, whatever they are. The keys here come from two random numbers,
// drawn once in a process, and the pair's position, through the output function of splitmix64
// (Steele, Lea, Flood, OOPSLA '14): random for all that memory contains by chance, but no defence
// against somebody who learns the numbers. Fingerprints mean nothing in another process.
//
// All calls need the device's context to be current.
#pragma once

#include <cstdint>
#include <string>

#include "device/cuda_driver.h"
#include "device/device.h"

namespace pgk {

class CudaFingerprint {
 public:
  // Compiles the kernel with the NVRTC that torch ships, which takes some tenths of a second, and
  // runs it once, so that it is loaded. `stream` is idle; `scratch` is a fingerprint that the
  // device can write.
  CudaFingerprint(const CudaDriver& driver, CUdevice ordinal, CUstream stream, CUdeviceptr scratch);
  ~CudaFingerprint();
  CudaFingerprint(const CudaFingerprint&) = delete;
  CudaFingerprint& operator=(const CudaFingerprint&) = delete;

  // Where there is no NVRTC, or none that knows the device, nothing can be computed.
  bool is_available() const { return kernel_ != nullptr; }

  // Writes the fingerprint of the memory to `result`, in the order of the stream. What is launched
  // so must not run at once.
  void launch(CUstream stream, Address address, std::size_t bytes, CUdeviceptr result) const;
  // Does the same, also beside what is launched so, and then writes `number` to `flag`: whoever
  // sees that sees the fingerprint, and the work ahead of it is done. Nor must two of these run at
  // once.
  void launch_and_tell(CUstream stream, Address address, std::size_t bytes, CUdeviceptr result,
                       CUdeviceptr flag, std::uint32_t number) const;

 private:
  bool load(const std::string& code);
  CUresult launch(CUstream stream, void** arguments) const;

  const CudaDriver& driver_;
  unsigned blocks_ = 0;
  CUmodule module_ = nullptr;
  CUfunction kernel_ = nullptr;
};

}  // namespace pgk
