// CUDA kernels of gated_pool, backward: one launch for each gradient.
//
// Bytes that must move, with e the size of an element of x, g of the gate:
//   grad_x      e N K S written, e N K where the positions share their values; 2 g N K read; x is not read
//   grad_gate   g C K written, 2 g N K read; with a projection, 3 g N K more and g C K read
// Share of the memory bandwidth reached: not measured on a GPU. Sums have a fixed order: same input, same bits.
#include "gated_pool_cuda.h"
#include "gated_pool_device.cuh"

namespace csg {
namespace {

// ---- The gradient of x.

// What every position of a row receives (max: the position `index` alone).
template <typename T, Pool kPool>
__device__ inline T row_gradient(const GatedPoolBackward& p, int64_t i) {
  Acc<T> grad = 0;
  with_gate_type<T>(p.rows.type, [&](auto g) {
    using G = decltype(g);
    if (p.grad_out != nullptr) {
      const int64_t n = i / p.k;
      grad = to_acc(static_cast<const G*>(p.grad_out)[i]) * row_entry<G>(p.rows, p.k, class_of(p.rows, n), i - n * p.k);
    }
    if (p.grad_pooled != nullptr) grad += to_acc(static_cast<const G*>(p.grad_pooled)[i]);
  });
  return from_acc<T>(kPool == Pool::Avg ? grad / static_cast<Acc<T>>(p.s) : grad);
}

// Rows: grad_x is one stretch of memory, cut into tiles of `tile` elements that begin at 16-byte boundaries.
struct FillShape {
  int64_t total, tiles;  // total = N K S
  int lead;              // elements between the 16-byte boundary before grad_x and grad_x
  int tile;
  int value_bytes;   // of a value for each row that a tile can touch, and one more
  uint32_t local_s;  // min(S, tile): a tile cuts longer rows at most once
  uint64_t magic;    // ceil(2^32 / local_s): i / local_s == i * magic >> 32 for i < 2 * tile
};

template <typename T, Pool kPool>
__global__ void __launch_bounds__(kThreads, 4) fill_rows(const GatedPoolBackward p, const FillShape shape) {
  CSG_DYNAMIC_SHARED(shared);
  T* const values = reinterpret_cast<T*>(shared);
  int* const hits = reinterpret_cast<int*>(shared + shape.value_bytes);  // position of the maximum in the tile
  T* const grad_x = static_cast<T*>(p.grad_x);
  constexpr bool avg = kPool == Pool::Avg;
  const T zero = from_acc<T>(Acc<T>(0));
  const int thread = threadIdx.x;

  for (int64_t tile = blockIdx.x; tile < shape.tiles; tile += gridDim.x) {
    const int64_t begin = max(tile * shape.tile - shape.lead, static_cast<int64_t>(0));
    const int64_t end = min((tile + 1) * shape.tile - shape.lead, shape.total);
    const int elements = static_cast<int>(end - begin);
    const int64_t first_row = begin / p.s;
    // Elements of the first row that lie before the tile, as if rows were local_s long.
    const int64_t in_row = begin - first_row * p.s;
    const int before = p.s <= shape.tile
                           ? static_cast<int>(in_row)
                           : shape.tile - static_cast<int>(min(p.s - in_row, static_cast<int64_t>(shape.tile)));
    const int local_s = static_cast<int>(shape.local_s);
    const auto row_at = [&](int i) {
      return static_cast<int>((static_cast<uint32_t>(before + i) * shape.magic) >> 32);
    };
    const int rows = row_at(elements - 1) + 1;
    for (int r = thread; r < rows; r += kThreads) {
      values[r] = row_gradient<T, kPool>(p, first_row + r);
      if (!avg) {
        const int64_t hit = (first_row + r) * p.s + p.index[first_row + r] - begin;
        hits[r] = hit >= 0 && hit < elements ? static_cast<int>(hit) : -1;
      }
    }
    const auto value_at = [&](int i, int r) { return avg || hits[r] == i ? values[r] : zero; };
    __syncthreads();

    const int head = min(elements, to_boundary(grad_x + begin));
    const int vectors = (elements - head) / kVector<T>, tail = head + vectors * kVector<T>;
    if (thread < head) grad_x[begin + thread] = value_at(thread, row_at(thread));
    if (thread < elements - tail) grad_x[begin + tail + thread] = value_at(tail + thread, row_at(tail + thread));
    for (int v = thread; v < vectors; v += kThreads) {
      const int i = head + v * kVector<T>;
      int r = row_at(i);
      int left = (r + 1) * local_s - before - i;  // elements of row r from i on
      Pack<T, kVector<T>> out;
      if (local_s >= kVector<T>) {  // a vector meets at most two rows
        const T here = values[r], next = values[r + 1];
        const int hit = avg ? 0 : hits[r] - i, next_hit = avg || left >= kVector<T> ? 0 : hits[r + 1] - i;
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) {
          const T value = j < left ? here : next;
          out.v[j] = avg || j == (j < left ? hit : next_hit) ? value : zero;
        }
      } else {
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) {
          out.v[j] = value_at(i + j, r);
          if (--left == 0) {
            left = local_s;
            ++r;
          }
        }
      }
      store_pack(grad_x + begin + i, out);
    }
    __syncthreads();
  }
}

