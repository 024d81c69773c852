// Memory of GPUs that other processes can map, and launches of kernels, for torch_backend.cpp.
//
// It calls the driver's library, which is opened at the first use, and uses no headers of CUDA. The memory has the
// properties of backends/native.py, so that Python can export it and peers can map it in the same way.
//
// Nothing here runs Python or takes the GIL. The calls do not join a stream capture of the program: memory is made, set
// and copied on a separate stream, and memory that is freed during a capture is kept until a later call.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

// The text of the last error of this thread: "symmem: ", the name of a class of symmem.errors, ": ", and what happened.
inline std::string& failure() {
  static thread_local std::string text;
  return text;
}

// Raise torch's error with that text.
[[noreturn]] inline void raise() { TORCH_CHECK(false, failure()); }

// Raise torch's error of a class. The text is not made by the arguments of TORCH_CHECK: they become text in a stream of
// which a part is torch's, and with torch 2.11 and g++ 13, a number in it crashes.
template <typename Part>
std::string as_text(const Part& part) {
  if constexpr (std::is_convertible_v<Part, std::string>)
    return part;
  else
    return std::to_string(part);
}
template <typename... Parts>
[[noreturn]] void fail(const char* error, const Parts&... parts) {
  failure() = std::string("symmem: ") + error + ": ";
  (failure().append(as_text(parts)), ...);
  raise();
}

namespace cuda {

using Word = unsigned long long;  // CUdeviceptr, CUmemGenericAllocationHandle

// CUmemLocation, CUmemAllocationProp and CUmemAccessDesc.
struct Location {
  int type = 1;  // a device
  int ordinal;
};
struct Properties {
  int type = 1;  // pinned
  int handles;
  Location location;
  void* windows = nullptr;
  unsigned char flags[8] = {};
};
struct Access {
  Location location;
  int flags = 3;  // read and write
};

constexpr int DESCRIPTOR = 1, FABRIC = 8;  // CU_MEM_HANDLE_TYPE_*
constexpr int FABRIC_ATTRIBUTE = 128, RECOMMENDED = 1, RELAXED = 2, NON_BLOCKING = 1;
constexpr int OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, FIRST_CAPTURE_ERROR = 900, LAST_CAPTURE_ERROR = 908;

#define SYMMEM_DRIVER(F)                                                                                        \
  F(cuInit, "cuInit", unsigned)                                                                                 \
  F(cuGetErrorName, "cuGetErrorName", int, const char**)                                                        \
  F(cuGetErrorString, "cuGetErrorString", int, const char**)                                                    \
  F(cuDeviceGet, "cuDeviceGet", int*, int)                                                                      \
  F(cuDeviceGetAttribute, "cuDeviceGetAttribute", int*, int, int)                                               \
  F(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", void**, int)                                          \
  F(cuCtxPushCurrent, "cuCtxPushCurrent_v2", void*)                                                             \
  F(cuCtxPopCurrent, "cuCtxPopCurrent_v2", void**)                                                              \
  F(cuCtxSetCurrent, "cuCtxSetCurrent", void*)                                                                  \
  F(cuCtxSynchronize, "cuCtxSynchronize", void)                                                                 \
  F(cuThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode", int*)                               \
  F(cuStreamCreate, "cuStreamCreate", void**, unsigned)                                                         \
  F(cuStreamSynchronize, "cuStreamSynchronize", void*)                                                          \
  F(cuStreamIsCapturing, "cuStreamIsCapturing", void*, int*)                                                    \
  F(cuMemGetAllocationGranularity, "cuMemGetAllocationGranularity", size_t*, const Properties*, int)            \
  F(cuMemCreate, "cuMemCreate", Word*, size_t, const Properties*, Word)                                         \
  F(cuMemRelease, "cuMemRelease", Word)                                                                         \
  F(cuMemExportToShareableHandle, "cuMemExportToShareableHandle", void*, Word, int, Word)                       \
  F(cuMemImportFromShareableHandle, "cuMemImportFromShareableHandle", Word*, void*, int)                        \
  F(cuMemAddressReserve, "cuMemAddressReserve", Word*, size_t, size_t, Word, Word)                              \
  F(cuMemAddressFree, "cuMemAddressFree", Word, size_t)                                                         \
  F(cuMemMap, "cuMemMap", Word, size_t, size_t, Word, Word)                                                     \
  F(cuMemUnmap, "cuMemUnmap", Word, size_t)                                                                     \
  F(cuMemSetAccess, "cuMemSetAccess", Word, size_t, const Access*, size_t)                                      \
  F(cuMemAlloc, "cuMemAlloc_v2", Word*, size_t)                                                                 \
  F(cuMemsetD8Async, "cuMemsetD8Async", Word, unsigned char, size_t, void*)                                     \
  F(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", Word, const void*, size_t, void*)                                \
  F(cuLaunchKernel, "cuLaunchKernel", void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, \
    void*, void**, void**)

// The functions of the driver's library.
struct Driver {
#define F(name, symbol, ...) int (*name)(__VA_ARGS__) = nullptr;
  SYMMEM_DRIVER(F)
#undef F

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library)
      fail(
          "BackendUnavailableError", "the NVIDIA driver library cannot be loaded: ", dlerror(),
          ". Install the NVIDIA driver, and start a container with its GPUs (docker: --gpus all).");
#define F(name, symbol, ...)                                       \
  name = reinterpret_cast<decltype(name)>(dlsym(library, symbol)); \
  if (!name) fail("BackendUnavailableError", "the NVIDIA driver has no ", symbol, ". Install a newer driver.");
    SYMMEM_DRIVER(F)
#undef F
    check(cuInit(0), "cuInit");
  }

