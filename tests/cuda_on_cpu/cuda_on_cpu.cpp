// The stand-in's machinery: fibers, their scheduler, shared memory, and faults turned into an error with one sentence.
#undef _FORTIFY_SOURCE  // its longjmp refuses to leave a fiber's stack
#include <array>
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr int64_t kMaxGrid = 0x7fffffff, kEndBlocks = 2;
constexpr size_t kStackBytes = 128 * 1024, kSharedBytes = 48 * 1024, kZone = 64;
constexpr unsigned char kPoison = 0xff, kCanary = 0xa5;  // 0xff..: a NaN in every float type, -1 as an integer

enum class State { Ready, AtBarrier, InWarp, Done };

struct Fiber {
  jmp_buf context;
  ucontext_t first;  // entered once; later switches use context
  bool started = false;
  State state = State::Done;
  unsigned meetings = 0;  // barriers and exchanges of the whole warp that it has passed in this block
  Where where;            // of the barrier or exchange it waits at
  unsigned mask = 0;
  int source = 0;
  uint64_t value = 0, result = 0;
};

struct SharedArray {
  const void* key;
  unsigned char* data;
  size_t bytes;
};

const size_t kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));

size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// Memory between two pages that may not be touched.
unsigned char* map_guarded(size_t bytes) {
  void* base =
      mmap(nullptr, whole_pages(bytes) + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  auto* data = static_cast<unsigned char*>(base) + kPage;
  return mprotect(data, whole_pages(bytes), PROT_READ | PROT_WRITE) == 0 ? data : nullptr;
}

void unmap_guarded(unsigned char* data, size_t bytes) { munmap(data - kPage, whole_pages(bytes) + 2 * kPage); }

std::vector<Fiber> fibers(kMaxThreads);
std::vector<unsigned char*> stacks(kMaxThreads);
std::array<std::vector<int>, kMaxThreads / kWarp> ready;  // threads that can run, by warp
std::vector<int> warp_order;
bool warps_race;
const std::function<void()>* body;
int thread_count, running;
jmp_buf scheduler;
sigjmp_buf fault_exit;
std::mt19937_64 random_engine;
std::string message;
bool failed;
unsigned char* shared_static;
unsigned char* shared_dynamic;
unsigned char* shared_dynamic_end;
size_t static_bytes, dynamic_bytes;
bool ends_only;
int64_t launches;
int64_t calls_to_failure = -1;  // runtime calls that still succeed; negative: all
int last_error;
const void* kernel;                 // that runs, or nullptr
std::vector<const void*> launched;  // kernels, each once
std::vector<SharedArray> shared_arrays;

[[gnu::format(printf, 1, 2)]] void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  if (!failed) message = text;
  failed = true;
}

