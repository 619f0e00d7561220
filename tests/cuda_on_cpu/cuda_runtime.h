// Stands in for cuda_runtime.h when a C++ compiler builds the kernels for functional tests on a CPU.
//
// Each CUDA thread is a fiber; one OS thread runs them in a shuffled order that a seed determines. Fibers switch at
// barriers and warp exchanges. Covered: indexing, missing and divergent barriers, reads of shared memory that nothing
// wrote, accesses outside shared memory and outside guarded buffers. Not covered: memory ordering, speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

typedef unsigned uint4 __attribute__((vector_size(16)));  // so that it moves as one access
struct uint3 {
  unsigned x, y, z;
};
using dim3 = uint3;

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

enum : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
enum : int { cudaMemcpyDeviceToHost = 2 };
using cudaStream_t = void*;

namespace cuda_on_cpu {

using Where = std::source_location;

// Runs `body` once per thread; returns cudaSuccess or an error that error() explains.
int launch(const void* kernel, int64_t blocks, int threads, size_t dynamic_shared_bytes,
           const std::function<void()>& body);
const char* error();
// Every memset, copy and synchronisation: fails if it is the one that cuda_on_cpu_fail_call names. An error is returned
// and kept, as the runtime keeps it, until take_last_error(): launch() returns what is kept, like cudaGetLastError().
int runtime_call();
int take_last_error();
void set_seed(uint64_t seed);
// `limit`, or as many as CUDA allows while launches run their first and last blocks alone, a tile each: for arrays that
// are too long to be touched from end to end.
int64_t most_blocks(int64_t limit);

// Shared memory of the running block; poisoned before the block starts.
unsigned char* dynamic_shared();
void* static_shared(const void* key, size_t bytes, size_t alignment);

void sync_threads(Where where);
// Every lane of `mask` brings a value and the lane whose value it wants; lane_results: all values, by lane.
uint64_t exchange(unsigned mask, uint64_t value, int source_lane, Where where);
unsigned vote(unsigned mask, bool predicate, Where where);
int lane();

// Where the kernel that runs stands; `meetings`: barriers and exchanges of the whole warp behind the thread, in its
// block.
struct Moment {
  const void* kernel;
  int64_t launch;
  unsigned block;
  int thread;
  unsigned meetings;
};
Moment moment();

template <typename T>
T shuffle(unsigned mask, T value, int source_lane, Where where) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source_lane, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_on_cpu

inline int cudaGetLastError() { return cuda_on_cpu::take_last_error(); }
inline int cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  if (const int status = cuda_on_cpu::runtime_call()) return status;
  std::memset(p, value, bytes);
  return cudaSuccess;
}
inline int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
  if (const int status = cuda_on_cpu::runtime_call()) return status;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline int cudaStreamSynchronize(cudaStream_t) { return cuda_on_cpu::runtime_call(); }
inline int cudaMemGetInfo(size_t*, size_t*) { return cuda_on_cpu::runtime_call(); }

inline void __syncthreads(cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  cuda_on_cpu::sync_threads(where);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  return cuda_on_cpu::vote(mask, predicate, where);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  return cuda_on_cpu::shuffle(mask, value, source & 31, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::lane() ^ bits, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int by, cuda_on_cpu::Where where = cuda_on_cpu::Where::current()) {
  const int source = cuda_on_cpu::lane() + by;
  return cuda_on_cpu::shuffle(mask, value, source < 32 ? source : cuda_on_cpu::lane(), where);
}
template <typename T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  const T old = *p;
  *p = old + v;
  return old;
}
template <typename T>
T atomicMin(T* p, std::type_identity_t<T> v) {
  const T old = *p;
  *p = std::min(old, v);
  return old;
}
// Out of line, so that no compiler fuses the product with an addition.
[[gnu::noinline]] inline double __dmul_rn(double a, double b) { return a * b; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }

using std::max;
using std::min;