  // The name and the text of a result.
  std::string text(int code) const {
    const char *name = "unknown", *text = "unknown";
    cuGetErrorName(code, &name);
    cuGetErrorString(code, &text);
    return std::string(name ? name : "unknown") + " (" + (text ? text : "unknown") + ")";
  }

  void check(int code, const char* call) const {
    if (code) fail("SymmemError", call, ": ", text(code), ". Look in `dmesg` for Xid errors of the driver.");
  }
};

inline const Driver& driver() {
  static auto* made = new Driver;  // never destroyed: memory may be freed while the process exits
  return *made;
}

inline c10::impl::VirtualGuardImpl guard() { return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA); }

// The current stream of torch.
inline void* current_stream(int ordinal) {
  const auto torch = guard();
  return torch.getStreamNativeHandle(torch.getStream(c10::Device(c10::DeviceType::CUDA, ordinal)));
}

// A GPU, its primary context (torch's too), and a stream that is not ordered with the streams of the program.
struct Gpu {
  int ordinal, number = 0;
  void *context = nullptr, *stream = nullptr;
  bool fabric = false;  // memory can be exported to other hosts
  size_t granularity = 0;
  std::mutex mutex;
  std::map<std::vector<Word>, std::shared_ptr<Word>> arrays;  // see `array`
  std::map<size_t, std::vector<Word>> spare;                  // addresses of free arrays, by bytes
  size_t most_arrays = 4096;

  explicit Gpu(int ordinal);

  Properties properties() const {
    Properties made;
    made.handles = fabric ? DESCRIPTOR | FABRIC : DESCRIPTOR;
    made.location.ordinal = ordinal;
    return made;
  }

  uint64_t round_up(uint64_t nbytes) const { return (nbytes + granularity - 1) / granularity * granularity; }
};

// The context of a GPU is current in this thread, and calls that would be unsafe in a stream capture are allowed.
class On {
 public:
  explicit On(const Gpu& gpu) {
    driver().check(driver().cuCtxPushCurrent(gpu.context), "cuCtxPushCurrent");
    driver().cuThreadExchangeStreamCaptureMode(&mode_);
  }
  ~On() {
    driver().cuThreadExchangeStreamCaptureMode(&mode_);
    void* context;
    driver().cuCtxPopCurrent(&context);
  }
  On(const On&) = delete;

 private:
  int mode_ = RELAXED;
};

