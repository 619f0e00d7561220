// CUDA kernels of mutual_info. Features are taken in chunks; work memory holds, per sample and feature of a chunk:
//   words, spare   8 bytes each (fp64 and Ties::Noise: 16): what is sorted; afterwards the lists of the classes, and
//                  the list of samples that the fast paths leave over
//   value, label   4 (8) and 4 bytes: the feature sorted
//
// Bytes that must move per sample and feature, for fp32 with Ties::Exact, f bits of features in a chunk (at most 8) and
// c bits of classes:
//   transpose          4 read, 8 written: [feature | key | class], the key's order that of the values
//   radix_sort         8 + 16 ceil((32 + f) / 8): by feature and value
//   unpack             8 read, 16 written: value, label, [feature | class | position]
//   radix_sort         8 + 16 ceil((c + f) / 8): stable by feature and class: every class's positions, ascending
//   among_own_class    8 read; ten to twenty values of the sorted feature looked up, which L1 or L2 holds
//   among_all          8 read, at most k atomic additions
//   one_sample         as many of the samples as have ties or crowded classes around them
// (50,000 samples, 1000 classes: 196 bytes.) Share of the memory bandwidth reached: not measured on a GPU.
//
// Sums are 64-bit integers, so that the order of the atomic additions changes no bit. Products that are added to
// something are rounded first (__dmul_rn): fused, they would not be the CPU's.
#include "mutual_info_cuda.h"

#include <algorithm>
#include <cmath>

#include "../common/cuda_device.cuh"
#include "../common/cuda_launch.cuh"
#include "../common/radix_sort_cuda.h"
#include "mutual_info_sample.h"

namespace csg {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;               // of a multiprocessor: registers enough to spill none
constexpr int kWideThreads = 1024;       // of a block that has a multiprocessor, and its L1, to itself
constexpr int kHalo = 16;                // samples of a class on both sides that such a block keeps at hand
constexpr int kTile = 32;                // rows and columns transposed by a block
constexpr int kMaxFeatureBits = 8;       // of a chunk: with a 32-bit key five passes of eight bits
constexpr int64_t kWorkBytes = 1 << 30;  // of a chunk of several features
constexpr int kLeaf = 128;               // most values that NumPy adds without halving
constexpr int64_t kShortBall = 32;       // samples of a closed ball that one thread looks at

// What depends on the labels alone.
struct Summary {
  unsigned long long bad_row;
  int64_t samples;   // that take part
  int64_t dominant;  // as in SortedFeature
  int64_t weighted;  // sum of n_c psi(n_c) over classes of at least two samples
};

struct Scale {
  double deviation, noise;
};

// Where the fields of a word stand, from its low end: [feature | key | class] and [feature | class | position].
struct Fields {
  int key, classes, position;  // bits
  int dropped;                 // low bits of a float that are zero in a half type
};

// A chunk of features and all that kernels need of it.
struct Chunk {
  int64_t first;  // feature
  int64_t features, samples, neighbors, classes, width;
  bool multiclass;
  bool few;  // samples: fewer than 4 k + 8
  int64_t dominant;
  Fields fields;
  const int64_t* psi;

  int32_t* class_size;   // [classes]; one against the rest: of all samples
  int32_t* class_begin;  // [classes] in the lists
  double* constant;      // [classes] what MI holds beside the sums
  int32_t* row;          // [samples] rows of the features that take part
  Summary* summary;
  const Scale* scale;  // [features], or nullptr: no noise

  int32_t* label;                // [features, samples] as in SortedFeature
  const Word64* list;            // [features, samples] positions by class
  Word64* left_over;             // [features * samples] feature << 32 | position << 1 | is_run
  unsigned long long* count;     // of left_over
  unsigned long long* own;       // [features, width] sums of samples among their own class
  unsigned long long* without;   // [features, width] what changes without a class
  unsigned long long* generic;   // [features, width] sums of a class's samples among all, open balls only
  unsigned long long* generics;  // [features] over all classes
  unsigned long long* rest;      // [features] of the samples beside the dominant class

