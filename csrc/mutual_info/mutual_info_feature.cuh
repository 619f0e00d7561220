// The sorted feature as the CUDA kernels of mutual_info look values up in it. Part of mutual_info_cuda.cu.
#pragma once

#include <cmath>

#include "mutual_info_chunk.cuh"
#include "mutual_info_load.cuh"
#include "mutual_info_sample.h"

namespace csg {
namespace {

__device__ inline void decode(Word64 word, const Fields& fields, int64_t* feature, float* value) {
  *feature = static_cast<int64_t>(word >> fields.classes >> fields.key);
  *value = value_of(static_cast<uint32_t>(word >> fields.classes << fields.dropped), fields.dropped);
}
__device__ inline void decode(Word128 word, const Fields& fields, int64_t* feature, double* value) {
  const Word128 rest = word >> fields.classes;
  *feature = static_cast<int64_t>(rest >> 64);
  *value = value_of(static_cast<uint64_t>(rest));
}

template <typename Word, typename V>
__global__ void __launch_bounds__(kThreads) unpack(const Word* words, const Chunk c, V* value, Word64* list) {
  const int64_t step = int64_t(gridDim.x) * kThreads, total = c.features * c.samples;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    const Word word = words[i];
    int64_t feature;
    decode(word, c.fields, &feature, &value[i]);
    const Word64 label = static_cast<Word64>(word) & c.class_mask();
    const auto position = static_cast<Word64>(i - feature * c.samples);
    list[i] = (static_cast<Word64>(feature) << c.fields.classes | label) << c.fields.position | position;
    if (!c.multiclass) {
      const auto l = static_cast<int32_t>(label);
      c.label[i] = c.is_flagged(l) ? ~l : l;
    }
  }
}

// Ascending values with -inf before and +inf behind them.
template <typename V>
struct Values {
  const V* value;
  int64_t n;

  __device__ double operator[](int64_t i) const {
    if (i < 0) return -static_cast<double>(INFINITY);
    return i < n ? static_cast<double>(value[i]) : static_cast<double>(INFINITY);
  }
};

// Those of one class, by the list of their positions.
template <typename V>
struct ClassValues {
  const V* value;
  const Word64* list;
  Word64 mask;
  int64_t n;

  __device__ int64_t position(int64_t t) const { return static_cast<int64_t>(list[t] & mask); }
  __device__ double operator[](int64_t t) const {
    if (t < 0) return -static_cast<double>(INFINITY);
    return t < n ? static_cast<double>(value[position(t)]) : static_cast<double>(INFINITY);
  }
};

// One feature, as mutual_info_sample.h wants it.
template <typename V>
struct Feature {
  const Chunk& chunk;
  const Word64* list;
  Values<V> value;
  const int32_t* label;
  const int32_t* class_size;
  const int64_t* psi;
  int64_t n, k, dominant;

  __device__ Feature(const Chunk& c, const V* values, int64_t feature)
      : chunk(c),
        list(c.list + feature * c.samples),
        value{values + feature * c.samples, c.samples},
        label(c.label + feature * c.samples),
        class_size(c.class_size),
        psi(c.psi),
        n(c.samples),
        k(c.neighbors),
        dominant(c.dominant) {}

  __device__ ClassValues<V> values_of(int32_t c) const {
    return {value.value, list + chunk.class_begin[c], chunk.position_mask(), class_size[c]};
  }
  __device__ int64_t rank(int64_t i, int32_t c) const {
    const ClassValues<V> v = values_of(c);
    int64_t low = -1, high = v.n;  // position(low) < i <= position(high)
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (v.position(middle) < i ? low : high) = middle;
    }
    return high;
  }
  __device__ int64_t skip_left(int64_t i, int32_t left_out) const { return skip(i, left_out, -1); }
  __device__ int64_t skip_right(int64_t i, int32_t left_out) const { return skip(i, left_out, 1); }

 private:
  // A few steps; then gallops along the class's positions as long as they are consecutive.
  __device__ int64_t skip(int64_t i, int32_t left_out, int64_t step) const {
    for (int tries = 0; tries < 4; ++tries, i += step)
      if (i < 0 || i >= n || label[i] != left_out) return i;
    if (i < 0 || i >= n || label[i] != left_out) return i;
    const ClassValues<V> v = values_of(class_of(left_out));
    const int64_t t = rank(i, class_of(left_out)), most = step < 0 ? t + 1 : v.n - t;
    const auto consecutive = [&](int64_t j) { return v.position(t + j * step) == i + j * step; };
    int64_t low = 0, high = 1;
    while (high < most && consecutive(high)) low = high, high *= 2;
    high = min(high, most);
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (consecutive(middle) ? low : high) = middle;
    }
    return i + high * step;
  }
};

// p and its k nearest neighbours are equal.
template <typename V>
__device__ inline bool in_run(const Values<V>& value, int64_t p, int64_t k) {
  const double x = value[p];
  int64_t before = 0;
  while (before < k && value[p - before - 1] == x) ++before;
  return value[p - before + k] == x;
}

// Appends the items of the lanes that have one; every lane of the warp calls it.
__device__ inline void append(const Chunk& c, bool wanted, int64_t feature, int64_t p, bool is_run) {
  const unsigned mask = __ballot_sync(kFullMask, wanted);
  if (mask == 0) return;
  const unsigned lane = threadIdx.x % kWarp;
  unsigned long long at = 0;
  if (lane == 0) at = atomicAdd(c.count, static_cast<unsigned long long>(__popc(mask)));
  at = __shfl_sync(kFullMask, at, 0) + __popc(mask & ((1u << lane) - 1));
  if (wanted) c.left_over[at] = static_cast<Word64>(feature) << 32 | static_cast<Word64>(p) << 1 | Word64(is_run);
}

}  // namespace
}  // namespace csg