// Whether memory can be exported as a fabric handle. It tries: the attribute of the device may be wrong.
inline bool has_fabric(const Gpu& gpu) {
  const auto& cu = driver();
  int advertised = 0;
  cu.check(cu.cuDeviceGetAttribute(&advertised, FABRIC_ATTRIBUTE, gpu.number), "cuDeviceGetAttribute");
  Properties kind = gpu.properties();
  kind.handles = DESCRIPTOR | FABRIC;
  size_t nbytes = 0;
  Word made = 0, imported = 0;
  unsigned char exported[64];
  if (!advertised || cu.cuMemGetAllocationGranularity(&nbytes, &kind, RECOMMENDED) ||
      cu.cuMemCreate(&made, nbytes, &kind, 0))
    return false;
  const bool works = !cu.cuMemExportToShareableHandle(exported, made, FABRIC, 0) &&
      !cu.cuMemImportFromShareableHandle(&imported, exported, FABRIC);
  if (imported) cu.cuMemRelease(imported);
  cu.cuMemRelease(made);
  return works;
}

inline Gpu::Gpu(int ordinal) : ordinal(ordinal) {
  const auto& cu = driver();
  cu.check(cu.cuDeviceGet(&number, ordinal), "cuDeviceGet");
  cu.check(cu.cuDevicePrimaryCtxRetain(&context, number), "cuDevicePrimaryCtxRetain");
  const On on(*this);
  cu.check(cu.cuStreamCreate(&stream, NON_BLOCKING), "cuStreamCreate");
  fabric = has_fabric(*this);
  const Properties kind = properties();
  cu.check(cu.cuMemGetAllocationGranularity(&granularity, &kind, RECOMMENDED), "cuMemGetAllocationGranularity");
}

// A GPU by torch's number, or torch's current one for -1.
inline Gpu& gpu(int ordinal) {
  static std::mutex mutex;
  static auto* known = new std::map<int, std::unique_ptr<Gpu>>;
  if (ordinal < 0) ordinal = guard().getDevice().index();
  std::lock_guard lock(mutex);
  auto& found = (*known)[ordinal];
  if (!found) found = std::make_unique<Gpu>(ordinal);
  return *found;
}

// Wait until a GPU has done all work of this process; false if a stream capture forbids it. A GPU that has failed does
// no more work. The caller is within On.
inline bool quiesce(const Gpu& gpu) {
  const auto forbidden = [](int code) { return code >= FIRST_CAPTURE_ERROR && code <= LAST_CAPTURE_ERROR; };
  int capturing = 0;
  const int code = driver().cuStreamIsCapturing(current_stream(gpu.ordinal), &capturing);
  if (capturing || forbidden(code)) return false;  // the next call would end the capture
  return !forbidden(driver().cuCtxSynchronize());
}

// Physical memory and its mapping. The driver does not wait at an unmapping for kernels that use the memory.
struct Mapped {
  Gpu* gpu;
  Word handle = 0, address = 0;
  uint64_t extent = 0;
  bool mapped = false;

  // Unmap and free it; false if that must wait for the end of a stream capture. A failed device refuses, and its memory
  // is gone.
  bool release() const {
    const auto& cu = driver();
    const On on(*gpu);
    if (mapped && !quiesce(*gpu)) return false;
    if (mapped) cu.cuMemUnmap(address, extent);
    if (address) cu.cuMemAddressFree(address, extent);
    if (handle) cu.cuMemRelease(handle);
    return true;
  }
};

// Memory that lost its last reference during a stream capture.
struct Pending {
  std::mutex mutex;
  std::vector<Mapped> all;
};

inline Pending& pending() {
  static auto* made = new Pending;
  return *made;
}

inline void give_back(const Mapped& memory) noexcept {
  const std::string before = failure();
  try {
    if (memory.release()) return;
    std::lock_guard lock(pending().mutex);
    pending().all.push_back(memory);
  } catch (const c10::Error&) {  // the context is gone, and its memory with it
    failure() = before;
  }
}

inline void free_pending() {
  std::vector<Mapped> all;
  {
    std::lock_guard lock(pending().mutex);
    all.swap(pending().all);
  }
  for (const auto& memory : all) give_back(memory);
}

