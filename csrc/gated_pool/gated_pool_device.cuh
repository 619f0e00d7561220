// What the CUDA kernels of gated_pool share: the gate's row, and how channels-last maps are cut into tiles.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "../common/cuda_device.cuh"
#include "../common/cuda_launch.cuh"
#include "../common/projection.h"
#include "gated_pool.h"

namespace csg {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;                                     // 16-byte loads in flight per thread
constexpr int kTileBytes = kThreads * kUnroll * kVectorBytes;  // 16 KiB

// Bytes rounded up, so that what follows in shared memory is aligned.
constexpr int whole_vectors(size_t bytes) { return static_cast<int>(ceil_div(bytes, kVectorBytes)) * kVectorBytes; }

// ---- The gate's row.

// Calls fn with a value of the gate's type: that of x, or float.
template <typename T, typename Fn>
__device__ inline void with_gate_type(ScalarType type, Fn fn) {
  if constexpr (sizeof(T) == 2) {
    if (type == ScalarType::Float32) return fn(float{});
  }
  fn(T{});
}

__device__ inline int64_t class_of(const GateRows& rows, int64_t n) { return rows.labels ? rows.labels[n] : n; }

__device__ inline bool in_range(const GateRows& rows, int64_t c) { return c >= 0 && c < rows.rows; }

// P(gate)[c, k]; NaN if c names no row.
template <typename G>
__device__ inline Acc<G> row_entry(const GateRows& rows, int64_t channels, int64_t c, int64_t k) {
  if (!in_range(rows, c)) return static_cast<Acc<G>>(NAN);
  const Acc<G> g = to_acc(static_cast<const G*>(rows.gate)[c * channels + k]);
  if (rows.col_max == nullptr) return g;
  return project_scale(g, to_acc(static_cast<const G*>(rows.col_max)[k]), rows.col_arg[k] == c);
}

template <typename T>
__device__ inline Acc<T> row_entry_of(const GateRows& rows, int64_t channels, int64_t c, int64_t k) {
  Acc<T> row;
  with_gate_type<T>(rows.type, [&](auto g) { row = row_entry<decltype(g)>(rows, channels, c, k); });
  return row;
}

// ---- Channels last.

// A block takes columns * width channels of one sample (backward: of one stretch of its positions).
struct ChannelShape {
  int columns;  // threads along K; kThreads / columns lanes along S
  int64_t channel_tiles, position_tiles, positions, tiles;
};

// Threads along K: 512-byte stretches where there are channels enough; narrower ones, and so more lanes along S and
// more blocks, for few channels or few samples, but of two sectors at least where there are so many.
inline int channel_columns(int64_t n, int64_t packs, int64_t s, int pack_bytes) {
  const int least = std::max(4, 2 * kSectorBytes / pack_bytes);
  const int lanes = power_of_two(s, kThreads / kWarp);
  int columns = power_of_two(packs, kThreads / lanes);
  while (columns > least && n * ceil_div(packs, columns) < kFillBlocks && kThreads / columns < s) columns /= 2;
  return std::max(columns, 4);
}

// Whether every row of channels begins at a 16-byte boundary and fills whole vectors.
template <typename T>
bool channels_aligned(const void* base, int64_t k, int64_t n, int64_t stride_n, int64_t s, int64_t stride_s) {
  return to_boundary(static_cast<const T*>(base)) == 0 && k % kVector<T> == 0 &&
         (n == 1 || stride_n % kVector<T> == 0) && (s == 1 || stride_s % kVector<T> == 0);
}

}  // namespace csg
