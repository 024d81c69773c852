// Symmetric memory for torch.distributed._symmetric_memory: an allocator, and the handles of its rendezvous.
//
// symmem/native compiles this file for the installed torch and loads it with ctypes. symmem/torch_backend/bridge.py calls
// the functions at the end. It uses neither Python's headers nor pybind11.
//
// alloc and free run no Python: torch calls them with the GIL or its own locks held, and a thread that waits for the
// GIL there would wait forever. So they make and free memory here: memory files for the CPU, and the driver's memory
// for CUDA (cuda_memory.h). The first rendezvous of a block and group calls Python, where the ranks meet; every later
// one is answered from the table below. The table's mutex is never held during a call of Python, of torch, or of a
// destructor of a handle.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/symm_mem/SymmetricMemory.hpp>

#include "cuda_memory.h"

namespace {

namespace sm = c10d::symmetric_memory;
using Address = uint64_t;

// Memory and its mapping: a memory file, or memory of a GPU. The pad of torch's signals begins at `pad`, behind the
// data.
struct Memory {
  Address address = 0;
  uint64_t nbytes = 0, extent = 0, pad = 0, pad_nbytes = 0;
  int descriptor = -1;
  cuda::Mapped on_gpu{};  // its `gpu` is null for a memory file
  pid_t process = getpid();
  std::optional<std::string> group;

  // A pad behind `size` bytes, each rounded up to `unit`.
  Memory(uint64_t size, uint64_t unit, const std::optional<std::string>& group)
      : nbytes(size), pad(round_up(std::max<uint64_t>(size, 1), unit)), pad_nbytes(sm::get_signal_pad_size()),
        group(group) {
    extent = pad + round_up(pad_nbytes, unit);
  }
  ~Memory();

  static uint64_t round_up(uint64_t nbytes, uint64_t unit) { return (nbytes + unit - 1) / unit * unit; }
};
using Owner = std::shared_ptr<Memory>;

// What the kernels of signals need; see symmem/backends/signal_kernels.py.
struct Signals {
  void* kernels[3];                      // barrier, put, wait
  uint64_t status;                       // address for kernels
  const volatile uint32_t *stopped, *given_up;  // not 0 after a failure
  uint64_t timeout;                      // nanoseconds, if the caller gives none
  uint64_t group;
};
constexpr int LARGEST_WORLD = 480;  // 8 bytes per rank in 4 KiB of arguments

constexpr int NOT_SYMMETRIC = 2;

// The functions of symmem/torch_backend. Those that return int return 0, or 1 after they have called symmem_fail.
// `rendezvous` returns NOT_SYMMETRIC for memory that Python does not know either.
struct Python {
  int (*rendezvous)(void* result, Address address, void* owner, const char* group);
  int (*signal)(int64_t token, int kind, int peer, int channel, uint64_t timeout_ms);  // on the CPU
  int (*check)(int64_t token);                         // whether signals on the GPU can still be used
  int (*holds)(Address address);
  int (*drop)(void*);                                  // drops the tokens that symmem_dropped returns
  int (*add_pending_call)(int (*)(void*), void*);      // Py_AddPendingCall: needs no GIL
  const char* memory_limits;                           // files with limits of control groups, one a line
};

struct State;
State& state();

struct Handle : sm::SymmetricMemory {
  Owner memory;  // null for memory of symmem.allocate, which the token keeps
  int64_t token = 0;
  std::pair<Address, std::string> place;  // where the program made it: address and group
  int rank = 0, world = 0;
  uint64_t nbytes = 0, offset = 0, pad_nbytes = 0;
  std::vector<void*> buffers, pads;
  std::vector<int> global_ranks;
  cuda::Gpu* gpu = nullptr;  // null for memory of the CPU
  Signals signals{};
  std::optional<c10::weak_intrusive_ptr<c10d::ProcessGroup>> process_group;

  ~Handle() override { drop(); }
  void release_resources() override { drop(); }  // called before the destructor if a weak reference remains