template <typename T, Pool kPool>
int launch_fill_rows(const GatedPoolBackward& p, void* stream) {
  FillShape shape{};
  shape.total = p.n * p.k * p.s;
  shape.tile = (p.s < 8 ? kTileBytes / 4 : kTileBytes) / static_cast<int>(sizeof(T));  // fewer rows to a block if short
  const int to_next = to_boundary(static_cast<const T*>(p.grad_x));
  shape.lead = to_next == 0 ? 0 : kVector<T> - to_next;
  shape.tiles = ceil_div(shape.total + shape.lead, shape.tile);
  const int rows = static_cast<int>(shape.tile / p.s) + 3;
  shape.value_bytes = whole_vectors(rows * sizeof(T));
  shape.local_s = static_cast<uint32_t>(std::min<int64_t>(p.s, shape.tile));
  shape.magic = ((uint64_t{1} << 32) + shape.local_s - 1) / shape.local_s;
  const size_t bytes = shape.value_bytes + (kPool == Pool::Max ? rows * sizeof(int) : 0);
  return launch(fill_rows<T, kPool>, shape.tiles, kThreads, bytes, stream, p, shape);
}

template <typename T, Pool kPool, int kWidth>
__global__ void __launch_bounds__(kThreads, 4) fill_channels(const GatedPoolBackward p, const ChannelShape shape) {
  CSG_DYNAMIC_SHARED(shared);
  const int thread = threadIdx.x, columns = shape.columns, lanes = kThreads / columns;
  T* const values = reinterpret_cast<T*>(shared);                       // [columns * width]
  int* const hits = reinterpret_cast<int*>(values + columns * kWidth);  // position of the maximum in the stretch
  const int column = thread % columns, lane = thread / columns;
  constexpr bool avg = kPool == Pool::Avg;
  const T zero = from_acc<T>(Acc<T>(0));

  for (int64_t tile = blockIdx.x; tile < shape.tiles; tile += gridDim.x) {
    const int64_t stretch = tile / shape.channel_tiles, n = stretch / shape.position_tiles;
    const int64_t first = (tile - stretch * shape.channel_tiles) * columns * kWidth;
    const int64_t begin = (stretch - n * shape.position_tiles) * shape.positions;
    const int positions = static_cast<int>(min(shape.positions, p.s - begin));
    const int channels = static_cast<int>(min(static_cast<int64_t>(columns) * kWidth, p.k - first));
    for (int channel = thread; channel < channels; channel += kThreads) {
      const int64_t i = n * p.k + first + channel;
      values[channel] = row_gradient<T, kPool>(p, i);
      if (!avg) {
        const int64_t hit = p.index[i] - begin;
        hits[channel] = hit >= 0 && hit < positions ? static_cast<int>(hit) : -1;
      }
    }
    __syncthreads();

    if (column * kWidth < channels) {
      Pack<T, kWidth> value, out;
      int hit[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        value.v[j] = values[column * kWidth + j];
        hit[j] = avg ? 0 : hits[column * kWidth + j];
      }
      T* target = static_cast<T*>(p.grad_x) + n * p.stride_n + (begin + lane) * p.stride_s + first + column * kWidth;
      for (int s = lane; s < positions; s += lanes, target += lanes * p.stride_s) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) out.v[j] = avg || hit[j] == s ? value.v[j] : zero;
        store_pack(target, out);
      }
    }
    __syncthreads();
  }
}

