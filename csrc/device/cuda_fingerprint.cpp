#include "device/cuda_fingerprint.h"

#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <random>
#include <type_traits>

#include "core/error.h"

namespace pgk {
namespace {

constexpr unsigned kThreads = 512;
constexpr unsigned kBlocksPerProcessor = 2;  // with four loads in flight each: 64 KiB a processor
constexpr std::size_t kVector = 16;

// The sums are zero whenever no kernel runs: the last block to finish takes them. There are two
// sets of them, so that two kernels can run at once.
constexpr const char* kSource = R"(
typedef unsigned long long u64;

struct Sum {
  u64 low, high;
  __device__ void add(u64 other_low, u64 other_high) {
    low += other_low;
    high += other_high + (low < other_low);
  }
};

__device__ Sum totals[2];
__device__ unsigned blocks_done[2];

__device__ __forceinline__ u64 key(u64 x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

__device__ __forceinline__ void add_pair(Sum& sum, ulonglong2 pair, u64 i, u64 seed_a, u64 seed_b) {
  const u64 position = i * 0x9e3779b97f4a7c15ull;
  const u64 x = pair.x + key(seed_a + position);
  const u64 y = pair.y + key(seed_b + position);
  sum.add(x * y, __umul64hi(x, y));
}

__device__ __forceinline__ void add_warp(Sum& sum) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const u64 low = __shfl_down_sync(0xffffffffu, sum.low, distance);
    const u64 high = __shfl_down_sync(0xffffffffu, sum.high, distance);
    sum.add(low, high);
  }
}

extern "C" __global__ void fingerprint(const ulonglong2* __restrict__ pairs, u64 count, u64 seed_a,
                                       u64 seed_b, u64* result, volatile unsigned* flag,
                                       unsigned number, unsigned set) {
  constexpr int kUnroll = 4;
  const u64 stride = (u64)gridDim.x * blockDim.x;
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  Sum sum = {0, 0};
  for (; i + (kUnroll - 1) * stride < count; i += kUnroll * stride) {
    ulonglong2 loaded[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) loaded[k] = pairs[i + k * stride];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) add_pair(sum, loaded[k], i + k * stride, seed_a, seed_b);
  }
  for (; i < count; i += stride) add_pair(sum, pairs[i], i, seed_a, seed_b);

  __shared__ Sum of_warps[32];
  add_warp(sum);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const Sum none = {0, 0};
  sum = threadIdx.x < blockDim.x / 32 ? of_warps[threadIdx.x] : none;
  add_warp(sum);
  if (threadIdx.x != 0) return;

  Sum& total = totals[set];
  const u64 before = atomicAdd(&total.low, sum.low);
  atomicAdd(&total.high, sum.high + (before + sum.low < before));
  __threadfence();
  if (atomicAdd(&blocks_done[set], 1u) != gridDim.x - 1) return;
  __threadfence();
  result[0] = atomicExch(&total.low, 0ull);
  result[1] = atomicExch(&total.high, 0ull);
  blocks_done[set] = 0;
  __threadfence_system();
  if (flag != nullptr) *flag = number;
}
)";

// NVRTC's interface, as far as it is used; unchanged since CUDA 11.1.
struct Nvrtc {
  using Program = struct Opaque*;

  int (*create)(Program*, const char* source, const char* name, int headers, const char* const*,
                const char* const*) = nullptr;
  int (*destroy)(Program*) = nullptr;
  int (*compile)(Program, int options, const char* const*) = nullptr;
  int (*code_size)(Program, std::size_t*) = nullptr;
  int (*code)(Program, char*) = nullptr;

  bool load(void* library) {
    const auto find = [library](const char* name, auto& function) {
      function =
          reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, name));
      return function != nullptr;
    };
    return find("nvrtcCreateProgram", create) && find("nvrtcDestroyProgram", destroy) &&
           find("nvrtcCompileProgram", compile) && find("nvrtcGetCUBINSize", code_size) &&
           find("nvrtcGetCUBIN", code);
  }
};

constexpr std::array kVersions{"13", "12"};

// Where the CUDA runtime lies that torch has loaded: NVRTC is beside it, in wheels as in a toolkit.
std::string runtime_folder(const std::string& version) {
  void* runtime = ::dlopen(("libcudart.so." + version).c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (runtime == nullptr) return {};
  Dl_info info{};
  const bool found = ::dladdr(::dlsym(runtime, "cudaRuntimeGetVersion"), &info) != 0;
  ::dlclose(runtime);
  const std::string path = found && info.dli_fname != nullptr ? info.dli_fname : "";
  return path.substr(0, path.rfind('/') + 1);
}

// Stays loaded: torch may use it as well.
void* open_nvrtc() {
  const auto open = [](const std::string& name, int flags) {
    return ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | flags);
  };
  for (const std::string version : kVersions) {
    if (void* loaded = open("libnvrtc.so." + version, RTLD_NOLOAD)) return loaded;
  }
  for (const std::string version : kVersions) {
    const std::string folder = runtime_folder(version);
    if (folder.empty()) continue;
    // One folder for all since CUDA 13's wheels, one for each library before.
    for (const char* beside : {"", "../../cuda_nvrtc/lib/"}) {
      if (void* library = open(folder + beside + "libnvrtc.so." + version, 0)) return library;
    }
  }
  for (const std::string version : kVersions) {
    if (void* library = open("libnvrtc.so." + version, 0)) return library;
  }
  return nullptr;
}