[[gnu::noinline]] void yield() {
  if (_setjmp(fibers[running].context) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {
    (*body)();
    fibers[running].state = State::Done;
    yield();
  }
}

[[gnu::noinline]] void resume(int thread) {
  running = thread;
  threadIdx.x = static_cast<unsigned>(thread);
  if (_setjmp(scheduler) != 0) return;
  Fiber& fiber = fibers[thread];
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  getcontext(&fiber.first);
  fiber.first.uc_stack.ss_sp = stacks[thread];
  fiber.first.uc_stack.ss_size = kStackBytes;
  fiber.first.uc_link = nullptr;
  makecontext(&fiber.first, fiber_main, 0);
  setcontext(&fiber.first);
}

void make_ready(int thread) {
  fibers[thread].state = State::Ready;
  ready[thread / kWarp].push_back(thread);
}

// The next thread to run, at random: of any warp, or (in every other block) of the first warp in a random order that
// can run, so that some warps get as far ahead of others as barriers allow. -1: no thread can run.
int pick() {
  const size_t warps = warp_order.size(), first = warps_race ? 0 : random_engine() % warps;
  for (size_t w = 0; w < warps; ++w) {
    auto& threads = ready[warp_order[(first + w) % warps]];
    if (threads.empty()) continue;
    std::swap(threads[random_engine() % threads.size()], threads.back());
    const int thread = threads.back();
    threads.pop_back();
    return thread;
  }
  return -1;
}

// Any fault other than a return to the scheduler leaves fibers half way: they start anew.
void forget_fibers() {
  for (Fiber& fiber : fibers) fiber.started = false;
}

void release_barrier() {
  int arrived = 0;
  for (int t = 0; t < thread_count; ++t) arrived += fibers[t].state == State::AtBarrier;
  if (arrived < thread_count) return;
  for (int t = 1; t < thread_count; ++t) {
    if (fibers[t].where.line() != fibers[0].where.line()) {
      return fail("threads 0 and %d of block %u wait at different barriers, lines %u and %u of %s", t, blockIdx.x,
                  fibers[0].where.line(), fibers[t].where.line(), fibers[0].where.file_name());
    }
  }
  for (int t = 0; t < thread_count; ++t) make_ready(t);
}

void release_warp(int thread) {
  const Fiber& fiber = fibers[thread];
  const int first = thread / kWarp * kWarp;
  for (int l = 0; l < kWarp; ++l) {
    if ((fiber.mask >> l & 1) == 0) continue;
    if (first + l >= thread_count) {
      return fail("thread %d of block %u names lane %d, which does not exist, at line %u", thread, blockIdx.x, l,
                  fiber.where.line());
    }
    const Fiber& other = fibers[first + l];
    if (other.state != State::InWarp || other.mask != fiber.mask || other.where.line() != fiber.where.line()) return;
  }
  for (int l = 0; l < kWarp; ++l) {
    if ((fiber.mask >> l & 1) == 0) continue;
    Fiber& reader = fibers[first + l];
    if (reader.source < 0) {  // a vote
      reader.result = 0;
      for (int other = 0; other < kWarp; ++other) {
        if ((fiber.mask >> other & 1) != 0) reader.result |= fibers[first + other].value << other;
      }
    } else if ((fiber.mask >> reader.source & 1) == 0) {
      return fail("thread %d of block %u reads from lane %d, which takes no part, at line %u", first + l, blockIdx.x,
                  reader.source, fiber.where.line());
    } else {
      reader.result = fibers[first + reader.source].value;
    }
  }
  const unsigned mask = fiber.mask;
  for (int l = 0; l < kWarp; ++l) {
    if ((mask >> l & 1) != 0) make_ready(first + l);
  }
}

bool canaries_intact() {
  const auto intact = [](const unsigned char* begin, const unsigned char* end) {
    return std::all_of(begin, end, [](unsigned char c) { return c == kCanary; });
  };
  if (!intact(shared_dynamic - kZone, shared_dynamic)) return false;
  if (!intact(shared_dynamic + dynamic_bytes, shared_dynamic_end)) return false;
  return std::all_of(shared_arrays.begin(), shared_arrays.end(), [&](const SharedArray& a) {
    return intact(a.data - kZone, a.data) && intact(a.data + a.bytes, a.data + a.bytes + kZone);
  });
}

void run_block() {
  shared_arrays.clear();
  static_bytes = 0;
  std::memset(shared_dynamic - kZone, kCanary, shared_dynamic_end - shared_dynamic + kZone);
  std::memset(shared_dynamic, kPoison, dynamic_bytes);
  for (auto& threads : ready) threads.clear();
  for (int t = 0; t < thread_count; ++t) {
    fibers[t].meetings = 0;
    make_ready(t);
  }
  warp_order.resize((thread_count + kWarp - 1) / kWarp);
  std::iota(warp_order.begin(), warp_order.end(), 0);
  std::shuffle(warp_order.begin(), warp_order.end(), random_engine);
  warps_race = random_engine() % 2 == 0;
  for (int thread = pick(); thread >= 0 && !failed; thread = pick()) {
    resume(thread);
    if (fibers[thread].state == State::AtBarrier) release_barrier();
    if (fibers[thread].state == State::InWarp) release_warp(thread);
  }
  if (failed) return;
  for (int t = 0; t < thread_count; ++t) {
    const Fiber& fiber = fibers[t];
    if (fiber.state == State::Done) continue;
    return fail("thread %d of block %u waits for ever at a %s, line %u of %s", t, blockIdx.x,
                fiber.state == State::AtBarrier ? "barrier that another thread does not reach" : "warp operation",
                fiber.where.line(), fiber.where.file_name());
  }
  if (!canaries_intact()) fail("block %u wrote outside its shared memory", blockIdx.x);
}

void on_fault(int signal) {
  fail("thread %d of block %u touched memory outside its buffers (signal %d)", running, blockIdx.x, signal);
  siglongjmp(fault_exit, 1);
}

// Catches the faults of a launch; the process's own handlers come back afterwards.
class FaultGuard {
 public:
  FaultGuard() : stack_(new char[kStackBytes]) {
    stack_t alternate{};
    alternate.ss_sp = stack_.get();
    alternate.ss_size = kStackBytes;
    sigaltstack(&alternate, &old_stack_);
    struct sigaction action{};
    action.sa_handler = on_fault;
    action.sa_flags = SA_ONSTACK;
    sigaction(SIGSEGV, &action, &old_segv_);
    sigaction(SIGBUS, &action, &old_bus_);
  }
  ~FaultGuard() {
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaction(SIGBUS, &old_bus_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  std::unique_ptr<char[]> stack_;
  stack_t old_stack_;
  struct sigaction old_segv_, old_bus_;
};

}  // namespace

int launch(const void* which, int64_t blocks, int threads, size_t dynamic_shared_bytes,
           const std::function<void()>& thread_body) {
  if (blocks < 1 || blocks > kMaxGrid || threads < 1 || threads > kMaxThreads || dynamic_shared_bytes > kSharedBytes) {
    message = "launch of " + std::to_string(blocks) + " blocks, " + std::to_string(threads) + " threads, " +
              std::to_string(dynamic_shared_bytes) + " bytes of shared memory is out of the limits";
    return cudaErrorInvalidConfiguration;
  }
  if (shared_static == nullptr) {
    shared_static = map_guarded(2 * kSharedBytes);
    shared_dynamic_end = map_guarded(kSharedBytes + kPage) + whole_pages(kSharedBytes + kPage);
    for (auto& stack : stacks) stack = map_guarded(kStackBytes);
  }
  // The end of the dynamic shared memory lies at a page that may not be touched (16-byte alignment permitting).
  dynamic_bytes = dynamic_shared_bytes;
  shared_dynamic = shared_dynamic_end - (dynamic_bytes + 15) / 16 * 16;
  thread_count = threads;
  body = &thread_body;
  ++launches;
  kernel = which;
  if (std::find(launched.begin(), launched.end(), which) == launched.end()) launched.push_back(which);
  failed = false;
  message.clear();
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  std::vector<unsigned> order;
  for (int64_t block = 0; block < blocks; ++block) {
    if (ends_only && block == kEndBlocks) block = std::max(block, blocks - kEndBlocks);
    order.push_back(static_cast<unsigned>(block));
  }
  std::shuffle(order.begin(), order.end(), random_engine);
  const FaultGuard guard;
  if (sigsetjmp(fault_exit, 1) == 0) {
    for (const unsigned block : order) {
      blockIdx = {block, 0, 0};
      run_block();
      if (failed) break;
    }
  }
  kernel = nullptr;
  if (!failed) return take_last_error();
  forget_fibers();
  return cudaErrorLaunchFailure;
}

const char* error() { return message.c_str(); }

int runtime_call() {
  if (calls_to_failure < 0 || calls_to_failure-- > 0) return cudaSuccess;
  message = "a runtime call was made to fail";
  return last_error = cudaErrorInvalidValue;
}

int take_last_error() { return std::exchange(last_error, 0); }

int64_t most_blocks(int64_t limit) { return ends_only ? kMaxGrid : limit; }

void set_seed(uint64_t seed) { random_engine.seed(seed); }

unsigned char* dynamic_shared() { return shared_dynamic; }

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  for (const SharedArray& array : shared_arrays) {
    if (array.key == key) return array.data;
  }
  size_t together = dynamic_bytes + bytes;
  for (const SharedArray& array : shared_arrays) together += array.bytes;
  if (together > kSharedBytes) {
    fail("shared memory of a block, static and dynamic together, is over %zu bytes", kSharedBytes);
    yield();
  }
  const size_t begin = (static_bytes + kZone + alignment - 1) / alignment * alignment;
  static_bytes = begin + bytes + kZone;
  if (static_bytes > 2 * kSharedBytes) {
    fail("static shared memory of a block is over %zu bytes", kSharedBytes);
    yield();
  }
  std::memset(shared_static + begin - kZone, kCanary, bytes + 2 * kZone);
  std::memset(shared_static + begin, kPoison, bytes);
  shared_arrays.push_back({key, shared_static + begin, bytes});
  return shared_static + begin;
}

void sync_threads(Where where) {
  fibers[running].state = State::AtBarrier;
  ++fibers[running].meetings;
  fibers[running].where = where;
  yield();
}

uint64_t exchange(unsigned mask, uint64_t value, int source_lane, Where where) {
  Fiber& fiber = fibers[running];
  fiber.state = State::InWarp;
  fiber.meetings += mask == 0xffffffffu;
  fiber.where = where;
  fiber.mask = mask;
  fiber.value = value;
  fiber.source = source_lane;
  if ((mask >> lane() & 1) == 0) {
    fail("thread %d of block %u is not in its own mask, line %u", running, blockIdx.x, where.line());
  }
  yield();
  return fiber.result;
}

unsigned vote(unsigned mask, bool predicate, Where where) {
  return static_cast<unsigned>(exchange(mask, predicate ? 1 : 0, -1, where));
}

int lane() { return running % kWarp; }

Moment moment() { return {kernel, launches, blockIdx.x, running, fibers[running].meetings}; }

}  // namespace cuda_on_cpu

