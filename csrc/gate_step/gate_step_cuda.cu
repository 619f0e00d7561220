// CUDA kernels of gate_step: SGD update, column norm and clip of the gate in one launch; the columns' maxima.
//
// Bytes that must move, with g the size of an element:
//   gate_step   g C K (gate) + g C K (grad) + g C K (buffer) read, g C K (gate) + g C K (buffer) written
//   column_max  g C K read
// Share of the memory bandwidth reached: not measured on a GPU.
//
// A block takes kColumns columns and keeps them in registers between the update and the projection. More than
// kMaxLanes * kMostRows classes do not fit: such columns are read a second time, and updated by the same arithmetic.
#include "gate_step_cuda.h"

#include "../common/cuda_device.cuh"
#include "../common/cuda_launch.cuh"
#include "../common/projection.h"

namespace csg {
namespace {

constexpr int kColumns = 8;    // side by side: one 32-byte sector of fp32
constexpr int kMaxLanes = 64;  // that share a column
constexpr int kMaxThreads = kColumns * kMaxLanes;
constexpr int kFewRows = 8, kMostRows = 32;  // of a column in a thread's registers

// Lanes that share a column of c entries: whole warps.
int lanes_for(int64_t c) { return std::max(kWarp / kColumns, power_of_two(c, kMaxLanes)); }

__device__ inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return fma(a, b, c); }

// Every thread receives the maximum of its column. `partial`: [warps][kColumns].
template <typename A>
__device__ inline Top<A, int64_t> column_top(Top<A, int64_t> top, Top<A, int64_t>* partial) {
  const int thread = threadIdx.x, column = thread % kColumns, warps = blockDim.x / kWarp;
  merge_lanes(top, kColumns, kWarp);
  if (thread % kWarp < kColumns) partial[thread / kWarp * kColumns + column] = top;
  __syncthreads();
  top = partial[column];
  for (int w = 1; w < warps; ++w) top.merge(partial[w * kColumns + column]);
  __syncthreads();
  return top;
}

template <typename A>
struct Rates {
  A lr, momentum, undamped, weight_decay;
};

// The updated entry i, before projection. Written with fused multiply-adds, so that a second call gives the same bits.
template <typename T>
__device__ inline Acc<T> updated(const GateStep& p, const Rates<Acc<T>>& rates, int64_t i, bool write_buffer) {
  using A = Acc<T>;
  const A g = to_acc(static_cast<const T*>(p.gate)[i]);
  if (p.grad == nullptr) return g;
  A d = fused(rates.weight_decay, g, to_acc(static_cast<const T*>(p.grad)[i]));
  if (p.buffer != nullptr) {
    T* const buffer = static_cast<T*>(p.buffer);
    const A b = p.first_step ? d : fused(rates.momentum, to_acc(buffer[i]), rates.undamped * d);
    if (write_buffer) buffer[i] = from_acc<T>(b);
    d = p.nesterov ? fused(rates.momentum, b, d) : b;
  }
  return fused(-rates.lr, d, g);
}

template <typename A>
__device__ inline A project(Projection how, A g, const Top<A, int64_t>& top, int64_t c) {
  const bool is_top = c == top.at;
  return how == Projection::Scale ? project_scale(g, top.value, is_top) : project_euclidean(g, top.value, is_top);
}

// kRows: entries of a column that a thread keeps; 0: none, columns of any length.
template <typename T, int kRows>
__global__ void __launch_bounds__(kMaxThreads)
    step_columns(const GateStep p, const Rates<Acc<T>> rates, const int64_t tiles) {
  using A = Acc<T>;
  using R = Top<A, int64_t>;
  CSG_SHARED(R, partial, kMaxThreads / kWarp * kColumns);
  const int lanes = blockDim.x / kColumns, lane = threadIdx.x / kColumns;
  T* const gate = static_cast<T*>(p.gate);

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t k = tile * kColumns + threadIdx.x % kColumns;
    const bool active = k < p.k;
    R top = R::empty();
    if constexpr (kRows > 0) {
      A kept[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t c = lane + static_cast<int64_t>(r) * lanes;
        kept[r] = active && c < p.c ? updated<T>(p, rates, c * p.k + k, true) : A(0);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t c = lane + static_cast<int64_t>(r) * lanes;
        if (active && c < p.c) top.add(kept[r], c);
      }
      top = column_top(top, partial);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t c = lane + static_cast<int64_t>(r) * lanes;
        if (active && c < p.c) gate[c * p.k + k] = from_acc<T>(project(p.projection, kept[r], top, c));
      }
    } else {
      for (int64_t c = lane; active && c < p.c; c += lanes) top.add(updated<T>(p, rates, c * p.k + k, false), c);
      top = column_top(top, partial);
      for (int64_t c = lane; active && c < p.c; c += lanes) {
        gate[c * p.k + k] = from_acc<T>(project(p.projection, updated<T>(p, rates, c * p.k + k, true), top, c));
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) max_columns(const ColumnMax p, const int64_t tiles) {
  using R = Top<Acc<T>, int64_t>;
  CSG_SHARED(R, partial, kMaxThreads / kWarp * kColumns);
  const int lanes = blockDim.x / kColumns, lane = threadIdx.x / kColumns;

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t k = tile * kColumns + threadIdx.x % kColumns;
    R top = R::empty();
    if (k < p.k) {
#pragma unroll 8
      for (int64_t c = lane; c < p.c; c += lanes) top.add(to_acc(static_cast<const T*>(p.gate)[c * p.k + k]), c);
    }
    top = column_top(top, partial);
    if (lane == 0 && k < p.k) {
      static_cast<T*>(p.col_max)[k] = from_acc<T>(top.value);
      p.col_arg[k] = top.at;
    }
  }
}

template <typename T>
int step(const GateStep& p, void* stream) {
  using A = Acc<T>;
  const Rates<A> rates{static_cast<A>(p.lr), static_cast<A>(p.momentum), static_cast<A>(1 - p.dampening),
                       static_cast<A>(p.weight_decay)};
  const int lanes = lanes_for(p.c);
  const auto kernel = p.c <= lanes * kFewRows    ? step_columns<T, kFewRows>
                      : p.c <= lanes * kMostRows ? step_columns<T, kMostRows>
                                                 : step_columns<T, 0>;
  const int64_t tiles = ceil_div(p.k, kColumns);
  return launch(kernel, tiles, lanes * kColumns, 0, stream, p, rates, tiles);
}

}  // namespace

int gate_step_cuda(const GateStep& p, void* stream) {
  if (p.c == 0 || p.k == 0) return cudaSuccess;
  return dispatch(p.type, [&](auto t) { return step<decltype(t)>(p, stream); });
}

int column_max_cuda(const ColumnMax& p, void* stream) {
  if (p.c == 0 || p.k == 0) return cudaSuccess;
  return dispatch(p.type, [&](auto t) {
    const int64_t tiles = ceil_div(p.k, kColumns);
    return launch(max_columns<decltype(t)>, tiles, lanes_for(p.c) * kColumns, 0, stream, p, tiles);
  });
}

}  // namespace csg
