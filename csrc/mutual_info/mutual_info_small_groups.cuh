// CUDA kernels of mutual_info for groups so small that every sample is compared with every other: few samples at all,
// and those beside a class that holds nearly all. Part of mutual_info_cuda.cu.
#pragma once

#include <cmath>

#include "mutual_info_chunk.cuh"
#include "mutual_info_feature.cuh"

namespace csg {
namespace {

// The k-th smallest of distance(j), j in [0, n); samples that do not count have a negative one.
template <typename Distance>
__device__ inline double kth_smallest(int64_t n, int64_t k, Distance distance) {
  double reached = -1;
  for (int64_t found = 0; found < k;) {
    double next = INFINITY;
    int64_t times = 0;
    for (int64_t j = 0; j < n; ++j) {
      const double d = distance(j);
      if (!(d > reached)) continue;
      times = d < next ? 1 : times + (d == next);
      next = d < next ? d : next;
    }
    if (times == 0) break;
    found += times;
    reached = next;
  }
  return reached;
}

// The square of x - y as scikit-learn's brute force has it, which takes groups of at most 2 k + 1 samples.
__device__ inline double square_of_difference(double x, double y) {
  const double d = (__dmul_rn(x, x) - 2 * __dmul_rn(x, y)) + __dmul_rn(y, y);
  return d > 0 ? d : 0;
}

// psi(k_i) - psi(m_i) of sample i of a group of 2 <= n <= 2 k + 1 samples, which stands at `p` in the feature.
template <bool Closed, typename V, typename Group>
__device__ inline int64_t small_group(const Feature<V>& f, const Group& v, int64_t n, int64_t i, int64_t p) {
  const int64_t k = min(f.k, n - 1);
  const double x = v[i];
  double r;
  if constexpr (Closed) {
    r = kth_smallest(n, k, [&](int64_t j) { return j == i ? -2 : fabs(x - v[j]); });
  } else {
    r = sqrt(kth_smallest(n, k, [&](int64_t j) { return j == i ? -2 : square_of_difference(x, v[j]); }));
  }
  const bool closed = Closed || r == 0;
  int64_t m = end_inside(f.value, f.n, x, r, closed, p) - first_inside(f.value, f.n, x, r, closed, p), own = k;
  if constexpr (Closed) {
    own = -1;
    for (int64_t j = 0; j < n; ++j) own += fabs(x - v[j]) <= r;
    --m;
  }
  return f.psi[own] - f.psi[m];
}

// The samples beside the dominant class, a thread for each.
template <typename V, bool Closed>
__global__ void __launch_bounds__(kThreads) beside_dominant(const Chunk c, const V* values) {
  const int64_t step = int64_t(gridDim.x) * kThreads, begin = c.class_begin[c.dominant];
  const int64_t size = c.class_size[c.dominant], others = c.samples - size;
  if (others < 2) return;  // the class's target leaves a single one out
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < c.features * others; i += step) {
    const int64_t feature = i / others, member = i - feature * others;
    const Feature<V> f(c, values, feature);
    struct Others {
      const Feature<V>& f;
      int64_t begin, size;
      __device__ int64_t position(int64_t j) const {
        return static_cast<int64_t>(f.list[j < begin ? j : j + size] & f.chunk.position_mask());
      }
      __device__ double operator[](int64_t j) const { return f.value[position(j)]; }
    };
    const Others v{f, begin, size};
    add(&c.rest[feature], small_group<Closed>(f, v, others, member, v.position(member)));
  }
}

// Every target in turn, every sample against every other, a thread per feature and target (as the CPU's `direct`).
template <bool Closed>
__global__ void __launch_bounds__(kThreads, kBlocks)
    few_samples(const MutualInfo p, const Chunk c, const double* columns) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < c.features * c.width; at += step) {
    const int64_t feature = at / c.width, target = at - feature * c.width;
    const double* x = columns + feature * p.n;
    const auto row = [&](int64_t member) { return c.row == nullptr ? member : int64_t(c.row[member]); };
    const auto group = [&](int64_t i) { return p.multiclass ? p.labels[i] : int64_t(p.labels[i] == target); };
    const auto size_of = [&](int64_t g) -> int64_t {
      if (p.multiclass) return c.class_size[g];
      return g == 1 ? c.class_size[target] : p.n - c.class_size[target];
    };
    PsiSum sum = 0;
    for (int64_t a = 0; a < c.samples; ++a) {
      const int64_t i = row(a), g = group(i), size = size_of(g), k = min(c.neighbors, size - 1);
      if (size < 2) continue;  // a group of one sample is left out
      const bool squares = !Closed && k >= size / 2;
      double r = kth_smallest(c.samples, k, [&](int64_t b) {
        const int64_t j = row(b);
        if (j == i || group(j) != g) return -2.0;
        return squares ? square_of_difference(x[i], x[j]) : fabs(x[i] - x[j]);
      });
      if (squares) r = sqrt(r);
      const bool closed = Closed || r == 0;
      int64_t m = 0, own = Closed ? -1 : k;
      for (int64_t b = 0; b < c.samples; ++b) {
        const int64_t j = row(b);
        const double d = fabs(x[i] - x[j]);
        if (!(closed ? d <= r : d < r)) continue;
        m += size_of(group(j)) > 1;
        own += Closed && group(j) == g;
      }
      sum += p.psi[own] - p.psi[Closed ? m - 1 : m];
    }
    c.own[at] = Total(sum);
  }
}

}  // namespace
}  // namespace csg