// What tests written in Python need beside the launchers.
extern "C" {
const char* cuda_on_cpu_error() { return cuda_on_cpu::error(); }
int64_t cuda_on_cpu_launches() { return cuda_on_cpu::launches; }
// The address of a kernel that has been launched since the list was cleared; nullptr beyond the last.
const void* cuda_on_cpu_launched(size_t i) {
  return i < cuda_on_cpu::launched.size() ? cuda_on_cpu::launched[i] : nullptr;
}
void cuda_on_cpu_clear_launched() { cuda_on_cpu::launched.clear(); }
void cuda_on_cpu_set_ends_only(bool only) { cuda_on_cpu::ends_only = only; }
// The runtime call behind `after` others fails.
void cuda_on_cpu_fail_call(int64_t after) { cuda_on_cpu::calls_to_failure = after; }
void cuda_on_cpu_set_seed(uint64_t seed) { cuda_on_cpu::set_seed(seed); }
// A buffer of whole pages between two pages that may not be touched; nullptr when there is no memory.
void* cuda_on_cpu_map(size_t bytes) { return cuda_on_cpu::map_guarded(bytes); }
void cuda_on_cpu_unmap(void* data, size_t bytes) {
  cuda_on_cpu::unmap_guarded(static_cast<unsigned char*>(data), bytes);
}
}