// New memory of `extent` bytes, a multiple of the granularity. It is zero, as PyTorch's is: programs rely on that.
inline Mapped make(Gpu& gpu, uint64_t extent) {
  const auto& cu = driver();
  free_pending();
  const On on(gpu);
  Mapped made{&gpu};
  made.extent = extent;
  const char* call = "cuMemCreate";
  const Properties kind = gpu.properties();
  Access access;
  access.location.ordinal = gpu.ordinal;
  int code = cu.cuMemCreate(&made.handle, extent, &kind, 0);
  const auto next = [&](const char* name, auto function) {
    if (code) return;
    call = name;
    code = function();
  };
  next("cuMemAddressReserve", [&] { return cu.cuMemAddressReserve(&made.address, extent, gpu.granularity, 0, 0); });
  next("cuMemMap", [&] { return cu.cuMemMap(made.address, extent, 0, made.handle, 0); });
  made.mapped = !code;
  next("cuMemSetAccess", [&] { return cu.cuMemSetAccess(made.address, extent, &access, 1); });
  next("cuMemsetD8Async", [&] { return cu.cuMemsetD8Async(made.address, 0, extent, gpu.stream); });
  next("cuStreamSynchronize", [&] { return cu.cuStreamSynchronize(gpu.stream); });
  if (code) {
    give_back(made);
    const bool full = code == OUT_OF_MEMORY;
    fail(
        full ? "OutOfMemoryError" : "ResourceLimitError", "cannot allocate ", extent, " bytes on cuda:", gpu.ordinal,
        ": ", call, ": ", cu.text(code), ". ",
        full ? "Free tensors, or let torch release its unused cache: torch.cuda.empty_cache()."
             : "Look in `dmesg` for Xid errors, and check the limit on open files (`ulimit -n`).");
  }
  return made;
}

// An array of a GPU with these words, which never changes. Equal words share an array, so a handle that is made again
// and again costs nothing. An array that no handle uses is reused only after the GPU has done all work.
inline std::shared_ptr<Word> array(Gpu& gpu, const std::vector<Word>& words) {
  const auto& cu = driver();
  std::lock_guard lock(gpu.mutex);
  if (auto found = gpu.arrays.find(words); found != gpu.arrays.end()) return found->second;
  const On on(gpu);
  if (gpu.arrays.size() >= gpu.most_arrays && quiesce(gpu)) {
    for (auto each = gpu.arrays.begin(); each != gpu.arrays.end();) {
      if (each->second.use_count() > 1) {
        ++each;
        continue;
      }
      gpu.spare[each->first.size()].push_back(*each->second);
      each = gpu.arrays.erase(each);
    }
    gpu.most_arrays = std::max<size_t>(4096, 2 * gpu.arrays.size());
  }
  auto& spare = gpu.spare[words.size()];
  if (spare.empty()) {
    const size_t nbytes = (words.size() * sizeof(Word) + 255) / 256 * 256, count = 64;
    Word first = 0;
    cu.check(cu.cuMemAlloc(&first, count * nbytes), "cuMemAlloc");
    for (size_t i = count; i--;) spare.push_back(first + i * nbytes);
  }
  const Word address = spare.back();
  cu.check(cu.cuMemcpyHtoDAsync(address, words.data(), words.size() * sizeof(Word), gpu.stream), "cuMemcpyHtoDAsync");
  cu.check(cu.cuStreamSynchronize(gpu.stream), "cuStreamSynchronize");
  spare.pop_back();
  return gpu.arrays[words] = std::make_shared<Word>(address);
}

// Launch one block of a kernel with one argument on torch's current stream.
inline void launch(const Gpu& gpu, void* function, unsigned threads, void* argument) {
  const auto& cu = driver();
  const c10::DeviceGuard on(c10::Device(c10::DeviceType::CUDA, gpu.ordinal));
  void* arguments[] = {argument};
  void* stream = current_stream(gpu.ordinal);
  int code = cu.cuLaunchKernel(function, 1, 1, 1, threads, 1, 1, 0, stream, arguments, nullptr);
  if (code == INVALID_CONTEXT) {  // this thread has not used CUDA yet
    cu.check(cu.cuCtxSetCurrent(gpu.context), "cuCtxSetCurrent");
    code = cu.cuLaunchKernel(function, 1, 1, 1, threads, 1, 1, 0, stream, arguments, nullptr);
  }
  cu.check(code, "the kernel of a signal cannot be launched: cuLaunchKernel");
}

}  // namespace cuda
