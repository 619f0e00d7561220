// CUDA kernels of mutual_info that count the labels: what depends on them alone. Part of mutual_info_cuda.cu.
#pragma once

#include "../common/cuda_launch.cuh"
#include "mutual_info_chunk.cuh"

namespace csg {
namespace {

__global__ void __launch_bounds__(kThreads) count_classes(const MutualInfo p, const Chunk c) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < p.n; i += step) {
    const int64_t label = p.labels[i];
    if (label >= 0 && label < p.classes) {
      atomicAdd(&c.class_size[label], 1);
    } else {
      atomicMin(&c.summary->bad_row, static_cast<unsigned long long>(i));
    }
  }
}

// One block. The multi-class value leaves classes of one sample out: their size becomes zero.
__global__ void __launch_bounds__(kThreads) summarise(const MutualInfo p, const Chunk c) {
  CSG_SHARED(int64_t, samples, kThreads);
  CSG_SHARED(PsiSum, weights, kThreads);
  const int thread = threadIdx.x;
  const int64_t share = (p.classes + kThreads - 1) / kThreads;
  const int64_t from = min(thread * share, p.classes), to = min(from + share, p.classes);
  int64_t sum = 0;
  PsiSum weight = 0;
  for (int64_t i = from; i < to; ++i) {
    if (p.multiclass && c.class_size[i] == 1) c.class_size[i] = 0;
    const int64_t size = c.class_size[i];
    sum += size;
    weight += PsiSum(size) * p.psi[size];
  }
  samples[thread] = sum, weights[thread] = weight;
  __syncthreads();
  int64_t begin = 0, n = 0;
  PsiSum weighted = 0;
  for (int i = 0; i < kThreads; ++i) {
    begin += i < thread ? samples[i] : 0;
    n += samples[i];
    weighted += weights[i];
  }
  for (int64_t i = from; i < to; ++i) {
    const int64_t size = c.class_size[i], rest = n - size;
    c.class_begin[i] = static_cast<int32_t>(begin);
    begin += size;
    if (!p.multiclass && rest >= 1 && rest <= 2 * p.neighbors + 1) c.summary->dominant = i;
  }
  if (thread == 0) c.summary->samples = n, c.summary->weighted = PsiSum(n) * p.psi[n] - weighted;
}

// The rows that take part, in any order. `found` is zero.
__global__ void __launch_bounds__(kThreads) find_rows(const MutualInfo p, const Chunk c, unsigned* found) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < p.n; i += step)
    if (c.class_size[p.labels[i]] > 0) c.row[atomicAdd(found, 1u)] = static_cast<int32_t>(i);
}

}  // namespace
}  // namespace csg