  std::vector<void*> get_buffer_ptrs() override { return buffers; }
  void** get_buffer_ptrs_dev() override { return gpu ? array() : buffers.data(); }
  std::vector<void*> get_signal_pad_ptrs() override { return checked_pads(); }
  void** get_signal_pad_ptrs_dev() override {
    auto& checked = checked_pads();
    return gpu ? array() + world : checked.data();
  }
  size_t get_buffer_size() override { return nbytes; }
  size_t get_offset() override { return offset; }
  bool has_multicast_support() override { return false; }
  void* get_multicast_ptr() override { return nullptr; }
  int get_rank() override { return rank; }
  int get_world_size() override { return world; }
  c10::Device get_device() override {
    return gpu ? c10::Device(c10::DeviceType::CUDA, gpu->ordinal) : c10::Device(c10::DeviceType::CPU);
  }
  const std::vector<int>& get_rank_to_global_rank() override { return global_ranks; }
  int* get_rank_to_global_rank_dev() override {
    return gpu ? reinterpret_cast<int*>(array() + 2 * world) : global_ranks.data();
  }
  bool world_within_direct_access() override { return true; }

  void barrier(int channel, size_t timeout_ms) override { signal(0, 0, channel, timeout_ms); }
  void put_signal(int peer, int channel, size_t timeout_ms) override { signal(1, peer, channel, timeout_ms); }
  void wait_signal(int peer, int channel, size_t timeout_ms) override { signal(2, peer, channel, timeout_ms); }

 private:
  std::once_flag array_made_;
  std::shared_ptr<cuda::Word> array_;

  void drop();
  void signal(int kind, int peer, int channel, uint64_t timeout_ms);
  void launch(int kind, int peer, int channel, uint64_t timeout_ms);

  // On the GPU: the address of every rank's memory, of every rank's pad, and the global ranks. It is made at the first
  // use, which may be in a stream capture, and stays where it is.
  void** array() {
    std::call_once(array_made_, [&] {
      std::vector<cuda::Word> words;
      for (auto* pointers : {&buffers, &pads})
        for (void* pointer : *pointers) words.push_back(reinterpret_cast<cuda::Word>(pointer));
      words.resize(2 * world + (world + 1) / 2);
      std::copy(global_ranks.begin(), global_ranks.end(), reinterpret_cast<int*>(&words[2 * world]));
      array_ = cuda::array(*gpu, words);
    });
    return reinterpret_cast<void**>(*array_);
  }

  std::vector<void*>& checked_pads() {
    if (pad_nbytes < sm::get_signal_pad_size())
      fail(
          "UnsupportedError", "this memory has a signal pad of ", pad_nbytes, " bytes, and torch now expects ",
          sm::get_signal_pad_size(),
          ". Allocate with torch's empty, after set_signal_pad_size. Tensors of symmem.allocate have such pads if "
          "symmem.torch_backend.enable() is called before the first tensor on CUDA, and the size is the default.");
    return pads;
  }
};
using HandlePtr = c10::intrusive_ptr<Handle>;

struct Entry {
  Owner memory;
  std::map<std::pair<std::string, uint64_t>, HandlePtr> handles;  // by group and offset
};

// It is never destroyed: tensors may be freed while the process exits.
struct State {
  std::mutex mutex;
  std::map<Address, Entry> blocks;
  // Handles of memory of symmem.allocate, by address and group, as long as the program keeps them.
  std::map<std::pair<Address, std::string>, c10::weak_intrusive_ptr<Handle>> others;
  std::vector<int64_t> dropped;
  Python python{};
  std::vector<std::string> memory_limits;
  pid_t process = getpid();
  bool exiting = false;

  // Refuse a forked child, which is not a rank and lacks the thread that may have held the mutex at the fork.
  void check(const char* operation) {
    if (process != getpid())
      fail(
          "ForkedError", operation,
          ": this process was forked after symmem.torch_backend.enable(); the child is not a rank. "
          "Start the child with the method spawn, and enable the backend there.");
  }

  void check_python(const char* operation) {
    check(operation);
    if (exiting) fail("ClosedError", operation, ": the interpreter is shutting down");
  }

  // Whether memory of torch or of symmem holds an address.
  bool holds(Address address) {
    {
      std::lock_guard lock(mutex);
      if (find(address) != blocks.end()) return true;
    }
    return !exiting && python.holds(address);
  }

