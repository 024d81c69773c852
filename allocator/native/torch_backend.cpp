// Symmetric memory for torch.distributed._symmetric_memory: an allocator, and the handles of its rendezvous.
//
// symmem/torch_backend compiles this file for the installed torch, loads it with ctypes and calls the functions at the
// end. It uses neither Python's headers nor pybind11.
//
// alloc and free run no Python: torch calls them with the GIL or its own locks held, and a thread that waits for the
// GIL there would wait forever. So they make and free memory files here. The first rendezvous of a block and group
// calls Python, where the ranks meet; every later one is answered from the table below. The table's mutex is never held
// during a call of Python, of torch, or of a destructor of a handle.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
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

namespace {

namespace sm = c10d::symmetric_memory;
using Address = uint64_t;

// A memory file and its mapping. The pad of torch's signals begins at `pad`, on a page without data.
struct Memory {
  Address address = 0;
  uint64_t nbytes = 0, extent = 0, pad = 0, pad_nbytes = 0;
  int descriptor = -1;
  pid_t process = getpid();
  std::optional<std::string> group;

  ~Memory() {
    if (process != getpid()) return;  // a fork shares the memory with its parent
    if (address) munmap(reinterpret_cast<void*>(address), extent);
    if (descriptor >= 0) close(descriptor);
  }
};
using Owner = std::shared_ptr<Memory>;

// The functions of symmem/torch_backend. Those that return int return 0, or 1 after they have called symmem_fail.
struct Python {
  int (*rendezvous)(void* result, Address address, void* owner, const char* group);
  int (*signal)(int64_t token, int kind, int peer, int channel, uint64_t timeout_ms);
  int (*holds)(Address address);
  int (*drop)(void*);                                  // drops the tokens that symmem_dropped returns
  int (*add_pending_call)(int (*)(void*), void*);      // Py_AddPendingCall: needs no GIL
};

struct State;
State& state();

struct Handle : sm::SymmetricMemory {
  Owner memory;  // null for memory of symmem.allocate, which the token keeps
  int64_t token = 0;
  int rank = 0, world = 0;
  uint64_t nbytes = 0, offset = 0, pad_nbytes = 0;
  std::vector<void*> buffers, pads;
  std::vector<int> global_ranks;
  std::optional<c10::weak_intrusive_ptr<c10d::ProcessGroup>> process_group;

  ~Handle() override;

  std::vector<void*> get_buffer_ptrs() override { return buffers; }
  void** get_buffer_ptrs_dev() override { return buffers.data(); }
  std::vector<void*> get_signal_pad_ptrs() override { return checked_pads(); }
  void** get_signal_pad_ptrs_dev() override { return checked_pads().data(); }
  size_t get_buffer_size() override { return nbytes; }
  size_t get_offset() override { return offset; }
  bool has_multicast_support() override { return false; }
  void* get_multicast_ptr() override { return nullptr; }
  int get_rank() override { return rank; }
  int get_world_size() override { return world; }
  c10::Device get_device() override { return c10::Device(c10::DeviceType::CPU); }
  const std::vector<int>& get_rank_to_global_rank() override { return global_ranks; }
  int* get_rank_to_global_rank_dev() override { return global_ranks.data(); }
  bool world_within_direct_access() override { return true; }

  void barrier(int channel, size_t timeout_ms) override { signal(0, 0, channel, timeout_ms); }
  void put_signal(int peer, int channel, size_t timeout_ms) override { signal(1, peer, channel, timeout_ms); }
  void wait_signal(int peer, int channel, size_t timeout_ms) override { signal(2, peer, channel, timeout_ms); }

 private:
  void signal(int kind, int peer, int channel, uint64_t timeout_ms);

