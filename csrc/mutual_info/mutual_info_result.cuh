// The CUDA kernel of mutual_info that turns integer sums into mutual information. Part of mutual_info_cuda.cu.
#pragma once

#include <cmath>

#include "mutual_info_chunk.cuh"

namespace csg {
namespace {

template <bool Closed>
__global__ void __launch_bounds__(kThreads) finish(const MutualInfo p, const Chunk c, const Summary summary) {
  const int64_t step = int64_t(gridDim.x) * kThreads, n = c.samples;
  const double unit = 1 / static_cast<double>(int64_t(1) << p.psi_bits);
  const auto psi = [&](int64_t i) { return static_cast<double>(p.psi[i]) * unit; };
  const auto mean = [&](int64_t sum, int64_t count) {
    return static_cast<double>(sum) * unit / static_cast<double>(count);
  };
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < c.features * c.width; at += step) {
    const int64_t feature = at / c.width, target = at - feature * c.width;
    const auto own = static_cast<int64_t>(c.own[at]);
    double mi = 0;
    if (c.multiclass) {
      if (n > 0) mi = psi(n) + mean(own - summary.weighted, n);
    } else if (c.few) {
      double sizes = 0;
      int64_t total = 0;
      for (const int64_t size : {n - c.class_size[target], static_cast<int64_t>(c.class_size[target])})
        if (size > 1) total += size, sizes += __dmul_rn(static_cast<double>(size), psi(size));
      if (total > 0) mi = psi(total) + (static_cast<double>(own) * unit - sizes) / static_cast<double>(total);
    } else {
      const int64_t size = c.class_size[target], others = n - size;
      int64_t all = 0, rest = static_cast<int64_t>(c.without[at]);
      if constexpr (!Closed) {
        all = static_cast<int64_t>(c.generics[feature]);
        rest += all - static_cast<int64_t>(c.generic[at]);
      }
      if (size == 0 || others == 0) {
        mi = mean(all, n);
      } else if (size == 1) {
        mi = Closed ? 0 : mean(rest, n - 1);
      } else if (others == 1) {
        mi = Closed ? 0 : mean(own, size);
      } else {
        if (target == c.dominant) rest = static_cast<int64_t>(c.rest[feature]);
        mi = c.constant[target] + mean(own + rest, n);
      }
    }
    const bool finite = c.scale == nullptr || c.scale[feature].deviation < INFINITY;
    p.out[(c.first + feature) * c.width + target] = !finite ? static_cast<double>(NAN) : mi > 0 ? mi : 0;
  }
}

}  // namespace
}  // namespace csg