// Machine code, which unlike PTX does not depend on what the driver's compiler knows. Empty if it
// cannot be had.
std::string compile(int major, int minor) {
  Nvrtc nvrtc;
  void* library = open_nvrtc();
  if (library == nullptr || !nvrtc.load(library)) return {};
  Nvrtc::Program program = nullptr;
  if (nvrtc.create(&program, kSource, "fingerprint.cu", 0, nullptr, nullptr) != 0) return {};
  const std::string target =
      "--gpu-architecture=sm_" + std::to_string(major) + std::to_string(minor);
  const std::array options{target.c_str()};
  std::string code;
  std::size_t size = 0;
  if (nvrtc.compile(program, options.size(), options.data()) == 0 &&
      nvrtc.code_size(program, &size) == 0) {
    code.resize(size);
    if (nvrtc.code(program, code.data()) != 0) code.clear();
  }
  nvrtc.destroy(&program);
  return code;
}

struct Seeds {
  std::uint64_t a = random();
  std::uint64_t b = random();

  static const Seeds& get() {
    static const Seeds seeds;
    return seeds;
  }

 private:
  static std::uint64_t random() {
    std::random_device device;
    return std::uint64_t{device()} << 32 | device();
  }
};

// Who computes sums, each in a set of its own.
enum class Set : unsigned { plain, telling };

// What the kernel is called with, in the form that the driver takes.
class Arguments {
 public:
  Arguments(Address address, std::size_t bytes, CUdeviceptr result, CUdeviceptr flag,
            std::uint32_t number, Set set)
      : pairs_(address),
        count_(bytes / kVector),
        result_(result),
        flag_(flag),
        number_(number),
        set_(set) {}
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

  void** data() { return pointers_.data(); }

 private:
  CUdeviceptr pairs_;
  std::uint64_t count_;
  Seeds seeds_ = Seeds::get();
  CUdeviceptr result_;
  CUdeviceptr flag_;
  std::uint32_t number_;
  Set set_;
  std::array<void*, 8> pointers_{&pairs_,  &count_, &seeds_.a, &seeds_.b,
                                 &result_, &flag_,  &number_,  &set_};
};

}  // namespace

CudaFingerprint::CudaFingerprint(const CudaDriver& driver, CUdevice ordinal, CUstream stream,
                                 CUdeviceptr scratch)
    : driver_(driver) {
  const auto attribute = [&](CUdevice_attribute which) {
    int value = 0;
    driver_.check(driver_.cuDeviceGetAttribute_fn(&value, which, ordinal), "cuDeviceGetAttribute");
    return value;
  };
  blocks_ = kBlocksPerProcessor *
            static_cast<unsigned>(attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT));
  if (!load(compile(attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
                    attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)))) {
    return;
  }
  // The driver loads a kernel when it first runs, which must not be while a stream is held.
  Arguments nothing(0, 0, scratch, 0, 0, Set::plain);
  CUresult result = launch(stream, nothing.data());
  if (result == CUDA_SUCCESS) result = driver_.cuStreamSynchronize_fn(stream);
  if (result != CUDA_SUCCESS) kernel_ = nullptr;
}

CudaFingerprint::~CudaFingerprint() {
  if (module_ != nullptr) driver_.cuModuleUnload_fn(module_);
}

bool CudaFingerprint::load(const std::string& code) {
  if (code.empty() || driver_.cuModuleLoadData_fn(&module_, code.data()) != CUDA_SUCCESS) {
    return false;
  }
  return driver_.cuModuleGetFunction_fn(&kernel_, module_, "fingerprint") == CUDA_SUCCESS;
}

CUresult CudaFingerprint::launch(CUstream stream, void** arguments) const {
  return driver_.cuLaunchKernel_fn(kernel_, blocks_, 1, 1, kThreads, 1, 1, 0, stream, arguments,
                                   nullptr);
}

void CudaFingerprint::launch(CUstream stream, Address address, std::size_t bytes,
                             CUdeviceptr result) const {
  Arguments arguments(address, bytes, result, 0, 0, Set::plain);
  driver_.check(launch(stream, arguments.data()), "move (fingerprint)", bytes);
}

void CudaFingerprint::launch_and_tell(CUstream stream, Address address, std::size_t bytes,
                                      CUdeviceptr result, CUdeviceptr flag,
                                      std::uint32_t number) const {
  Arguments arguments(address, bytes, result, flag, number, Set::telling);
  driver_.check(launch(stream, arguments.data()), "move (fingerprint)", bytes);
}

}  // namespace pgk