  __device__ Word64 class_mask() const { return (Word64(1) << fields.classes) - 1; }
  __device__ Word64 position_mask() const { return (Word64(1) << fields.position) - 1; }
  // The class takes no corrections in the fast path.
  __device__ bool is_flagged(int32_t c) const { return !multiclass && (c == dominant || class_size[c] == 1); }
};

__device__ inline void add(unsigned long long* sum, int64_t d) {
  if (d != 0) atomicAdd(sum, static_cast<unsigned long long>(d));
}

// ---- Labels.

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
  CSG_SHARED(int64_t, weights, kThreads);
  const int thread = threadIdx.x;
  const int64_t share = (p.classes + kThreads - 1) / kThreads;
  const int64_t from = min(thread * share, p.classes), to = min(from + share, p.classes);
  int64_t sum = 0, weight = 0;
  for (int64_t i = from; i < to; ++i) {
    if (p.multiclass && c.class_size[i] == 1) c.class_size[i] = 0;
    const int64_t size = c.class_size[i];
    sum += size;
    if (size > 1) weight += size * p.psi[size];
  }
  samples[thread] = sum, weights[thread] = weight;
  __syncthreads();
  int64_t begin = 0, n = 0, weighted = 0;
  for (int i = 0; i < kThreads; ++i) {
    begin += i < thread ? samples[i] : 0;
    n += samples[i];
    weighted += weights[i];
  }
  const double unit = 1 / static_cast<double>(int64_t(1) << p.psi_bits);
  const auto psi = [&](int64_t i) { return static_cast<double>(p.psi[i]) * unit; };
  for (int64_t i = from; i < to; ++i) {
    const int64_t size = c.class_size[i], rest = n - size;
    c.class_begin[i] = static_cast<int32_t>(begin);
    begin += size;
    const double sums =
        __dmul_rn(static_cast<double>(size), psi(size)) + __dmul_rn(static_cast<double>(rest), psi(rest));
    c.constant[i] = psi(n) - sums / static_cast<double>(n);
    if (!p.multiclass && rest >= 1 && rest <= 2 * p.neighbors + 1) c.summary->dominant = i;
  }
  if (thread == 0) c.summary->samples = n, c.summary->weighted = weighted;
}

// The rows that take part, in any order. `found` is zero.
__global__ void __launch_bounds__(kThreads) find_rows(const MutualInfo p, const Chunk c, unsigned* found) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < p.n; i += step)
    if (c.class_size[p.labels[i]] > 0) c.row[atomicAdd(found, 1u)] = static_cast<int32_t>(i);
}

// ---- Loading.

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

// ---- The sorted feature.

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

