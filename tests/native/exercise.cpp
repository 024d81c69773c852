// Threads that use torch_backend.cpp as torch does, without Python. test_sanitizers.py compiles and runs it.
//
// The struct Python of that file gets functions that do what symmem/torch_backend/bridge.py does: a rendezvous fills the
// handle and keeps the memory, and a thread in the place of the interpreter runs the pending calls.
#include "torch_backend.cpp"

#include <atomic>
#include <cstdlib>
#include <thread>

namespace {

constexpr int WORLD = 2, THREADS = 4, ROUNDS = 300;
const char* const GROUPS[] = {"one", "two"};

std::atomic<bool> wanted{false}, done{false};
std::mutex renaming;
std::mutex gil;  // as in Python, one function at a time
std::map<int64_t, void*> owners;
int64_t tokens = 0;
alignas(64) char elsewhere[THREADS][64];  // in the place of memory of symmem.allocate

#define REQUIRE(condition)                                                        \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::fprintf(stderr, "%s:%d: not %s\n", __FILE__, __LINE__, #condition);    \
      std::abort();                                                               \
    }                                                                             \
  } while (false)

bool is_elsewhere(Address address) {
  const auto begin = reinterpret_cast<Address>(elsewhere);
  return address >= begin && address < begin + sizeof elsewhere;
}

int drop(void*) {
  std::lock_guard lock(gil);
  int64_t dropped[8];
  while (const int count = symmem_dropped(dropped, 8))
    for (int i = 0; i < count; ++i) {
      auto found = owners.find(dropped[i]);
      REQUIRE(found != owners.end());
      if (found->second) symmem_release(found->second);
      owners.erase(found);
    }
  return 0;
}

int meet(void* result, Address address, void* owner, const char* group) {
  std::lock_guard lock(gil);
  if (!owner && !is_elsewhere(address)) return NOT_SYMMETRIC;
  if (!*group) {
    if (owner) symmem_release(owner);
    symmem_fail("symmem: GroupError: no group");
    return 1;
  }
  uint64_t described[8] = {address, sizeof elsewhere[0]};
  if (owner) symmem_describe(owner, described);
  const uint64_t offset = address - described[0];
  owners[++tokens] = owner;
  const auto [memory, nbytes] = std::pair<int64_t, int64_t>(described[0], described[1]);
  const auto [pad, pad_nbytes] = std::pair<int64_t, int64_t>(memory + described[3], described[4]);
  const int64_t values[] = {tokens, 0, WORLD, nbytes, int64_t(offset), pad_nbytes, memory, memory, pad, pad};
  const int ranks[] = {0, 1};
  symmem_fill(result, values, ranks, nullptr, -1);
  return 0;
}

int signal(int64_t token, int, int, int channel, uint64_t) {
  std::lock_guard lock(gil);
  REQUIRE(owners.count(token));
  if (channel < 64) return 0;
  symmem_fail("symmem: InvalidArgumentError: no such channel");
  return 1;
}

int check(int64_t) { return 0; }
int holds(Address address) { return is_elsewhere(address); }
int add_pending_call(int (*)(void*), void*) {
  wanted = true;
  return 0;
}

// A call that raises torch's error; returns whether the text of this thread has a part.
template <typename Call>
bool fails(const Call& call, const char* part) {
  try {
    call();
  } catch (const c10::Error&) {
    return std::strstr(symmem_failure(), part) != nullptr;
  }
  return false;
}

void use(int thread, Allocator& allocator, void* shared) {
  HandlePtr kept;
  for (int round = 0; round < ROUNDS; ++round) {
    const std::string group = GROUPS[round % 2];
    const size_t size = (round * 977) % 9000;
    auto* memory = static_cast<char*>(allocator.alloc(size, -1, round % 3 ? std::nullopt : std::optional(group)));
    std::memset(memory, thread, size);
    REQUIRE(allocator.get_alloc_size(memory) == size);
    REQUIRE(allocator.has_allocation(memory));
    auto first = allocator.rendezvous(memory, group);
    auto again = allocator.rendezvous(memory, group);
    REQUIRE(first->get_buffer_ptrs()[1] == memory && first->get_buffer_size() == size);
    std::memset(first->get_signal_pad_ptrs()[0], 1, sm::get_signal_pad_size());
    first->barrier(round % 64, 0);
    REQUIRE(fails([&] { first->put_signal(1, 64, 0); }, "no such channel"));
    if (size > 64) REQUIRE(allocator.rendezvous(memory + 64, group)->get_offset() == 64);
    auto common = allocator.rendezvous(shared, group);  // all threads, while others replace the group
    REQUIRE(common->get_buffer_ptrs()[0] == shared);
    auto other = allocator.rendezvous(elsewhere[round % THREADS], group);
    REQUIRE(other->get_world_size() == WORLD);
    REQUIRE(allocator.rendezvous(&wanted, group) == nullptr);
    REQUIRE(fails([&] { allocator.get_alloc_size(&wanted); }, "NotSymmetricError"));
    REQUIRE(fails([&] { allocator.alloc(size_t(1) << 50, -1, std::nullopt); }, "OutOfMemoryError"));
    if (round % 50 == thread) {  // a name that refers to another group from now on
      std::lock_guard lock(renaming);
      c10d::unregister_process_group(group);
      c10d::register_process_group(group, c10::make_intrusive<c10d::ProcessGroup>(0, WORLD));
    }
    if (round % 5) allocator.free(memory);  // else after its handle
    REQUIRE(static_cast<char*>(first->get_buffer_ptrs()[0])[0] == thread || !size);  // the handle keeps the memory
    first.reset();
    again.reset();
    if (round % 5 == 0) allocator.free(memory);
  }
}

}  // namespace

int main() {
  for (const char* group : GROUPS)
    c10d::register_process_group(group, c10::make_intrusive<c10d::ProcessGroup>(0, WORLD));
  const Python python{meet, signal, check, holds, drop, add_pending_call, "/nowhere/memory.max\n"};
  symmem_enable(&python);
  auto allocator = sm::get_allocator(c10::DeviceType::CPU);
  auto& ours = static_cast<Allocator&>(*allocator);
  void* shared = allocator->alloc(4096, -1, std::nullopt);
  REQUIRE(symmem_holds(reinterpret_cast<uint64_t>(shared)));
  REQUIRE(fails([&] { allocator->rendezvous(shared, std::nullopt); }, "GroupError"));
  std::thread interpreter([] {
    while (!done) {
      if (wanted.exchange(false)) drop(nullptr);
      std::this_thread::yield();
    }
  });
  std::vector<std::thread> threads;
  for (int thread = 0; thread < THREADS; ++thread) threads.emplace_back(use, thread, std::ref(ours), shared);
  for (auto& thread : threads) thread.join();
  done = true;
  interpreter.join();
  allocator->free(shared);
  drop(nullptr);
  REQUIRE(owners.empty());
  symmem_exit();
  REQUIRE(fails([&] { allocator->rendezvous(elsewhere[0], std::string("one")); }, "ClosedError"));
  std::puts("ok");
}
