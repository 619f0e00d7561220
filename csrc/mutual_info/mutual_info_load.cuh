// CUDA kernels of mutual_info that turn features into words to sort. Part of mutual_info_cuda.cu.
#pragma once

#include <cmath>
#include <cstring>

#include "../common/cuda_launch.cuh"
#include "mutual_info_chunk.cuh"

namespace csg {
namespace {

constexpr int kTile = 32;   // rows and columns transposed by a block
constexpr int kLeaf = 128;  // most values that NumPy adds without halving

// Keys: unsigned integers in the order of the values.
__device__ inline uint32_t key_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ inline uint64_t key_of(double v) {
  uint64_t bits;
  memcpy(&bits, &v, 8);
  return bits ^ (bits >> 63 ? ~uint64_t(0) : uint64_t(1) << 63);
}
__device__ inline float value_of(uint32_t key, int dropped) {
  uint32_t bits = key ^ (key >> 31 ? 0x80000000u : 0xffffffffu);
  bits &= ~((1u << dropped) - 1);
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
__device__ inline double value_of(uint64_t key) {
  const uint64_t bits = key ^ (key >> 63 ? uint64_t(1) << 63 : ~uint64_t(0));
  double v;
  memcpy(&v, &bits, 8);
  return v;
}

// What becomes of sample i of feature f.
struct StoreWord {
  Word64* words;
  const int64_t* labels;
  const int32_t* row;
  int64_t samples;
  Fields fields;

  __device__ void operator()(int64_t f, int64_t i, float v) const {
    const int64_t at = row == nullptr ? i : row[i];
    const Word64 key = key_of(v) >> fields.dropped;
    words[f * samples + i] = (static_cast<Word64>(f) << fields.key | key) << fields.classes | Word64(labels[at]);
  }
};
struct StoreColumn {
  double* x;
  int64_t samples;

  __device__ void operator()(int64_t f, int64_t i, double v) const { x[f * samples + i] = v; }
};
struct AddNoise {
  double* x;
  const Scale* scale;
  int64_t samples;

  __device__ void operator()(int64_t f, int64_t i, double v) const {
    const Scale s = scale[f];
    double& to = x[f * samples + i];
    to = to / s.deviation + __dmul_rn(s.noise, v);
  }
};

struct Matrix {
  int64_t samples, features, stride_n, stride_k;
  unsigned sample_tiles, tiles;
  const int32_t* row;  // of each sample, or nullptr
};

// Read along the features (or along the samples, where those lie side by side), stored along the samples.
template <typename X, typename Store>
__global__ void __launch_bounds__(kThreads, kBlocks) transpose(const X* from, const Matrix m, const Store store) {
  CSG_SHARED(Acc<X>, staged, kTile * (kTile + 1));  // [samples][features]
  const int lane = threadIdx.x % kTile, first = threadIdx.x / kTile;
  constexpr int kStep = kThreads / kTile;
  const bool by_samples = m.stride_n == 1 && m.stride_k != 1;
  for (unsigned tile = blockIdx.x; tile < m.tiles; tile += gridDim.x) {
    const unsigned feature_tile = tile / m.sample_tiles;
    const int64_t f0 = feature_tile * kTile, i0 = int64_t(tile - feature_tile * m.sample_tiles) * kTile;
#pragma unroll
    for (int j = first; j < kTile; j += kStep) {
      const int di = by_samples ? lane : j, df = by_samples ? j : lane;
      if (i0 + di >= m.samples || f0 + df >= m.features) continue;
      const int64_t i = m.row == nullptr ? i0 + di : m.row[i0 + di];
      staged[di * (kTile + 1) + df] = to_acc(from[i * m.stride_n + (f0 + df) * m.stride_k]);
    }
    __syncthreads();
#pragma unroll
    for (int j = first; j < kTile; j += kStep)
      if (i0 + lane < m.samples && f0 + j < m.features) store(f0 + j, i0 + lane, staged[lane * (kTile + 1) + j]);
    __syncthreads();
  }
}

// A node of the tree by whose halves NumPy adds n values: the one that `path`, a bit per level, leads to from the root,
// or the leaf that ends it early.
struct Node {
  int64_t begin, size;
  int level;

  __device__ Node(int64_t n, int levels, int64_t path) : begin(0), size(n), level(0) {
    for (; level < levels && size > kLeaf; ++level) {
      const int64_t half = size / 2 - size / 2 % 8;
      const bool second = path >> (levels - 1 - level) & 1;
      begin += second ? half : 0;
      size = second ? size - half : half;
    }
  }
};

// Levels after which every node is a leaf.
int tree_levels(int64_t n) {
  int levels = 0;
  for (; n > kLeaf; n = (n + 1) / 2 + 7) ++levels;
  return levels;
}

// NumPy's pairwise sum of f(x[i]) by a whole block: eight lanes add a leaf of the tree. `sums`: [2^levels].
template <typename F>
__device__ inline double pairwise_sum(const double* x, int64_t n, int levels, double* sums, F f) {
  constexpr int kLanes = 8;
  const int lane = threadIdx.x % kLanes;
  const unsigned mask = 0xffu << (threadIdx.x % kWarp / kLanes * kLanes);
  for (int64_t path = threadIdx.x / kLanes; path < int64_t(1) << levels; path += kThreads / kLanes) {
    const Node node(n, levels, path);
    if ((path & ((int64_t(1) << (levels - node.level)) - 1)) != 0) continue;  // the leaf of another path
    const double* v = x + node.begin;
    double sum = 0;
    int64_t i = 0;
    if (node.size >= kLanes) {
      sum = f(v[lane]);
      for (i = kLanes; i + kLanes <= node.size; i += kLanes) sum += f(v[i + lane]);
      for (int offset = 1; offset < kLanes; offset *= 2) sum += __shfl_xor_sync(mask, sum, offset);
    }
    for (; i < node.size; ++i) sum += f(v[i]);
    if (lane == 0) sums[path] = sum;
  }
  __syncthreads();
  for (int level = levels - 1; level >= 0; --level) {
    const int64_t reach = int64_t(1) << (levels - level);
    for (int64_t i = threadIdx.x; i < int64_t(1) << level; i += kThreads) {
      const Node node(n, level, i);
      if (node.level == level && node.size > kLeaf) sums[i * reach] += sums[i * reach + reach / 2];
    }
    __syncthreads();
  }
  const double sum = sums[0];
  __syncthreads();
  return sum;
}

// A block per column: its standard deviation and the size of its noise, as scikit-learn has them; without noise, the
// column made small enough that differences do not overflow.
__global__ void __launch_bounds__(kThreads, kBlocks)
    scale_columns(double* columns, int64_t n, int64_t features, int levels, double* sums, Scale* scale) {
  CSG_SHARED(double, tops, kThreads);
  for (int64_t f = blockIdx.x; f < features; f += gridDim.x) {
    double* const x = columns + f * n;
    if (scale == nullptr) {
      double top = 0;
      for (int64_t i = threadIdx.x; i < n; i += kThreads) top = fabs(x[i]) > top ? fabs(x[i]) : top;
      tops[threadIdx.x] = top;
      __syncthreads();
      for (int i = 0; i < kThreads; ++i) top = tops[i] > top ? tops[i] : top;
      __syncthreads();
      if (top > 0x1p1021)
        for (int64_t i = threadIdx.x; i < n; i += kThreads) x[i] *= 0.25;
      continue;
    }
    double* const of_column = sums + f * (int64_t(1) << levels);
    const auto count = static_cast<double>(n);
    const double mean = pairwise_sum(x, n, levels, of_column, [](double v) { return v; }) / count;
    const auto square = [mean](double v) { return __dmul_rn(v - mean, v - mean); };
    double deviation = sqrt(pairwise_sum(x, n, levels, of_column, square) / count);
    if (deviation < 10 * 0x1p-52) deviation = 1;
    const auto scaled = [deviation](double v) { return fabs(v / deviation); };
    const double size = pairwise_sum(x, n, levels, of_column, scaled) / count;
    // Not finite: the column becomes a constant, and its results NaN in the end.
    const bool finite = deviation < INFINITY;
    if (threadIdx.x == 0) scale[f] = {finite ? deviation : INFINITY, finite ? 1e-10 * (size > 1 ? size : 1) : 0};
  }
}

__global__ void __launch_bounds__(kThreads)
    pack_columns(const double* columns, int64_t n, const int64_t* labels, const Chunk c, Word128* words) {
  const int64_t step = int64_t(gridDim.x) * kThreads, total = c.features * c.samples;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    const int64_t f = i / c.samples, at = c.row == nullptr ? i - f * c.samples : c.row[i - f * c.samples];
    words[i] = (static_cast<Word128>(f) << 64 | key_of(columns[f * n + at])) << c.fields.classes | Word64(labels[at]);
  }
}

}  // namespace
}  // namespace csg
