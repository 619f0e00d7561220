// CUDA kernels of gate_step: SGD update, column norm and clip of the gate in one launch; the columns' maxima.
//
// Bytes that must move, with g the size of an element:
//   gate_step   g C K (gate) + g C K (grad) + g C K (buffer) read, g C K (gate) + g C K (buffer) written
//   column_max  g C K read
// Share of the memory bandwidth reached: not measured on a GPU.
//
// A block takes as many columns as fill a sector of memory side by side, and keeps them in registers between the update
// and the projection. Columns of more than kMostClasses do not fit: they are read a second time, and updated by the
// same arithmetic.
#include "gate_step_cuda.h"

#include "../common/cuda_device.cuh"
#include "../common/cuda_launch.cuh"
#include "../common/projection.h"

namespace csg {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kBatch = 8;           // entries of a column whose loads a thread has in flight together
constexpr int kMostClasses = 1024;  // of a column that is kept in registers
template <typename T>
constexpr int kColumns = kSectorBytes / static_cast<int>(sizeof(T));
template <typename T>
constexpr int kMaxLanes = kMaxThreads / kColumns<T>;  // that share a column
template <typename T>
constexpr int kMostBatches = kMostClasses / (kMaxLanes<T> * kBatch);  // that a thread keeps

// Lanes that share a column of c entries: whole warps.
template <typename T>
int lanes_for(int64_t c) {
  return std::max(kWarp / kColumns<T>, power_of_two(c, kMaxLanes<T>));
}

__device__ inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return fma(a, b, c); }