// ---- Samples among their own class.

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
__device__ inline void add_by_class(unsigned long long* sums, int32_t c, int64_t sum) {
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

// ---- Samples among all samples, one class taken out.

// Blocks of a multiprocessor: as many as leave the neighbours in registers.
template <int T>
constexpr int kNearBlocks = T == 32   ? 1
                            : T == 16 ? 2
                                      : 5;

// As the CPU's among_all: T neighbours of a sample, k < T. Where their distances differ, the ball without class c
// reaches to the k-th neighbour of another class, at rank k + e with e neighbours of class c before it. T = 0: every
// sample is left over.
template <typename V, bool Closed, int T>
__global__ void __launch_bounds__(kThreads, kNearBlocks<T>)
    among_all(const Chunk c, const V* values, const unsigned feature_tiles, const unsigned tiles) {
  constexpr int kMost = T == 0 ? 0 : T / 2 - 1;  // neighbours
  CSG_SHARED(double, value, kThreads + 2 * T);
  CSG_SHARED(int32_t, label, kThreads + 2 * T);
  const int thread = threadIdx.x, k = static_cast<int>(c.neighbors);
  for (unsigned tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t feature = tile / feature_tiles, first = int64_t(tile % feature_tiles) * kThreads;
    const Feature<V> f(c, values, feature);
    const int64_t p = first + thread;
    bool slow = p < f.n;
    if constexpr (T == 0) {
      slow = slow && !(Closed && in_run(f.value, p, f.k));
    } else {
      for (int i = thread; i < kThreads + 2 * T; i += kThreads) {
        const int64_t at = first - T + i;
        value[i] = f.value[at];
        label[i] = at >= 0 && at < f.n ? f.label[at] : 0;
      }
      __syncthreads();
      if (p < f.n) {
        int left = thread + T - 1, right = thread + T + 1;
        const double x = value[thread + T];
        const int32_t own = label[thread + T];
        double below = x - value[left], above = value[right] - x, last = -1, kth = 0;
        int32_t near[T];
        bool ordered = true;
#pragma unroll
        for (int j = 0; j < T; ++j) {
          const bool take_left = below < above;
          const double d = take_left ? below : above;
          near[j] = label[take_left ? left : right];
          ordered = ordered && last < d;
          last = d;
          if (j + 1 == k) kth = d;
          if (j + 1 == T) break;
          left -= take_left, right += !take_left;
          const double next = value[take_left ? left : right];
          below = take_left ? x - next : below;
          above = take_left ? above : next - x;
        }
        slow = !(kth > 0 && ordered && last < static_cast<double>(INFINITY));
        int extra[kMost];
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
          const int32_t target = near[i];
          bool skip = i >= k || target == own || target < 0;
#pragma unroll
          for (int j = 0; j < i; ++j) skip = skip || near[j] == target;
          int e = 0;
#pragma unroll
          for (int j = 0; j + 1 < T; ++j) e += near[j] == target && (j < k || e > j - k);
          slow = slow || (!skip && e >= T - k);
          extra[i] = skip ? 0 : e;
        }
        unsigned long long* const without = c.without + feature * c.width;
        const int64_t* const psi = c.psi + k;
#pragma unroll
        for (int i = 0; i < kMost; ++i)
          if (!slow && extra[i] != 0) add(&without[near[i]], psi[0] - psi[extra[i]]);
        if (Closed && kth == 0) slow = false;  // in a run
      }
    }
    append(c, slow, feature, p, false);
    if constexpr (T > 0) __syncthreads();
  }
}

// The closed ball of sample p, by a warp: sample by sample or class by class, whichever is less.
template <typename V, typename Emit>
__device__ inline void long_ball(const Feature<V>& f, int64_t p, int lane, Emit emit) {
  const ClosedBall ball = closed_ball_of(f, p);
  const int32_t own = f.label[p];
  if (ball.end - ball.begin <= f.chunk.classes) {
    for (int64_t i = ball.begin + lane; i < ball.end; i += kWarp) member_of_ball(f, ball, i, own, emit);
    return;
  }
  for (int64_t i = lane; i < f.chunk.classes; i += kWarp) {
    const auto c = static_cast<int32_t>(i);
    const int64_t size = f.class_size[c];
    if (c == class_of(own) || f.chunk.is_flagged(c)) continue;
    const int64_t rank = first_inside(f.values_of(c), size, ball.x, ball.reach, true, size / 2);
    const int64_t q = class_inside(f, c, rank, ball.x, ball.reach);
    if (q > 0) emit(c, without_class(f, ball.x, ball.begin, ball.end, c, q, rank));
  }
}

// What the fast path leaves over: samples with ties or crowded classes around them; runs, by class.
template <typename V, bool Closed>
__global__ void __launch_bounds__(kThreads, kBlocks) one_sample(const Chunk c, const V* values) {
  const auto count = static_cast<int64_t>(*c.count), step = int64_t(gridDim.x) * kThreads;
  const int lane = threadIdx.x % kWarp;
  // Whole warps: lanes help each other with long balls.
  for (int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x - lane; first < count; first += step) {
    const bool active = first + lane < count;
    const Word64 item = active ? c.left_over[first + lane] : 0;
    const auto feature = static_cast<int64_t>(item >> 32), p = static_cast<int64_t>(item >> 1 & 0x7fffffff);
    const Feature<V> f(c, values, feature);
    const auto emit = [&](int32_t label, int64_t d) { add(&c.without[feature * c.width + label], d); };
    bool is_long = false;
    if (!active) {
      // Nothing to do but to help.
    } else if constexpr (!Closed) {
      const int64_t generic = open_ball(f, p, emit);
      add(&c.generic[feature * c.width + class_of(f.label[p])], generic);
      add(&c.generics[feature], generic);
    } else if (item & 1) {
      // The first of its class in a run; this class's part of what the run changes.
      member_of_ball(f, closed_ball_of(f, p), p, f.label[p], emit);
    } else {
      const ClosedBall ball = closed_ball_of(f, p);
      is_long = ball.end - ball.begin > kShortBall;
      for (int64_t i = ball.begin; i < ball.end && !is_long; ++i) member_of_ball(f, ball, i, f.label[p], emit);
    }
    if constexpr (Closed) {
      for (unsigned left = __ballot_sync(kFullMask, is_long); left != 0; left &= left - 1) {
        const int source = __popc((left & (0u - left)) - 1);
        const Word64 shared = __shfl_sync(kFullMask, item, source);
        const auto its_feature = static_cast<int64_t>(shared >> 32);
        long_ball(Feature<V>(c, values, its_feature), static_cast<int64_t>(shared >> 1 & 0x7fffffff), lane,
                  [&](int32_t label, int64_t d) { add(&c.without[its_feature * c.width + label], d); });
      }
    }
  }
}

