#include "device/cuda_driver.h"

#include <dlfcn.h>

#include <string>

#include "core/error.h"
#include "core/types.h"

namespace pgk {
namespace {

// Of the driver API, for all functions: CUDA 13 gives cuCtxSynchronize another signature than the
// one that its headers declare by that name. Nothing here has changed since 12.0.
constexpr int kApiVersion = 12000;

using GetProcAddress = CUresult (*)(const char*, void**, int, cuuint64_t,
                                    CUdriverProcAddressQueryResult*);

[[noreturn]] void missing(const std::string& what) {
  throw Error(ErrorCode::device, "cuda: the driver cannot be used: " + what);
}

CudaDriver load() {
  void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) missing("libcuda.so.1 is not installed");
  auto* find = reinterpret_cast<GetProcAddress>(::dlsym(library, "cuGetProcAddress_v2"));
  if (find == nullptr) missing("it is older than CUDA 12");
  CudaDriver driver;
  const auto look_up = [find](const char* name, int version, auto& function) {
    void* address = nullptr;
    if (find(name, &address, version, CU_GET_PROC_ADDRESS_DEFAULT, nullptr) != CUDA_SUCCESS) {
      return false;
    }
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(address);
    return address != nullptr;
  };
#define PGK_LOOK_UP(name) \
  if (!look_up(#name, kApiVersion, driver.name##_fn)) missing(#name " is not in it");
  PGK_CUDA_FUNCTIONS(PGK_LOOK_UP)
#undef PGK_LOOK_UP
#define PGK_LOOK_UP(name, version) look_up(#name, version, driver.name##_fn);
  PGK_CUDA_LATER_FUNCTIONS(PGK_LOOK_UP)
#undef PGK_LOOK_UP
  driver.check(driver.cuInit_fn(0), "cuInit");
  return driver;
}

}  // namespace

const CudaDriver& CudaDriver::get() {
  static const CudaDriver driver = load();
  return driver;
}

void CudaDriver::check(CUresult result, const char* call, std::size_t bytes) const {
  if (result == CUDA_SUCCESS) [[likely]]
    return;
  const char* name = nullptr;
  if (cuGetErrorName_fn(result, &name) != CUDA_SUCCESS || name == nullptr) name = "unknown error";
  throw Error(ErrorCode::device, std::string("cuda: ") + call +
                                     (bytes != 0 ? " of " + format_bytes(bytes) : "") +
                                     " failed: " + name);
}

}  // namespace pgk