// Every thread receives the maximum of its column. `partial`: [warps][kColumns].
template <int kColumns, typename R>
__device__ inline R column_top(R top, R* partial) {
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

// Entries first, first + lanes, ... of column k after the update, before the projection; beyond the last class, 0.
// All loads precede the stores. Fused multiply-adds make a second call give the same bits.
template <typename T, typename I>
__device__ inline void update(const GateStep& p, const Rates<Acc<T>>& rates, I first, int lanes, int64_t k,
                              bool write_buffer, Acc<T> (&entry)[kBatch]) {
  using A = Acc<T>;
  const auto* const gate = static_cast<const T*>(p.gate);
  const auto* const grad = static_cast<const T*>(p.grad);
  auto* const buffer = static_cast<T*>(p.buffer);
  const bool read_buffer = buffer != nullptr && grad != nullptr && !p.first_step;
  A d[kBatch], b[kBatch];
#pragma unroll
  for (int r = 0; r < kBatch; ++r) {
    const I c = first + r * lanes;
    const int64_t i = c * p.k + k;
    const bool valid = c < p.c && k < p.k;
    entry[r] = valid ? to_acc(gate[i]) : A(0);
    d[r] = valid && grad != nullptr ? to_acc(grad[i]) : A(0);
    b[r] = valid && read_buffer ? to_acc(buffer[i]) : A(0);
  }
  if (grad == nullptr) return;
#pragma unroll
  for (int r = 0; r < kBatch; ++r) {
    const I c = first + r * lanes;
    A step = rates.weight_decay == A(0) ? d[r] : fused(rates.weight_decay, entry[r], d[r]);  // 0 * inf is NaN
    if (buffer != nullptr) {
      b[r] = p.first_step ? step : fused(rates.momentum, b[r], rates.undamped * step);
      if (write_buffer && c < p.c && k < p.k) buffer[c * p.k + k] = from_acc<T>(b[r]);
      step = p.nesterov ? fused(rates.momentum, b[r], step) : b[r];
    }
    entry[r] = fused(-rates.lr, step, entry[r]);
  }
}

template <typename A, typename I>
__device__ inline A project(Projection how, A g, const Top<A, I>& top, I c) {
  const bool is_top = c == top.at;
  return how == Projection::Scale ? project_scale(g, top.value, is_top) : project_euclidean(g, top.value, is_top);
}

// kBatches: batches of a column that a thread keeps; 0: none, columns of any length.
template <typename T, int kBatches>
__global__ void __launch_bounds__(kMaxThreads, kBatches == 1 ? 2 : 1)
    step_columns(const GateStep p, const Rates<Acc<T>> rates, const int64_t tiles) {
  using A = Acc<T>;
  using I = std::conditional_t<(kBatches > 0), int, int64_t>;  // of a class
  using R = Top<A, I>;
  CSG_SHARED(R, partial, kMaxThreads / kWarp * kColumns<T>);
  const int lanes = blockDim.x / kColumns<T>, lane = threadIdx.x / kColumns<T>;
  T* const gate = static_cast<T*>(p.gate);

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t k = tile * kColumns<T> + threadIdx.x % kColumns<T>;
    R top = R::empty();
    const auto find_top = [&](I first, const A(&entry)[kBatch]) {
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        const I c = first + r * lanes;
        if (c < p.c && k < p.k) top.add(entry[r], c);
      }
    };
    const auto write = [&](I first, const A(&entry)[kBatch]) {
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        const I c = first + r * lanes;
        if (c < p.c && k < p.k) gate[c * p.k + k] = from_acc<T>(project(p.projection, entry[r], top, c));
      }
    };
    if constexpr (kBatches > 0) {
      A kept[kBatches][kBatch];
#pragma unroll
      for (int b = 0; b < kBatches; ++b) {
        update<T, I>(p, rates, lane + b * kBatch * lanes, lanes, k, true, kept[b]);
        find_top(lane + b * kBatch * lanes, kept[b]);
      }
      top = column_top<kColumns<T>>(top, partial);
#pragma unroll
      for (int b = 0; b < kBatches; ++b) {
        int first = lane + b * kBatch * lanes;
        asm volatile("" : "+r"(first));  // addresses are computed anew: kept, they would take registers
        write(first, kept[b]);
      }
    } else {
      A entry[kBatch];
      for (int64_t first = lane; first < p.c; first += kBatch * lanes) {
        update<T, I>(p, rates, first, lanes, k, false, entry);
        find_top(first, entry);
      }
      top = column_top<kColumns<T>>(top, partial);
      for (int64_t first = lane; first < p.c; first += kBatch * lanes) {
        update<T, I>(p, rates, first, lanes, k, true, entry);
        write(first, entry);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) max_columns(const ColumnMax p, const int64_t tiles) {
  using R = Top<Acc<T>, int64_t>;
  CSG_SHARED(R, partial, kMaxThreads / kWarp * kColumns<T>);
  const int lanes = blockDim.x / kColumns<T>, lane = threadIdx.x / kColumns<T>;

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t k = tile * kColumns<T> + threadIdx.x % kColumns<T>;
    R top = R::empty();
    if (k < p.k) {
#pragma unroll 8
      for (int64_t c = lane; c < p.c; c += lanes) top.add(to_acc(static_cast<const T*>(p.gate)[c * p.k + k]), c);
    }
    top = column_top<kColumns<T>>(top, partial);
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
  const int lanes = lanes_for<T>(p.c);
  const auto kernel = p.c <= lanes * kBatch                     ? step_columns<T, 1>
                      : p.c <= lanes * kBatch * kMostBatches<T> ? step_columns<T, kMostBatches<T>>
                                                                : step_columns<T, 0>;
  const int64_t tiles = ceil_div(p.k, kColumns<T>);
  return launch(kernel, tiles, lanes * kColumns<T>, 0, stream, p, rates, tiles);
}

}  // namespace

int gate_step_cuda(const GateStep& p, void* stream) {
  if (p.c == 0 || p.k == 0) return cudaSuccess;
  return dispatch(p.type, [&](auto t) { return step<decltype(t)>(p, stream); });
}

int column_max_cuda(const ColumnMax& p, void* stream) {
  if (p.c == 0 || p.k == 0) return cudaSuccess;
  return dispatch(p.type, [&](auto t) {
    using T = decltype(t);
    const int64_t tiles = ceil_div(p.k, kColumns<T>);
    return launch(max_columns<T>, tiles, lanes_for<T>(p.c) * kColumns<T>, 0, stream, p, tiles);
  });
}

}  // namespace csg