// ---- Few samples.

// Every target in turn, every sample against every other, a thread per feature and target (as the CPU's `direct`).
template <bool Closed>
__global__ void __launch_bounds__(kThreads, kBlocks)
    few_samples(const MutualInfo p, const Chunk c, const double* columns) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x; at < c.features * c.width; at += step) {
    const int64_t feature = at / c.width, target = at - feature * c.width;
    const double* x = columns + feature * p.n;
    const auto group = [&](int64_t i) { return p.multiclass ? p.labels[i] : int64_t(p.labels[i] == target); };
    const auto size_of = [&](int64_t g) -> int64_t {
      if (p.multiclass) return c.class_size[g];
      return g == 1 ? c.class_size[target] : p.n - c.class_size[target];
    };
    int64_t sum = 0;
    for (int64_t i = 0; i < p.n; ++i) {
      const int64_t g = group(i), size = size_of(g), k = min(c.neighbors, size - 1);
      if (size < 2) continue;  // a group of one sample is left out
      const bool squares = !Closed && k >= size / 2;
      double r = kth_smallest(p.n, k, [&](int64_t j) {
        if (j == i || group(j) != g) return -2.0;
        return squares ? square_of_difference(x[i], x[j]) : fabs(x[i] - x[j]);
      });
      if (squares) r = sqrt(r);
      const bool closed = Closed || r == 0;
      int64_t m = 0, own = Closed ? -1 : k;
      for (int64_t j = 0; j < p.n; ++j) {
        const double d = fabs(x[i] - x[j]);
        if (!(closed ? d <= r : d < r)) continue;
        m += size_of(group(j)) > 1;
        own += Closed && group(j) == g;
      }
      sum += p.psi[own] - p.psi[Closed ? m - 1 : m];
    }
    c.own[at] = static_cast<unsigned long long>(sum);
  }
}

// ---- The result.

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

// ---- Launching.

int bits_of(int64_t count) {  // that tell `count` values apart
  int bits = 0;
  while (int64_t(1) << bits < count) ++bits;
  return bits;
}

bool is_wide(const MutualInfo& p) { return p.ties == Ties::Noise || p.type == ScalarType::Float64; }

// Where everything lies in the work memory when `features` are taken at a time.
struct Layout {
  int64_t features, bytes = 0;
  Fields fields;
  size_t scratch_bytes = 0;
  // Of all chunks.
  int64_t class_size, class_begin, constant, row, summary, found;
  // Of one.
  int64_t words, spare, value, label, scale, scratch, sums, sums_end, own, without, generic, generics, rest, count;

