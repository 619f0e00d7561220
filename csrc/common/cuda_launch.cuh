// How kernels are launched and given shared memory: one source for nvcc and for the CPU stand-in of the tests.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace csg {

#ifndef CSG_MAX_BLOCKS
#define CSG_MAX_BLOCKS (1 << 20)
#endif
// Every kernel walks over its tiles with a grid-stride loop, so more tiles than this only take more rounds.
constexpr int64_t kMaxBlocks = CSG_MAX_BLOCKS;

#ifndef CSG_FILL_BLOCKS
#define CSG_FILL_BLOCKS 512
#endif
// Blocks that keep a large GPU busy: below this, tiles are made smaller.
constexpr int64_t kFillBlocks = CSG_FILL_BLOCKS;

#ifdef __CUDACC__

#define CSG_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define CSG_SHARED(type, name, count) __shared__ type name[count]

// Runs kernel(params...) on min(tiles, kMaxBlocks) blocks; returns a cudaError_t.
template <typename... Params>
int launch(void (*kernel)(Params...), int64_t tiles, int threads, size_t shared_bytes, void* stream,
           std::type_identity_t<Params>... params) {
  const auto blocks = static_cast<unsigned>(std::min(tiles, kMaxBlocks));
  kernel<<<blocks, static_cast<unsigned>(threads), shared_bytes, static_cast<cudaStream_t>(stream)>>>(params...);
  return cudaGetLastError();
}

#else  // tests/cuda_on_cpu

#define CSG_DYNAMIC_SHARED(name) unsigned char* const name = cuda_on_cpu::dynamic_shared()
#define CSG_SHARED(type, name, count) \
  static char name##_key;             \
  type* const name = static_cast<type*>(cuda_on_cpu::static_shared(&name##_key, sizeof(type) * (count), alignof(type)))

template <typename... Params>
int launch(void (*kernel)(Params...), int64_t tiles, int threads, size_t shared_bytes, void*,
           std::type_identity_t<Params>... params) {
  return cuda_on_cpu::launch(reinterpret_cast<const void*>(kernel),
                             std::min(tiles, cuda_on_cpu::most_blocks(kMaxBlocks)), threads, shared_bytes,
                             [=] { kernel(params...); });
}

#endif

// Passes a cudaError_t on. What a runtime call returned stays the runtime's last error as well: the next launch would
// report it as its own.
inline int forget_last_error(int status) {
  if (status != cudaSuccess) static_cast<void>(cudaGetLastError());
  return status;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Smallest power of two >= n, at most limit (itself a power of two).
constexpr int power_of_two(int64_t n, int limit) {
  int p = 1;
  while (p < n && p < limit) p *= 2;
  return p;
}

}  // namespace csg