  std::vector<void*>& checked_pads() {
    TORCH_CHECK(
        pad_nbytes >= sm::get_signal_pad_size(), "symmem: this memory has a signal pad of ", pad_nbytes,
        " bytes, and torch now expects ", sm::get_signal_pad_size(),
        ". Call set_signal_pad_size before the allocation, and allocate with torch's empty if kernels use the pad.");
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
  std::vector<int64_t> dropped;
  Python python{};
  pid_t process = getpid();
  bool exiting = false;

  // Refuse a forked child, which is not a rank and lacks the thread that may have held the mutex at the fork.
  void check(const char* operation) {
    TORCH_CHECK(
        process == getpid(), "symmem: ForkedError: ", operation,
        ": this process was forked after symmem.torch_backend.enable(); the child is not a rank. "
        "Start the child with the method spawn, and enable the backend there.");
  }

  void check_python(const char* operation) {
    check(operation);
    TORCH_CHECK(!exiting, "symmem: ", operation, ": the interpreter is shutting down");
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

thread_local std::string failure;

[[noreturn]] void raise() { TORCH_CHECK(false, failure); }

Handle::~Handle() {
  auto& all = state();
  if (!token || all.process != getpid() || all.exiting) return;
  {
    std::lock_guard lock(all.mutex);
    all.dropped.push_back(token);
  }
  // If the queue of the interpreter is full, the next rendezvous or the next dropped handle drops this one too.
  all.python.add_pending_call(all.python.drop, nullptr);
}

void Handle::signal(int kind, int peer, int channel, uint64_t timeout_ms) {
  auto& all = state();
  all.check_python("signal");
  if (all.python.signal(token, kind, peer, channel, timeout_ms)) raise();
}

uint64_t available_memory() {
  std::ifstream file("/proc/meminfo");
  std::string word;
  uint64_t kibibytes = 0;
  while (file >> word)
    if (word == "MemAvailable:" && file >> kibibytes) return kibibytes * 1024;
  return UINT64_MAX;
}

struct Allocator : sm::SymmetricMemoryAllocator {
  void* alloc(size_t size, int, const std::optional<std::string>& group) override {
    auto& all = state();
    all.check("allocation");
    const uint64_t page = sysconf(_SC_PAGESIZE), available = available_memory();
    TORCH_CHECK(
        size <= available, "symmem: OutOfMemoryError: ", size, " bytes of shared memory were asked for, ", available,
        " are available. Free memory, or allocate less.");
    auto memory = std::make_shared<Memory>();
    memory->group = group;
    memory->nbytes = size;
    memory->pad = std::max<uint64_t>((size + page - 1) / page, 1) * page;
    memory->pad_nbytes = sm::get_signal_pad_size();
    memory->extent = memory->pad + (memory->pad_nbytes + page - 1) / page * page;
    memory->descriptor = memfd_create("symmem", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    const bool made = memory->descriptor >= 0 && ftruncate(memory->descriptor, memory->extent) == 0 &&
        fcntl(memory->descriptor, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0;
    void* place = !made
        ? MAP_FAILED
        : mmap(nullptr, memory->extent, PROT_READ | PROT_WRITE, MAP_SHARED, memory->descriptor, 0);
    TORCH_CHECK(
        place != MAP_FAILED, "symmem: ResourceLimitError: cannot make and map a memory file of ", memory->extent,
        " bytes: ", std::strerror(errno), ". Hold fewer tensors, or raise `ulimit -n` or /proc/sys/vm/max_map_count.");
    memory->address = reinterpret_cast<Address>(place);
    std::lock_guard lock(all.mutex);
    all.blocks[memory->address].memory = memory;
    return place;
  }

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
    TORCH_CHECK(found != all.blocks.end(), "symmem: no live allocation of torch's symmetric memory holds ", pointer);
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
    {
      std::lock_guard lock(all.mutex);
      if (auto found = all.find(address); found != all.blocks.end()) {
        memory = found->second.memory;
        if (!group_name) group = memory->group.value_or("");
        auto& handles = found->second.handles;
        if (auto cached = handles.find({group, address - memory->address}); cached != handles.end())
          known = cached->second;
      }
    }
    const auto current = process_group(group);
    if (known && known->process_group && known->process_group->lock() == current) return known;
    if (!memory && !all.python.holds(address)) return {};  // not symmetric memory: None in Python, as torch's backends
    auto handle = c10::make_intrusive<Handle>();
    handle->memory = memory;
    Owner* owner = memory ? new Owner(memory) : nullptr;  // Python releases it
    if (all.python.rendezvous(handle.get(), address, owner, group.c_str())) raise();
    // A name may refer to another process group later. A group without one is not cached.
    if (memory && current) {
      handle->process_group.emplace(current);
      HandlePtr kept = handle;  // then the one that it replaces; `known` may be another one by now
      std::lock_guard lock(all.mutex);
      auto found = all.blocks.find(memory->address);
      if (found != all.blocks.end() && found->second.memory == memory)
        std::swap(found->second.handles[{group, address - memory->address}], kept);  // dropped after the mutex
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

 private:
  static c10::intrusive_ptr<c10d::ProcessGroup> process_group(const std::string& name) {
    try {
      return c10d::resolve_process_group(name);
    } catch (const c10::Error&) {
      return {};  // Python knows more groups, and the error for a name that nobody knows
    }
  }
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void symmem_enable(const Python* python) {
  state().python = *python;
  auto allocator = c10::make_intrusive<Allocator>();
  sm::register_allocator(c10::DeviceType::CPU, allocator);
}

// From here on nothing calls Python.
EXPORT void symmem_exit() { state().exiting = true; }

// The text of the error that torch raises on this thread.
EXPORT void symmem_fail(const char* text) { failure = text; }

EXPORT int symmem_holds(uint64_t address) { return state().holds(address); }

// What Python needs to know about memory: address, bytes, extent, pad, bytes of the pad, descriptor.
EXPORT void symmem_describe(void* owner, uint64_t* values) {
  const auto& memory = **static_cast<Owner*>(owner);
  values[0] = memory.address;
  values[1] = memory.nbytes;
  values[2] = memory.extent;
  values[3] = memory.pad;
  values[4] = memory.pad_nbytes;
  values[5] = memory.descriptor;
}

EXPORT void symmem_release(void* owner) { delete static_cast<Owner*>(owner); }

// values: token, rank, world, bytes, offset, bytes of a pad. The arrays have an element per rank.
EXPORT void symmem_fill(
    void* result, const int64_t* values, const uint64_t* buffers, const uint64_t* pads, const int* global_ranks) {
  auto& handle = *static_cast<Handle*>(result);
  handle.token = values[0];
  handle.rank = static_cast<int>(values[1]);
  handle.world = static_cast<int>(values[2]);
  handle.nbytes = values[3];
  handle.offset = values[4];
  handle.pad_nbytes = values[5];
  for (int rank = 0; rank < handle.world; ++rank) {
    handle.buffers.push_back(reinterpret_cast<void*>(buffers[rank]));
    handle.pads.push_back(reinterpret_cast<void*>(pads[rank]));
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