  int make(const MutualInfo& p, int64_t features_at_once) {
    const int64_t width = p.multiclass ? 1 : p.classes, word = is_wide(p) ? 16 : 8;
    fields.key = is_wide(p) ? 64 : 32;
    fields.dropped = p.type == ScalarType::BFloat16 ? 16 : p.type == ScalarType::Float16 ? 13 : 0;
    if (!is_wide(p)) fields.key -= fields.dropped;
    fields.classes = bits_of(p.classes);
    fields.position = bits_of(p.n);
    const int room = 64 - fields.classes - std::max(is_wide(p) ? 0 : fields.key, fields.position);
    features = std::min(features_at_once, int64_t(1) << std::min(room, kMaxFeatureBits));
    const int64_t items = features * p.n;
    int status = is_wide(p) ? radix_sort_bytes<Word128>(items, &scratch_bytes) : cudaSuccess;
    size_t narrow = 0;
    if (status == cudaSuccess) status = radix_sort_bytes<Word64>(items, &narrow);
    scratch_bytes = std::max(scratch_bytes, narrow);
    bytes = 0;
    const auto take = [&](int64_t* at, int64_t size) { *at = bytes, bytes += ceil_div(size, 256) * 256; };
    take(&class_size, 4 * p.classes);
    take(&class_begin, 4 * p.classes);
    take(&constant, 8 * p.classes);
    take(&row, p.multiclass ? 4 * p.n : 0);
    take(&summary, sizeof(Summary));
    take(&found, 4);
    take(&words, word * items);
    take(&spare, word * items);
    take(&value, word / 2 * items);
    take(&label, p.multiclass ? 0 : 4 * items);
    take(&scale, static_cast<int64_t>(sizeof(Scale)) * features);
    take(&scratch, static_cast<int64_t>(scratch_bytes));
    sums = bytes;
    take(&own, 8 * features * width);
    take(&without, p.multiclass ? 0 : 8 * features * width);
    take(&generic, p.multiclass || p.ties == Ties::Exact ? 0 : 8 * features * width);
    take(&generics, 8 * features);
    take(&rest, 8 * features);
    take(&count, 8);
    sums_end = bytes;
    return status;
  }

  // The most features at once that fit; one at least.
  int fit(const MutualInfo& p, int64_t most_bytes) {
    int status = make(p, p.k);
    while (status == cudaSuccess && bytes > most_bytes && features > 1) {
      const double share = static_cast<double>(most_bytes) / static_cast<double>(bytes);
      const auto fewer = static_cast<int64_t>(static_cast<double>(features) * share);
      status = make(p, std::max<int64_t>(1, std::min(features - 1, fewer)));
    }
    // Chunks of one size.
    if (status == cudaSuccess) status = make(p, ceil_div(p.k, ceil_div(p.k, features)));
    return status;
  }
};

// Launches until one fails.
class Launcher {
 public:
  explicit Launcher(void* stream) : stream_(stream) {}
  int status() const { return status_; }

  template <typename... Params>
  void blocks(void (*kernel)(Params...), int64_t tiles, int threads, std::type_identity_t<Params>... params) {
    then([&] { return launch(kernel, std::max<int64_t>(tiles, 1), threads, 0, stream_, params...); });
  }
  // A thread for each item, up to a number of threads that fills a GPU.
  template <typename... Params>
  void items(void (*kernel)(Params...), int64_t count, std::type_identity_t<Params>... params) {
    blocks(kernel, std::min(ceil_div(count, kThreads), 16 * kFillBlocks), kThreads, params...);
  }
  void clear(void* p, int value, int64_t bytes) {
    then([&] {
      return bytes == 0 ? cudaSuccess
                        : cudaMemsetAsync(p, value, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream_));
    });
  }
  template <typename T>
  T read(const T* p) {
    T value{};
    const auto stream = static_cast<cudaStream_t>(stream_);
    then([&] { return cudaMemcpyAsync(&value, p, sizeof(T), cudaMemcpyDeviceToHost, stream); });
    then([&] { return cudaStreamSynchronize(stream); });
    return value;
  }
  template <typename Word>
  void sort(SortBuffers<Word>& buffers, int64_t count, int begin_bit, int end_bit, void* scratch, size_t bytes) {
    if (begin_bit == end_bit) return;
    then([&] { return radix_sort(buffers, count, begin_bit, end_bit, scratch, bytes, stream_); });
  }

 private:
  template <typename Call>
  void then(Call call) {
    if (status_ == cudaSuccess) status_ = static_cast<int>(call());
  }

  void* stream_;
  int status_ = cudaSuccess;
};