template <typename T, Pool kPool, int kWidth>
int launch_fill_channels(const GatedPoolBackward& p, void* stream) {
  const int64_t packs = ceil_div(p.k, kWidth);
  ChannelShape shape{};
  shape.columns = channel_columns(p.n, packs, p.s, kWidth * sizeof(T));
  shape.channel_tiles = ceil_div(packs, shape.columns);
  shape.positions = kThreads / shape.columns * 2 * kUnroll;
  shape.position_tiles = ceil_div(p.s, shape.positions);
  shape.tiles = p.n * shape.position_tiles * shape.channel_tiles;
  const size_t bytes = shape.columns * kWidth * (sizeof(T) + (kPool == Pool::Max ? sizeof(int) : 0));
  return launch(fill_channels<T, kPool, kWidth>, shape.tiles, kThreads, bytes, stream, p, shape);
}

// One value for all positions of a row.
template <typename T>
__global__ void __launch_bounds__(kThreads) shared_values(const GatedPoolBackward p) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.n * p.k; i += step)
    static_cast<T*>(p.grad_x)[i] = row_gradient<T, Pool::Avg>(p, i);
}

template <typename T, Pool kPool>
int backward_x(const GatedPoolBackward& p, void* stream) {
  if (kPool == Pool::Avg && p.stride_s == 0)
    return launch(shared_values<T>, ceil_div(p.n * p.k, kThreads), kThreads, 0, stream, p);
  if (p.stride_k == 1 && (p.stride_s != 1 || p.s == 1)) {
    const bool aligned = channels_aligned<T>(p.grad_x, p.k, p.n, p.stride_n, p.s, p.stride_s);
    return aligned ? launch_fill_channels<T, kPool, kVector<T>>(p, stream)
                   : launch_fill_channels<T, kPool, 1>(p, stream);
  }
  return launch_fill_rows<T, kPool>(p, stream);
}

// ---- The gradient of the gate.
//
// With d[n, k] = grad_out[n, k] * pooled[n, k] and D[c, k] = sum of d over the samples of class c:
//   no projection   grad[c, k] = D[c, k]
//   projection      grad[c, k] = [g >= 0] D[c, k] / m_k - [c == arg_k] sum_n d[n, k] P[label_n, k] / m_k,   m_k > 0
// and 0 in a column without a positive entry, NaN in one with a NaN. A clip passes the gradient where 0 <= g / m <= 1.

constexpr int kGateColumns = 32;
constexpr int kGateLanes = kThreads / kGateColumns;  // each sums every kGateLanes-th sample of a class
template <typename A>
constexpr int kMaxClassTile = 32 * 1024 / (kThreads * static_cast<int>(sizeof(A)));  // 32 KiB of sums

struct GateShape {
  int classes;                                // of a tile
  int64_t class_tiles, channel_tiles, tiles;  // behind the tiles of classes, with a projection, those of the maxima
};

struct Match {
  int sample, row;  // in the chunk of samples, in the tile of classes
};