  // The block that holds an address. The caller holds the mutex.
  std::map<Address, Entry>::iterator find(Address address) {
    auto next = blocks.upper_bound(address);
    if (next == blocks.begin()) return blocks.end();
    --next;
    auto& memory = *next->second.memory;
    return address < memory.address + std::max<uint64_t>(memory.nbytes, 1) ? next : blocks.end();
  }
};

State& state() {
  static auto* made = new State;
  return *made;
}

Memory::~Memory() {
  if (process != getpid() || state().exiting) return;  // a fork shares the memory with its parent
  if (on_gpu.gpu) {
    cuda::give_back(on_gpu);
    return;
  }
  if (address) munmap(reinterpret_cast<void*>(address), extent);
  if (descriptor >= 0) close(descriptor);
}

void Handle::drop() {
  auto& all = state();
  if (!token || all.process != getpid() || all.exiting) return;
  decltype(all.others)::node_type own;  // destroyed after the mutex
  {
    std::lock_guard lock(all.mutex);
    all.dropped.push_back(std::exchange(token, 0));
    if (auto found = all.others.find(place); found != all.others.end() && found->second.expired())
      own = all.others.extract(found);
  }
  memory.reset();
  array_.reset();
  // If the queue of the interpreter is full, the next rendezvous or the next dropped handle drops this one too.
  all.python.add_pending_call(all.python.drop, nullptr);
}

void Handle::signal(int kind, int peer, int channel, uint64_t timeout_ms) {
  auto& all = state();
  all.check_python("signal");
  if (gpu) return launch(kind, peer, channel, timeout_ms);
  if (all.python.signal(token, kind, peer, channel, timeout_ms)) raise();
}

// PyTorch's protocol on PyTorch's pads: word `channel * world + source` is 1 while a signal has not been taken.
void Handle::launch(int kind, int peer, int channel, uint64_t timeout_ms) {
  auto& all = state();
  checked_pads();
  const int64_t channels = pad_nbytes / (4 * world);
  if (channel < 0 || channel >= channels)
    fail(
        "InvalidArgumentError", "channel ", channel, " is not within 0 to ", channels - 1, ": the signal pad has ",
        pad_nbytes, " bytes for ", world, " ranks");
  if (peer < 0 || peer >= world)
    fail("RankError", "rank ", peer, " is not within 0 to ", world - 1, " of the group (this is rank ", rank, ")");
  if (world > LARGEST_WORLD || std::find(pads.begin(), pads.end(), nullptr) != pads.end())
    fail(
        "UnsupportedError", "no signals on rank ", rank, ": the group has more than ", LARGEST_WORLD,
        " ranks, or ranks that are not load/store reachable from here. Use a group of ranks that reach each other.");
  if ((*signals.stopped || *signals.given_up) && all.python.check(token)) raise();
  struct {  // `struct Call` of the kernels behind the pads
    uint64_t status, limit;
    uint32_t channel, rank, peer, group, strict;
  } rest{
      signals.status, timeout_ms ? timeout_ms * 1000000 : signals.timeout, uint32_t(channel), uint32_t(rank),
      uint32_t(peer), uint32_t(signals.group), timeout_ms != 0};
  std::vector<char> call(world * sizeof(void*) + sizeof(rest));
  std::memcpy(call.data(), pads.data(), world * sizeof(void*));
  std::memcpy(call.data() + world * sizeof(void*), &rest, sizeof(rest));
  cuda::launch(*gpu, signals.kernels[kind], kind ? 1 : (world + 31) / 32 * 32, call.data());
}

// The number in the first line of a file that fits a format of scanf, if there is one.
std::optional<uint64_t> number_in(const std::string& path, const char* format) {
  std::optional<uint64_t> found;
  if (FILE* file = std::fopen(path.c_str(), "re")) {
    char line[256];
    unsigned long number;
    while (!found && std::fgets(line, sizeof line, file))
      if (std::sscanf(line, format, &number) == 1) found = number;
    std::fclose(file);
  }
  return found;
}

// As available_memory in backends/libc.py, which finds the files with the limits.
uint64_t available_memory() {
  uint64_t available = number_in("/proc/meminfo", "MemAvailable: %lu").value_or(UINT64_MAX / 1024) * 1024;
  for (const auto& limit : state().memory_limits) {
    const auto most = number_in(limit, "%lu");
    const auto used = number_in(limit.substr(0, limit.rfind('/')) + "/memory.current", "%lu");
    if (most && used) available = std::min(available, *most - std::min(*most, *used));
  }
  return available;
}

struct Allocator : sm::SymmetricMemoryAllocator {
  void* alloc(size_t size, int, const std::optional<std::string>& group) override {
    auto& all = state();
    all.check("allocation");
    const uint64_t page = sysconf(_SC_PAGESIZE), available = available_memory();
    if (size > available)
      fail(
          "OutOfMemoryError", size, " bytes of shared memory were asked for, ", available,
          " are available. Free memory, allocate less, or raise the container's memory limit.");
    auto memory = std::make_shared<Memory>(size, page, group);
    memory->descriptor = memfd_create("symmem", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    const bool made = memory->descriptor >= 0 && ftruncate(memory->descriptor, memory->extent) == 0 &&
        fcntl(memory->descriptor, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0;
    void* place = !made
        ? MAP_FAILED
        : mmap(nullptr, memory->extent, PROT_READ | PROT_WRITE, MAP_SHARED, memory->descriptor, 0);
    if (place == MAP_FAILED)
      fail(
          "ResourceLimitError", "cannot make and map a memory file of ", memory->extent, " bytes: ",
          std::strerror(errno), ". Hold fewer tensors, or raise `ulimit -n` or /proc/sys/vm/max_map_count.");
    memory->address = reinterpret_cast<Address>(place);
    return keep(memory);
  }

  // No stream of the program is waited for, except that memory of a GPU is unmapped when the GPU has done all work.
  void free(void* pointer) override {
    auto& all = state();
    if (all.process != getpid()) return;
    Entry entry;  // destroyed after the mutex is free
    std::lock_guard lock(all.mutex);
    auto found = all.blocks.find(reinterpret_cast<Address>(pointer));
    if (found == all.blocks.end()) return;
    entry = std::move(found->second);
    all.blocks.erase(found);
  }

  size_t get_alloc_size(void* pointer) override {
    auto& all = state();
    all.check("get_alloc_size");
    std::lock_guard lock(all.mutex);
    auto found = all.find(reinterpret_cast<Address>(pointer));
    if (found == all.blocks.end())
      fail("NotSymmetricError", "no live allocation of torch's symmetric memory holds ", uintptr_t(pointer));
    return found->second.memory->nbytes;
  }

  c10::intrusive_ptr<sm::SymmetricMemory> rendezvous(
      void* pointer, const std::optional<std::string>& group_name) override {
    auto& all = state();
    all.check_python("rendezvous");
    const auto address = reinterpret_cast<Address>(pointer);
    Owner memory;
    HandlePtr known;
    std::string group = group_name.value_or("");
    bool drops;
    {
      std::lock_guard lock(all.mutex);
      drops = !all.dropped.empty();
      if (auto found = all.find(address); found != all.blocks.end()) {
        memory = found->second.memory;
        if (!group_name) group = memory->group.value_or("");
        auto& handles = found->second.handles;
        if (auto cached = handles.find({group, address - memory->address}); cached != handles.end())
          known = cached->second;
      } else if (auto other = all.others.find({address, group}); other != all.others.end()) {
        known = other->second.lock();
      }
    }
    const auto current = process_group(group);
    if (known && known->process_group && known->process_group->lock() == current) return known;
    if (drops) all.python.drop(nullptr);
    auto handle = c10::make_intrusive<Handle>();
    handle->memory = memory;
    handle->place = {address, group};
    Owner* owner = memory ? new Owner(memory) : nullptr;  // Python releases it
    const int outcome = all.python.rendezvous(handle.get(), address, owner, group.c_str());
    if (outcome == NOT_SYMMETRIC) return {};  // None in Python, as torch's backends
    if (outcome) raise();
    // A name may refer to another process group later. A group without one is not cached.
    if (!current) return handle;
    handle->process_group.emplace(current);
    if (memory) {
      HandlePtr kept = handle;  // then the one that it replaces; `known` may be another one by now
      std::lock_guard lock(all.mutex);
      auto found = all.blocks.find(memory->address);
      if (found != all.blocks.end() && found->second.memory == memory)
        std::swap(found->second.handles[{group, address - memory->address}], kept);  // dropped after the mutex
    } else {
      decltype(all.others)::node_type replaced;  // destroyed after the mutex
      std::lock_guard lock(all.mutex);
      replaced = all.others.extract(handle->place);
      all.others.emplace(handle->place, handle);
    }
    return handle;
  }

  bool has_multicast_support(int) override { return false; }
  c10::DeviceType supported_device_type() override { return c10::DeviceType::CPU; }
  std::string name() override { return "SYMMEM"; }

  bool has_allocation(void* pointer) /* virtual since torch 2.13 */ {
    auto& all = state();
    all.check("is_symm_mem_tensor");
    return all.holds(reinterpret_cast<Address>(pointer));
  }

 protected:
  static void* keep(const Owner& memory) {
    auto& all = state();
    std::lock_guard lock(all.mutex);
    all.blocks[memory->address].memory = memory;
    return reinterpret_cast<void*>(memory->address);
  }

 private:
  static c10::intrusive_ptr<c10d::ProcessGroup> process_group(const std::string& name) {
    try {
      return c10d::resolve_process_group(name);
    } catch (const c10::Error&) {
      return {};  // Python knows more groups, and the error for a name that nobody knows
    }
  }
};

struct CudaAllocator : Allocator {
  void* alloc(size_t size, int ordinal, const std::optional<std::string>& group) override {
    state().check("allocation");
    auto& gpu = cuda::gpu(ordinal);
    auto memory = std::make_shared<Memory>(size, 256, group);
    memory->extent = gpu.round_up(memory->extent);
    memory->on_gpu = cuda::make(gpu, memory->extent);
    memory->address = memory->on_gpu.address;
    return keep(memory);
  }

  c10::DeviceType supported_device_type() override { return c10::DeviceType::CUDA; }
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void symmem_enable(const Python* python) {
  state().python = *python;
  const std::string limits = python->memory_limits;
  for (size_t begin = 0, end; (end = limits.find('\n', begin)) != limits.npos; begin = end + 1)
    state().memory_limits.push_back(limits.substr(begin, end - begin));
  auto allocator = c10::make_intrusive<Allocator>();
  sm::register_allocator(c10::DeviceType::CPU, allocator);
  sm::register_availability(allocator->name(), c10::make_intrusive<CudaAllocator>());  // for set_backend: CUDA
}

// From here on nothing calls Python.
EXPORT void symmem_exit() { state().exiting = true; }

// The text of the error that torch raises next on this thread.
EXPORT void symmem_fail(const char* text) { failure() = text; }

// The text of the last error on this thread; empty if there was none.
EXPORT const char* symmem_failure() { return failure().c_str(); }

EXPORT int symmem_holds(uint64_t address) { return state().holds(address); }

// What Python needs to know about memory: address, bytes, extent, pad, bytes of the pad, descriptor; for memory of a
// GPU, its number or else -1, and whether it can be exported to other hosts.
EXPORT void symmem_describe(void* owner, uint64_t* values) {
  const auto& memory = **static_cast<Owner*>(owner);
  values[0] = memory.address;
  values[1] = memory.nbytes;
  values[2] = memory.extent;
  values[3] = memory.pad;
  values[4] = memory.pad_nbytes;
  values[5] = memory.descriptor;
  values[6] = memory.on_gpu.gpu ? memory.on_gpu.gpu->ordinal : -1;
  values[7] = memory.on_gpu.gpu && memory.on_gpu.gpu->fabric;
}

EXPORT void symmem_release(void* owner) { delete static_cast<Owner*>(owner); }

// values: token, rank, world, bytes, offset, bytes of a pad; then the address of every rank's memory, and of every
// rank's pad. For memory of a GPU `signals` is not null, and `gpu` is its number.
EXPORT void symmem_fill(void* result, const int64_t* values, const int* global_ranks, const Signals* signals, int gpu) {
  auto& handle = *static_cast<Handle*>(result);
  handle.token = values[0];
  handle.rank = static_cast<int>(values[1]);
  handle.world = static_cast<int>(values[2]);
  handle.nbytes = values[3];
  handle.offset = values[4];
  handle.pad_nbytes = values[5];
  if (signals) {
    handle.signals = *signals;
    handle.gpu = &cuda::gpu(gpu);
  }
  const int64_t* pointers = values + 6;
  for (int rank = 0; rank < handle.world; ++rank) {
    handle.buffers.push_back(reinterpret_cast<void*>(pointers[rank]));
    handle.pads.push_back(reinterpret_cast<void*>(pointers[handle.world + rank]));
    handle.global_ranks.push_back(global_ranks[rank]);
  }
}

// Move at most `count` tokens of destroyed handles to `tokens`; returns how many.
EXPORT int symmem_dropped(int64_t* tokens, int count) {
  auto& all = state();
  std::lock_guard lock(all.mutex);
  int taken = 0;
  for (; taken < count && !all.dropped.empty(); ++taken) {
    tokens[taken] = all.dropped.back();
    all.dropped.pop_back();
  }
  return taken;
}