// One call: its parameters, its memory, its launches.
struct Run {
  const MutualInfo& p;
  const Layout& layout;
  unsigned char* work;
  Launcher& gpu;
  Summary summary{};
  Chunk c{};

  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(work + offset);
  }

  template <typename X, typename Store>
  void transpose_tiles(const void* from, int64_t stride_n, int64_t stride_k, int64_t n, const int32_t* row,
                       Store store) {
    const auto sample_tiles = static_cast<unsigned>(ceil_div(n, kTile));
    const auto tiles = sample_tiles * static_cast<unsigned>(ceil_div(c.features, kTile));
    const Matrix m{n, c.features, stride_n, stride_k, sample_tiles, tiles, row};
    const X* first = static_cast<const X*>(from) + c.first * stride_k;
    gpu.blocks(transpose<X, Store>, m.tiles, kThreads, first, m, store);
  }

  // The features as doubles, ready to be compared; in the spare words.
  double* load_columns() {
    auto* const columns = at<double>(layout.spare);
    dispatch(p.type, [&](auto x) {
      transpose_tiles<decltype(x)>(p.features, p.stride_n, p.stride_k, p.n, nullptr, StoreColumn{columns, p.n});
      return cudaSuccess;
    });
    const bool noise = p.ties == Ties::Noise;
    if (!noise && p.type != ScalarType::Float64) return columns;
    auto* const scale = noise ? at<Scale>(layout.scale) : nullptr;
    gpu.blocks(scale_columns, c.features, kThreads, columns, p.n, c.features, tree_levels(p.n),
               columns + c.features * p.n, scale);
    if (noise)
      transpose_tiles<double>(p.noise, p.noise_stride_n, p.noise_stride_k, p.n, nullptr, AddNoise{columns, scale, p.n});
    return columns;
  }

  template <typename Word>
  SortBuffers<Word> buffers() const {
    return {at<Word>(layout.words), at<Word>(layout.spare)};
  }

  void load(SortBuffers<Word128>& to) {
    const double* columns = load_columns();
    gpu.items(pack_columns, c.features * c.samples, columns, p.n, p.labels, c, to.words);
  }
  void load(SortBuffers<Word64>& to) {
    dispatch(p.type, [&](auto x) {
      using X = decltype(x);
      if constexpr (!std::is_same_v<X, double>) {
        const StoreWord store{to.words, p.labels, c.row, c.samples, c.fields};
        transpose_tiles<X>(p.features, p.stride_n, p.stride_k, c.samples, c.row, store);
      }
      return cudaSuccess;
    });
  }

  template <typename V, bool Closed, int T>
  void all_samples(const V* value) {
    const auto feature_tiles = static_cast<unsigned>(ceil_div(c.samples, kThreads));
    const unsigned tiles = static_cast<unsigned>(c.features) * feature_tiles;
    gpu.blocks(among_all<V, Closed, T>, tiles, kThreads, c, value, feature_tiles, tiles);
  }

  template <typename Word, typename V, bool Closed>
  void chunk() {
    const int64_t items = c.features * c.samples;
    const int feature_bits = bits_of(c.features), class_end = c.fields.position + c.fields.classes;
    void* const scratch = at<void>(layout.scratch);
    auto* const value = at<V>(layout.value);
    gpu.clear(at<void>(layout.sums), 0, layout.sums_end - layout.sums);
    auto words = buffers<Word>();
    load(words);
    gpu.sort(words, items, c.fields.classes, c.fields.classes + c.fields.key + feature_bits, scratch,
             layout.scratch_bytes);
    SortBuffers<Word64> lists{reinterpret_cast<Word64*>(words.spare), reinterpret_cast<Word64*>(words.words)};
    gpu.items(unpack<Word, V>, items, words.words, c, value, lists.words);
    gpu.sort(lists, items, c.fields.position, class_end + feature_bits, scratch, layout.scratch_bytes);
    c.list = lists.words, c.left_over = lists.spare;
    // Parts that fill the GPU, each long enough for its block to look values up again and again.
    const int64_t parts = std::clamp<int64_t>(kFillBlocks / c.features, 1, ceil_div(c.samples, 4 * kWideThreads));
    gpu.blocks(among_own_class<V, Closed>, c.features * parts, kWideThreads, c, value, parts, c.features * parts);
    if (!p.multiclass) {
      if (c.neighbors <= 3) {
        all_samples<V, Closed, 8>(value);
      } else if (c.neighbors <= 7) {
        all_samples<V, Closed, 16>(value);
      } else if (c.neighbors <= 15) {
        all_samples<V, Closed, 32>(value);
      } else {
        all_samples<V, Closed, 0>(value);
      }
      gpu.items(one_sample<V, Closed>, items, c, value);
      if (c.dominant >= 0) gpu.items(beside_dominant<V, Closed>, c.features * (2 * c.neighbors + 1), c, value);
    }
    gpu.items(finish<Closed>, c.features * c.width, p, c, summary);
  }

  template <bool Closed>
  void few() {
    gpu.items(few_samples<Closed>, c.features * c.width, p, c, load_columns());
    gpu.items(finish<Closed>, c.features * c.width, p, c, summary);
  }

  // Counts the labels. Returns the first row whose label is outside, or -1.
  int64_t prepare() {
    c.classes = p.classes, c.width = p.multiclass ? 1 : p.classes, c.multiclass = p.multiclass;
    c.neighbors = std::min(p.neighbors, p.n);
    c.psi = p.psi;
    c.fields = layout.fields;
    c.class_size = at<int32_t>(layout.class_size), c.class_begin = at<int32_t>(layout.class_begin);
    c.constant = at<double>(layout.constant);
    c.summary = at<Summary>(layout.summary);
    c.scale = p.ties == Ties::Noise ? at<Scale>(layout.scale) : nullptr;
    c.label = at<int32_t>(layout.label);
    using Sums = unsigned long long;
    c.own = at<Sums>(layout.own), c.without = at<Sums>(layout.without), c.generic = at<Sums>(layout.generic);
    c.generics = at<Sums>(layout.generics), c.rest = at<Sums>(layout.rest), c.count = at<Sums>(layout.count);
    gpu.clear(c.class_size, 0, 4 * p.classes);
    gpu.clear(c.summary, 0xff, sizeof(Summary));
    gpu.items(count_classes, p.n, p, c);
    gpu.blocks(summarise, 1, kThreads, p, c);
    summary = gpu.read(c.summary);
    const auto bad_row = static_cast<int64_t>(summary.bad_row);
    if (gpu.status() != cudaSuccess || bad_row >= 0) return bad_row;
    c.samples = summary.samples, c.dominant = summary.dominant;
    if (c.samples < p.n) {
      c.row = at<int32_t>(layout.row);
      auto* const found = at<unsigned>(layout.found);
      gpu.clear(found, 0, 4);
      gpu.items(find_rows, p.n, p, c, found);
    }
    return -1;
  }

  void features() {
    const bool closed = p.ties == Ties::Exact;
    c.few = c.samples < 4 * c.neighbors + 8;
    for (c.first = 0; c.first < p.k; c.first += layout.features) {
      c.features = std::min(layout.features, p.k - c.first);
      if (c.few) {
        closed ? few<true>() : few<false>();
      } else if (!closed) {
        chunk<Word128, double, false>();
      } else if (is_wide(p)) {
        chunk<Word128, double, true>();
      } else {
        chunk<Word64, float, true>();
      }
    }
  }
};

}  // namespace

int mutual_info_cuda_bytes(const MutualInfo& p, int64_t* bytes) {
  Layout layout{};
  const int status = layout.fit(p, kWorkBytes);
  *bytes = layout.bytes;
  return status;
}

int mutual_info_cuda(const MutualInfo& p, void* work, int64_t bytes, LabelOutside* outside, void* stream) {
  *outside = {-1, 0};
  Layout layout{};
  const int status = layout.fit(p, bytes);
  if (status != cudaSuccess) return status;
  if (layout.bytes > bytes) return cudaErrorInvalidValue;
  Launcher gpu(stream);
  Run run{p, layout, static_cast<unsigned char*>(work), gpu};
  const int64_t bad_row = run.prepare();
  if (gpu.status() == cudaSuccess && bad_row >= 0) *outside = {bad_row, gpu.read(p.labels + bad_row)};
  if (gpu.status() == cudaSuccess && bad_row < 0) run.features();
  return gpu.status();
}

}  // namespace csg
