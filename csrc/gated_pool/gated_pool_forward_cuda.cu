// CUDA kernels of gated_pool, forward: one launch.
//
// Bytes that must move, with e the size of an element of x, g of the gate: e N K S read, 2 g N K written (max: 8 N K
// more for the index). Share of the memory bandwidth reached: not measured on a GPU.
//
// x is read once, in 16-byte pieces, by one of three kernels:
//   pool_tiles     short rows: a block stages rows that lie one after the other in shared memory, as one stretch of
//                  memory whatever S is (7 x 7 rows are not 16-byte aligned), then lanes sum each row
//   pool_rows      long rows, and rows that do not lie one after the other: a group of lanes or the block per row
//   pool_channels  channels last: threads side by side along K, several lanes along S
// Sums have a fixed order: same input, same bits.
#include "gated_pool_cuda.h"
#include "gated_pool_device.cuh"

namespace csg {
namespace {

constexpr int kMinTileBytes = 2048;  // of a problem too small to fill the GPU
constexpr int kMaxTileRows = 512;
constexpr int kStagedLoads = 8;            // of shared memory in flight per thread: alone, each would be waited for
constexpr int kLongRowBytes = 2048;        // from here on a warp per row
constexpr int kBlockRowBytes = 16 * 1024;  // from here on a block per row

// Blocks that share a multiprocessor: half types need more registers for as many bytes in flight.
template <typename T>
constexpr int kBlocks = sizeof(T) == 2 ? 3 : 4;

template <typename T, typename I, Pool kPool>
using Reduction = std::conditional_t<kPool == Pool::Avg, Sum<Acc<T>, I>, Top<Acc<T>, I>>;

template <typename T, Pool kPool, typename R>
__device__ inline void write_result(const GatedPoolForward& p, int64_t i, const R& r, int64_t at, Acc<T> row) {
  const Acc<T> pooled = kPool == Pool::Avg ? r.value / static_cast<Acc<T>>(p.s) : r.value;
  with_gate_type<T>(p.rows.type, [&](auto g) {
    using G = decltype(g);
    static_cast<G*>(p.pooled)[i] = from_acc<G>(pooled);
    static_cast<G*>(p.out)[i] = from_acc<G>(row * pooled);
  });
  if constexpr (kPool == Pool::Max) p.index[i] = at;
}

// Rows that lie one after the other: segments (one, or one per sample) of segment_rows rows each.
struct TileShape {
  int64_t segment_rows, segment_stride, tiles_per_segment, tiles;
  int rows;          // of a tile
  int lanes;         // that share a row, a power of two <= 32
  bool aligned;      // every row begins at a 16-byte boundary and fills whole vectors
  int result_bytes;  // of the results, which precede the staged rows in shared memory
};

template <typename T, Pool kPool>
__global__ void __launch_bounds__(kThreads, 4) pool_tiles(const GatedPoolForward p, const TileShape shape) {
  using R = Reduction<T, int, kPool>;
  CSG_DYNAMIC_SHARED(shared);
  R* const results = reinterpret_cast<R*>(shared);
  const int thread = threadIdx.x, s = static_cast<int>(p.s);
  const int lane = thread % shape.lanes, group = thread / shape.lanes, groups = kThreads / shape.lanes;

  for (int64_t tile = blockIdx.x; tile < shape.tiles; tile += gridDim.x) {
    const int64_t segment = tile / shape.tiles_per_segment;
    const int64_t first = (tile - segment * shape.tiles_per_segment) * shape.rows;
    const int rows = static_cast<int>(min(static_cast<int64_t>(shape.rows), shape.segment_rows - first));
    const int64_t first_out = segment * shape.segment_rows + first;
    const T* const source = static_cast<const T*>(p.x) + segment * shape.segment_stride + first * s;

    // Staged at the same distance from a 16-byte boundary as in memory; the ends that fill no vector go one by one.
    const int elements = rows * s, head = min(elements, to_boundary(source));
    const int vectors = (elements - head) / kVector<T>, tail = head + vectors * kVector<T>;
    T* const staged = reinterpret_cast<T*>(shared + shape.result_bytes) +
                      static_cast<int>(reinterpret_cast<uintptr_t>(source) % kVectorBytes / sizeof(T));
    Pack<T, kVector<T>> flight[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int v = thread + u * kThreads;
      if (v < vectors) flight[u] = load_pack<T, kVector<T>>(source + head + v * kVector<T>);
    }
    if (thread < head) staged[thread] = source[thread];
    if (thread < elements - tail) staged[tail + thread] = source[tail + thread];
    // The gate's entry of this thread's row travels at the same time.
    Acc<T> row = 0;
    if (thread < rows) {
      const int64_t n = (first_out + thread) / p.k;
      row = row_entry_of<T>(p.rows, p.k, class_of(p.rows, n), first_out + thread - n * p.k);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int v = thread + u * kThreads;
      if (v < vectors) store_pack(staged + head + v * kVector<T>, flight[u]);
    }
    __syncthreads();

    for (int begin = 0; begin < rows; begin += groups) {  // the same trips for every lane: they exchange results
      const int r = begin + group;
      R result = R::empty();
      if (r < rows) {
        const T* const values = staged + r * s;
        int i = lane;
        if (shape.aligned) {
#pragma unroll 1
          for (; i * kVector<T> < s; i += shape.lanes) {
            const Pack<T, kVector<T>> pack = load_pack<T, kVector<T>>(values + i * kVector<T>);
#pragma unroll
            for (int j = 0; j < kVector<T>; ++j) result.add(to_acc(pack.v[j]), i * kVector<T> + j);
          }
        } else {
#pragma unroll 1
          for (; i + (kStagedLoads - 1) * shape.lanes < s; i += kStagedLoads * shape.lanes) {
            T flight[kStagedLoads];
#pragma unroll
            for (int u = 0; u < kStagedLoads; ++u) flight[u] = values[i + u * shape.lanes];
#pragma unroll
            for (int u = 0; u < kStagedLoads; ++u) result.add(to_acc(flight[u]), i + u * shape.lanes);
          }
#pragma unroll 1
          for (; i < s; i += shape.lanes) result.add(to_acc(values[i]), i);
        }
      }
      merge_lanes(result, 1, shape.lanes);
      if (r < rows && lane == 0) results[r] = result;
    }
    __syncthreads();

#pragma unroll 1
    for (int r = thread; r < rows; r += kThreads) {
      if (r != thread) {
        const int64_t n = (first_out + r) / p.k;
        row = row_entry_of<T>(p.rows, p.k, class_of(p.rows, n), first_out + r - n * p.k);
      }
      const R result = results[r];
      int64_t at = 0;
      if constexpr (kPool == Pool::Max) at = result.at;
      write_result<T, kPool>(p, first_out + r, result, at, row);
    }
    // The next tile's results are written after its first barrier, so these reads are over by then.
  }
}

// `lanes` threads per row: a power of two <= 32, or the whole block.
template <typename T, Pool kPool>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) pool_rows(const GatedPoolForward p, const int lanes) {
  using R = Reduction<T, int64_t, kPool>;
  constexpr int kWarps = kThreads / kWarp;
  CSG_SHARED(R, partial, kWarps);
  const int thread = threadIdx.x, lane = thread % lanes, group = thread / lanes;
  const int64_t rows_per_block = kThreads / lanes, rows = p.n * p.k;

  for (int64_t first = blockIdx.x * rows_per_block; first < rows; first += gridDim.x * rows_per_block) {
    const int64_t i = first + group;
    const bool valid = i < rows;
    const int64_t n = i / p.k, k = i - n * p.k;
    R result = R::empty();
    int64_t c = 0;
    if (valid) {
      if (lane == 0) c = class_of(p.rows, n);  // travels with the row
      const T* const source = static_cast<const T*>(p.x) + n * p.stride_n + k * p.stride_k;
      const int64_t head = min(p.s, static_cast<int64_t>(to_boundary(source)));
      const int64_t vectors = (p.s - head) / kVector<T>, tail = head + vectors * kVector<T>;
      int64_t v = lane;
#pragma unroll 1
      do {
        Pack<T, kVector<T>> flight[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t at = v + u * lanes;
          if (at < vectors) flight[u] = load_pack<T, kVector<T>>(source + head + at * kVector<T>);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t at = v + u * lanes;
          if (at >= vectors) break;
#pragma unroll
          for (int j = 0; j < kVector<T>; ++j) {
            result.add(to_acc(flight[u].v[j]), head + at * kVector<T> + j);
          }
        }
        v += kUnroll * lanes;
      } while (v < vectors);
      for (int64_t j = lane; j < head; j += lanes) result.merge(R::of(to_acc(source[j]), j));
      for (int64_t j = tail + lane; j < p.s; j += lanes) result.merge(R::of(to_acc(source[j]), j));
    }
    merge_lanes(result, 1, min(lanes, kWarp));
    if (lanes > kWarp) {
      if (thread % kWarp == 0) partial[thread / kWarp] = result;
      __syncthreads();
      if (thread == 0) {
        for (int w = 1; w < kWarps; ++w) result.merge(partial[w]);
      }
      __syncthreads();
    }
    if (valid && lane == 0) {
      int64_t at = 0;
      if constexpr (kPool == Pool::Max) at = result.at;
      write_result<T, kPool>(p, i, result, at, row_entry_of<T>(p.rows, p.k, c, k));
    }
  }
}

// ---- Channels last.

template <int kWidth>
constexpr int kPad = kWidth == 1 ? 0 : kWarp / kWidth;

template <typename T, Pool kPool, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    pool_channels(const GatedPoolForward p, const ChannelShape shape) {
  using A = Acc<T>;
  using R = Reduction<T, int, kPool>;  // positions counted in steps of the thread: s = lane + step * lanes
  CSG_DYNAMIC_SHARED(shared);
  // [lanes][width][columns + pad]: 32 threads side by side write, and 32 channels side by side are read, from 32 banks.
  const int thread = threadIdx.x, columns = shape.columns, lanes = kThreads / columns, pitch = columns + kPad<kWidth>;
  A* const values = reinterpret_cast<A*>(shared);
  int* const steps_at = reinterpret_cast<int*>(values + lanes * kWidth * pitch);
  const int column = thread % columns, lane = thread / columns;

  for (int64_t tile = blockIdx.x; tile < shape.tiles; tile += gridDim.x) {
    const int64_t n = tile / shape.channel_tiles;
    const int64_t first = (tile - n * shape.channel_tiles) * columns * kWidth;
    const int channels = static_cast<int>(min(static_cast<int64_t>(columns) * kWidth, p.k - first));
    R results[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) results[j] = R::empty();
    const int64_t c = class_of(p.rows, n);  // travels with the sample
    const bool active = column * kWidth < channels && lane < p.s;
    const T* source = static_cast<const T*>(p.x) + n * p.stride_n + first + column * kWidth + lane * p.stride_s;
    const int64_t stride = lanes * p.stride_s;
    const int steps = active ? static_cast<int>((p.s - lane + lanes - 1) / lanes) : 0;
    int step = 0;
#pragma unroll 1
    do {
      Pack<T, kWidth> flight[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u, source += stride) {
        if (step + u < steps) flight[u] = load_pack<T, kWidth>(source);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (step + u >= steps) break;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) results[j].add(to_acc(flight[u].v[j]), step + u);
      }
      step += kUnroll;
    } while (step < steps);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      values[(lane * kWidth + j) * pitch + column] = results[j].value;
      if constexpr (kPool == Pool::Max) steps_at[(lane * kWidth + j) * pitch + column] = results[j].at;
    }
    __syncthreads();

#pragma unroll 1
    for (int channel = thread; channel < channels; channel += kThreads) {
      const A row = row_entry_of<T>(p.rows, p.k, c, first + channel);
      using Merged = Reduction<T, int64_t, kPool>;
      Merged merged = Merged::empty();
      for (int l = 0; l < min(static_cast<int64_t>(lanes), p.s); ++l) {
        const int cell = (l * kWidth + channel % kWidth) * pitch + channel / kWidth;
        int64_t at = 0;
        if constexpr (kPool == Pool::Max) at = l + static_cast<int64_t>(steps_at[cell]) * lanes;
        merged.merge(Merged::of(values[cell], at));
      }
      int64_t at = 0;
      if constexpr (kPool == Pool::Max) at = merged.at;
      write_result<T, kPool>(p, n * p.k + first + channel, merged, at, row);
    }
    __syncthreads();
  }
}

