// The CUDA kernel of mutual_info that takes samples among their own class. Part of mutual_info_cuda.cu.
#pragma once

#include "../common/cuda_launch.cuh"
#include "mutual_info_chunk.cuh"
#include "mutual_info_feature.cuh"
#include "mutual_info_small_groups.cuh"

namespace csg {
namespace {

constexpr int kWideThreads = 1024;  // of a block that has a multiprocessor, and its L1, to itself
constexpr int kHalo = 16;           // samples of a class on both sides that such a block keeps at hand

// The values of one class of which the block has some at hand: those of slots [first, first + count).
template <typename V>
struct StagedClass {
  ClassValues<V> all;
  const double* staged_value;
  const int32_t* staged_position;
  int32_t first;  // in the class; may be negative
  int32_t count;

  __device__ int32_t position(int32_t t) const {
    const int32_t i = t - first;
    return i >= 0 && i < count ? staged_position[i] : static_cast<int32_t>(all.position(t));
  }
  __device__ double operator[](int32_t t) const {
    if (t < 0 || t >= all.n) return all[t];
    const int32_t i = t - first;
    return i >= 0 && i < count ? staged_value[i] : all[t];
  }
};

// Of positions low (outside the ball, or -1) and high (inside): the first inside, between neighbours of a class. Where
// the class has no sample nearer to the ball's edge, that is one of the two ends, which `Closed` tells.
template <bool Closed, typename V>
__device__ inline int32_t first_between(const V* value, double x, double r, bool closed, int32_t low, int32_t high) {
  const auto inside = [&](int32_t i) {
    const double d = x - static_cast<double>(value[i]);
    return closed ? d <= r : d < r;
  };
  if (high - low > 1) {
    const int32_t probe = Closed ? high - 1 : low + 1;
    (inside(probe) ? high : low) = probe;
  }
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    (inside(middle) ? high : low) = middle;
  }
  return high;
}
// Of positions low (inside) and high (outside, or n): the first outside.
template <bool Closed, typename V>
__device__ inline int32_t end_between(const V* value, double x, double r, bool closed, int32_t low, int32_t high) {
  const auto inside = [&](int32_t i) {
    const double d = static_cast<double>(value[i]) - x;
    return closed ? d <= r : d < r;
  };
  if (high - low > 1) {
    const int32_t probe = Closed ? low + 1 : high - 1;
    (inside(probe) ? low : high) = probe;
  }
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    (inside(middle) ? low : high) = middle;
  }
  return high;
}

// psi(k_t) - psi(m_t) of sample t of a class (Open balls: of at least 2 k + 2 samples).
template <bool Closed, typename V>
__device__ inline int64_t own_sample(const Feature<V>& f, const StagedClass<V>& v, int32_t t) {
  const auto size = static_cast<int32_t>(v.all.n), n = static_cast<int32_t>(f.n);
  const int32_t k = Closed ? min(static_cast<int32_t>(f.k), size - 1) : static_cast<int32_t>(f.k);
  const double x = v[t];
  const int32_t l = window_begin(v, t, k);
  const double below = x - v[l], above = v[l + k] - x, r = below > above ? below : above;
  const bool closed = Closed || r == 0;
  const int32_t first = first_inside(v, size, x, r, closed, l), end = end_inside(v, size, x, r, closed, l + k);
  if (!Closed && size == n - 1) return f.psi[k] - f.psi[end - first];  // its target leaves the other sample out
  const V* value = f.value.value;
  const int32_t low = first > 0 ? v.position(first - 1) : -1, high = end < size ? v.position(end) : n;
  const int32_t begin = first_between<Closed>(value, x, r, closed, low, v.position(first));
  const int32_t m = end_between<Closed>(value, x, r, closed, v.position(end - 1), high) - begin;
  return Closed ? f.psi[end - first - 1] - f.psi[m - 1] : f.psi[k] - f.psi[m];
}

// Adds the lanes' sums by class; samples of a class are side by side. Every lane of the warp calls it.
__device__ inline void add_by_class(Total* sums, int32_t c, int64_t sum) {
  const int lane = threadIdx.x % kWarp;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int64_t other = __shfl_down_sync(kFullMask, sum, offset);
    const int32_t other_class = __shfl_down_sync(kFullMask, c, offset);
    if (lane + offset < kWarp && other_class == c) sum += other;
  }
  const int32_t before = __shfl_sync(kFullMask, c, lane == 0 ? 0 : lane - 1);
  if (c >= 0 && (lane == 0 || before != c)) add(&sums[c], sum);
}

// A block takes a part of a feature's samples in the order of their classes. Closed balls: the first sample of a class
// in a run of more than k equal values is left over, for one_sample to deal with all of them.
template <typename V, bool Closed>
__global__ void __launch_bounds__(kWideThreads, 1)
    among_own_class(const Chunk c, const V* values, const int64_t parts, const int64_t tiles) {
  constexpr int kStaged = kWideThreads + 2 * kHalo;
  CSG_SHARED(double, staged_value, kStaged);
  CSG_SHARED(int32_t, staged_position, kStaged);
  const auto n = static_cast<int32_t>(c.samples);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t feature = tile / parts, part = tile - feature * parts;
    const auto begin = static_cast<int32_t>(c.samples * part / parts);
    const auto end = static_cast<int32_t>(c.samples * (part + 1) / parts);
    const Feature<V> f(c, values, feature);
    for (int32_t first = begin; first < end; first += kWideThreads) {
      for (int i = threadIdx.x; i < kStaged; i += kWideThreads) {
        const int32_t slot = first - kHalo + i;
        if (slot < 0 || slot >= n) continue;
        const auto p = static_cast<int32_t>(f.list[slot] & c.position_mask());
        staged_position[i] = p;
        staged_value[i] = static_cast<double>(f.value.value[p]);
      }
      __syncthreads();
      const int32_t slot = first + static_cast<int32_t>(threadIdx.x);
      int32_t label = -1, p = 0;
      int64_t sum = 0;
      bool starts_run = false;
      if (slot < end) {
        label = static_cast<int32_t>(f.list[slot] >> c.fields.position & c.class_mask());
        p = staged_position[kHalo + threadIdx.x];
        const int32_t class_begin = c.class_begin[label], t = slot - class_begin;
        const StagedClass<V> v{f.values_of(label), staged_value, staged_position, first - kHalo - class_begin, kStaged};
        if (v.all.n < 2) {
          // Its target leaves it out.
        } else if (!Closed && v.all.n < 2 * f.k + 2) {
          sum = small_group<Closed>(f, v.all, v.all.n, t, p);
        } else {
          sum = own_sample<Closed>(f, v, t);
        }
        if constexpr (Closed) {
          starts_run = !c.multiclass && !c.is_flagged(label) && v[t - 1] != v[t] && in_run(f.value, p, f.k);
        }
        if (c.multiclass) label = 0;
      }
      add_by_class(c.own + feature * c.width, label, sum);
      if constexpr (Closed) append(c, starts_run, feature, p, true);
      __syncthreads();
    }
  }
}

}  // namespace
}  // namespace csg