// The samples of [begin, begin + kThreads) whose class is in [first, first + classes), in order; returns how many.
__device__ inline int find_matches(const GatedPoolBackward& p, int64_t begin, int64_t first, int classes,
                                   Match* matches, int* counts) {
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  int64_t row = -1;
  if (begin + thread < p.n) {
    const int64_t c = p.rows.labels[begin + thread];
    if (in_range(p.rows, c)) row = c - first;
  }
  const bool match = row >= 0 && row < classes;
  const unsigned mask = __ballot_sync(kFullMask, match);
  if (lane == 0) counts[warp] = __popc(mask);
  __syncthreads();
  int at = 0, total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    at += w < warp ? counts[w] : 0;
    total += counts[w];
  }
  if (match) matches[at + __popc(mask & ((1u << lane) - 1))] = {thread, static_cast<int>(row)};
  __syncthreads();
  return total;
}

// The gradient of what project_scale() makes of an entry that is not its column's maximum; `sum`: D[c, k].
template <typename A>
__device__ inline A beside_maximum(A sum, A g, A top) {
  if (top > A(0)) return g >= A(0) ? sum / top : A(0);
  return top != top ? top : A(0);
}

// Columns k, ... beside each other: the gradient at each one's maximum, to which all samples contribute. `sums`,
// `whole`: [lanes][columns].
template <typename G, typename A>
__device__ inline void maximum_gradient(const GatedPoolBackward& p, int64_t k, A* sums, A* whole) {
  const int thread = threadIdx.x, column = thread % kGateColumns, lane = thread / kGateColumns;
  const auto* const grad_out = static_cast<const G*>(p.grad_out);
  const auto* const pooled = static_cast<const G*>(p.pooled);
  const auto* const gate = static_cast<const G*>(p.rows.gate);
  const bool active = k < p.k;
  A top = A(0), own = A(0), all = A(0);
  int64_t arg = 0;
  if (active) {
    top = to_acc(static_cast<const G*>(p.rows.col_max)[k]);
    arg = p.rows.col_arg[k];
  }
  if (grad_out != nullptr && active && top > A(0)) {
#pragma unroll 1
    for (int64_t n = lane; n < p.n; n += kUnroll * kGateLanes) {
      A d[kUnroll], g[kUnroll];
      int64_t c[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t sample = n + u * kGateLanes, i = sample * p.k + k;
        c[u] = sample < p.n ? class_of(p.rows, sample) : -1;
        const bool valid = in_range(p.rows, c[u]);
        d[u] = valid ? to_acc(grad_out[i]) * to_acc(pooled[i]) : A(0);
        g[u] = valid ? to_acc(gate[c[u] * p.k + k]) : A(0);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (c[u] == arg) own += d[u];
        all += d[u] * project_scale(g[u], top, c[u] == arg);
      }
    }
  }
  sums[thread] = own;
  whole[thread] = all;
  __syncthreads();
  if (lane == 0 && active && in_range(p.rows, arg)) {
    for (int l = 1; l < kGateLanes; ++l) {
      own += sums[l * kGateColumns + column];
      all += whole[l * kGateColumns + column];
    }
    static_cast<G*>(p.grad_gate)[arg * p.k + k] = from_acc<G>(beside_maximum(own - all, A(0), top));
  }
  __syncthreads();
}