// ---- Launching.

template <typename T, Pool kPool, int kWidth>
int launch_channels(const GatedPoolForward& p, void* stream) {
  const int64_t packs = ceil_div(p.k, kWidth);
  ChannelShape shape{};
  shape.columns = channel_columns(p.n, packs, p.s, kWidth * sizeof(T));
  shape.channel_tiles = ceil_div(packs, shape.columns);
  shape.tiles = p.n * shape.channel_tiles;
  const int cells = kThreads / shape.columns * kWidth * (shape.columns + kPad<kWidth>);
  const size_t bytes = cells * (sizeof(Acc<T>) + (kPool == Pool::Max ? sizeof(int) : 0));
  return launch(pool_channels<T, kPool, kWidth>, shape.tiles, kThreads, bytes, stream, p, shape);
}

template <typename T, Pool kPool>
int launch_tiles(const GatedPoolForward& p, void* stream) {
  using R = Reduction<T, int, kPool>;
  const bool dense = p.n == 1 || p.stride_n == p.k * p.s;
  const int64_t row_bytes = p.s * static_cast<int64_t>(sizeof(T));
  TileShape shape{};
  shape.segment_rows = dense ? p.n * p.k : p.k;
  shape.segment_stride = p.stride_n;
  int64_t rows = std::min<int64_t>(kMaxTileRows, kTileBytes / row_bytes);
  rows = std::max(std::min(rows, p.n * p.k / kFillBlocks), std::min(rows, kMinTileBytes / row_bytes));
  const int64_t grain = kSectorBytes / static_cast<int64_t>(sizeof(T));  // tiles begin at sectors where they can
  if (rows > grain) rows -= rows % grain;
  rows = std::min(rows, shape.segment_rows);
  shape.rows = static_cast<int>(rows);
  shape.tiles_per_segment = ceil_div(shape.segment_rows, rows);
  shape.tiles = (dense ? 1 : p.n) * shape.tiles_per_segment;
  shape.aligned =
      p.s % kVector<T> == 0 && to_boundary(static_cast<const T*>(p.x)) == 0 && (dense || p.stride_n % kVector<T> == 0);
  // Rows a multiple of 2^m words long meet in few of the 32 banks unless 2^m lanes read side by side; of 2^m vectors
  // likewise, which a warp reads 8 at a time.
  const int unit = shape.aligned ? kVectorBytes : 4, most = shape.aligned ? 8 : kWarp;
  const int apart = static_cast<int>(std::clamp<int64_t>((row_bytes & -row_bytes) / unit, 1, most));
  const int busy = power_of_two(kThreads / rows / 2 + 1, kWarp);  // as many lanes to a row as there are threads
  const int64_t loads = shape.aligned ? p.s / kVector<T> : p.s;
  shape.lanes = std::min(std::max(apart, busy), power_of_two(loads, kWarp));
  shape.result_bytes = whole_vectors(rows * sizeof(R));
  const size_t bytes = shape.result_bytes + rows * row_bytes + kVectorBytes;
  return launch(pool_tiles<T, kPool>, shape.tiles, kThreads, bytes, stream, p, shape);
}

