// The CUDA kernel of mutual_info that turns integer sums into mutual information. Part of mutual_info_cuda.cu.
#pragma once

#include <cmath>

#include "mutual_info_chunk.cuh"

namespace csg {
namespace {

template <bool Closed>
__global__ void __launch_bounds__(kThreads) finish(const MutualInfo p, const Chunk c, const Summary summary) {
  const int64_t step = int64_t(gridDim.x) * kThreads, n = c.samples;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < c.features * c.width; at += step) {
    const int64_t feature = at / c.width, target = at - feature * c.width;
    PsiSum sum = c.own[at].value();  // becomes N MI of the samples that take part
    int64_t taking_part = n;
    if (c.multiclass) {
      sum += summary.weighted;
    } else if (c.few) {
      const auto two_or_more = [](int64_t size) { return size > 1 ? size : 0; };  // a single sample takes no part
      const int64_t size = two_or_more(c.class_size[target]);
      taking_part = size + two_or_more(n - c.class_size[target]);
      sum += of_sizes(p.psi, taking_part, size);
    } else {
      const int64_t size = c.class_size[target], others = n - size;
      PsiSum all = 0, rest = c.without[at].value();
      if constexpr (!Closed) {
        all = c.generics[feature].value();
        rest += all - c.generic[at].value();
      }
      if (size == 0 || others == 0) {
        sum = all;
      } else if (size == 1) {
        sum = Closed ? 0 : rest, taking_part = n - 1;
      } else if (others == 1) {
        if constexpr (Closed) sum = 0;
        taking_part = size;
      } else {
        sum += of_sizes(p.psi, n, size) + (target == c.dominant ? c.rest[feature].value() : rest);
      }
    }
    const bool finite = c.scale == nullptr || c.scale[feature].deviation < INFINITY;
    p.out[(c.first + feature) * c.width + target] =
        finite ? mean_of(sum, taking_part, p.psi_bits) : static_cast<double>(NAN);
  }
}

}  // namespace
}  // namespace csg