template <typename G>
__global__ void __launch_bounds__(kThreads, 3) gate_gradient(const GatedPoolBackward p, const GateShape shape) {
  using A = Acc<G>;
  CSG_DYNAMIC_SHARED(shared);
  CSG_SHARED(Match, matches, kThreads);
  CSG_SHARED(int, counts, kThreads / kWarp);
  CSG_SHARED(A, whole, kThreads);
  A* const sums = reinterpret_cast<A*>(shared);  // [lanes][classes][columns]
  const int thread = threadIdx.x, column = thread % kGateColumns, lane = thread / kGateColumns;
  const auto* const grad_out = static_cast<const G*>(p.grad_out);
  const auto* const pooled = static_cast<const G*>(p.pooled);
  const auto* const gate = static_cast<const G*>(p.rows.gate);
  const bool project = p.rows.col_max != nullptr;

  for (int64_t tile = blockIdx.x; tile < shape.tiles; tile += gridDim.x) {
    const int64_t class_tile = tile / shape.channel_tiles;
    const int64_t k = (tile - class_tile * shape.channel_tiles) * kGateColumns + column;
    if (class_tile == shape.class_tiles) {
      maximum_gradient<G>(p, k, sums, whole);
      continue;
    }
    const int64_t first = class_tile * shape.classes;
    const int classes = static_cast<int>(min(static_cast<int64_t>(shape.classes), p.rows.rows - first));
    const bool active = k < p.k;
    const auto product = [&](int64_t n) { return to_acc(grad_out[n * p.k + k]) * to_acc(pooled[n * p.k + k]); };
    A* const mine = sums + lane * shape.classes * kGateColumns + column;
#pragma unroll 1
    for (int c = 0; c < classes; ++c) mine[c * kGateColumns] = A(0);

    if (grad_out == nullptr) {
      // Nothing to add.
    } else if (p.rows.labels == nullptr) {
#pragma unroll 1
      for (int c = lane; c < classes && active; c += kGateLanes) {
        if (first + c < p.n) mine[c * kGateColumns] = product(first + c);
      }
    } else {
      for (int64_t begin = 0; begin < p.n; begin += kThreads) {
        const int total = find_matches(p, begin, first, classes, matches, counts);
#pragma unroll 1
        for (int i = lane; active && i < total; i += kUnroll * kGateLanes) {
          A d[kUnroll];
          int row[kUnroll];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            if (i + u * kGateLanes >= total) break;
            const Match match = matches[i + u * kGateLanes];
            d[u] = product(begin + match.sample);
            row[u] = match.row;
          }
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            if (i + u * kGateLanes >= total) break;
            mine[row[u] * kGateColumns] += d[u];
          }
        }
        // The next chunk's matches are written after a barrier, so these reads are over by then.
      }
    }

    A top = A(1);
    int64_t arg = -1;
    if (project && active) {
      top = to_acc(static_cast<const G*>(p.rows.col_max)[k]);
      arg = p.rows.col_arg[k];
    }
    __syncthreads();

#pragma unroll 1
    for (int c = lane; c < classes && active; c += kGateLanes) {
      if (first + c == arg) continue;  // maximum_gradient() writes it
      A sum = A(0);
      for (int l = 0; l < kGateLanes; ++l) sum += sums[(l * shape.classes + c) * kGateColumns + column];
      if (project) sum = beside_maximum(sum, to_acc(gate[(first + c) * p.k + k]), top);
      static_cast<G*>(p.grad_gate)[(first + c) * p.k + k] = from_acc<G>(sum);
    }
    __syncthreads();
  }
}

template <typename G>
int backward_gate(const GatedPoolBackward& p, void* stream) {
  GateShape shape{};
  shape.channel_tiles = ceil_div(p.k, kGateColumns);
  const int64_t classes = ceil_div(p.rows.rows * shape.channel_tiles, 2 * kFillBlocks);
  shape.classes = static_cast<int>(std::min<int64_t>(classes, kMaxClassTile<Acc<G>>));
  shape.class_tiles = ceil_div(p.rows.rows, shape.classes);
  shape.tiles = (shape.class_tiles + (p.rows.col_max != nullptr ? 1 : 0)) * shape.channel_tiles;
  const size_t bytes = sizeof(Acc<G>) * kThreads * shape.classes;
  return launch(gate_gradient<G>, shape.tiles, kThreads, bytes, stream, p, shape);
}

}  // namespace

int gated_pool_backward_cuda(const GatedPoolBackward& p, void* stream) {
  int status = cudaSuccess;
  if (p.grad_x != nullptr && p.n > 0 && p.k > 0) {
    status = dispatch(p.x_type, [&](auto x) {
      using T = decltype(x);
      return p.pool == Pool::Avg ? backward_x<T, Pool::Avg>(p, stream) : backward_x<T, Pool::Max>(p, stream);
    });
  }
  if (status == cudaSuccess && p.grad_gate != nullptr && p.rows.rows > 0 && p.k > 0) {
    status = dispatch(p.rows.type, [&](auto g) { return backward_gate<decltype(g)>(p, stream); });
  }
  return status;
}

}  // namespace csg