template <typename T, Pool kPool>
int launch_rows(const GatedPoolForward& p, void* stream) {
  const int64_t row_bytes = p.s * static_cast<int64_t>(sizeof(T)), rows = p.n * p.k;
  const bool block = row_bytes >= kBlockRowBytes || (row_bytes >= kLongRowBytes && rows < kFillBlocks);
  const int lanes = block ? kThreads : power_of_two(ceil_div(row_bytes, kVectorBytes), kWarp);
  return launch(pool_rows<T, kPool>, ceil_div(rows, kThreads / lanes), kThreads, 0, stream, p, lanes);
}

template <typename T, Pool kPool>
int forward(const GatedPoolForward& p, void* stream) {
  if (p.stride_k == 1 && (p.stride_s != 1 || p.s == 1)) {
    const bool aligned = channels_aligned<T>(p.x, p.k, p.n, p.stride_n, p.s, p.stride_s);
    return aligned ? launch_channels<T, kPool, kVector<T>>(p, stream) : launch_channels<T, kPool, 1>(p, stream);
  }
  const bool samples_dense = p.k == 1 || p.stride_k == p.s;
  const bool short_rows = p.s < kLongRowBytes / static_cast<int64_t>(sizeof(T));
  return samples_dense && short_rows ? launch_tiles<T, kPool>(p, stream) : launch_rows<T, kPool>(p, stream);
}

}  // namespace

int gated_pool_forward_cuda(const GatedPoolForward& p, void* stream) {
  if (p.n == 0 || p.k == 0) return cudaSuccess;
  return dispatch(p.x_type, [&](auto x) {
    using T = decltype(x);
    return p.pool == Pool::Avg ? forward<T, Pool::Avg>(p, stream) : forward<T, Pool::Max>(p, stream);
  });
}

}  // namespace csg
