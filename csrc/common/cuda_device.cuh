// Device helpers of every kernel: conversions, 16-byte accesses, reductions over lanes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "types.h"

namespace csg {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// ---- Types: half types are computed in fp32.

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float to_acc(float v) { return v; }
__device__ inline double to_acc(double v) { return v; }
__device__ inline float to_acc(__half v) { return __half2float(v); }
__device__ inline float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ inline T from_acc(Acc<T> v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else {
    return v;
  }
}

// Host: calls fn(T{}) with the C++ type of a ScalarType.
template <typename Fn>
int dispatch(ScalarType type, Fn fn) {
  switch (type) {
    case ScalarType::Float32:
      return fn(float{});
    case ScalarType::Float64:
      return fn(double{});
    case ScalarType::Float16:
      return fn(__half{});
    default:
      return fn(__nv_bfloat16{});
  }
}

// ---- 16-byte accesses.

constexpr int kVectorBytes = 16;
constexpr int kSectorBytes = 32;  // the least that memory moves

template <typename T>
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));

// Elements of width * sizeof(T) bytes that move as one access.
template <typename T, int kWidth>
struct Pack {
  T v[kWidth];
};

template <typename T, int kWidth>
__device__ inline Pack<T, kWidth> load_pack(const T* p) {
  Pack<T, kWidth> out;
  if constexpr (kWidth == 1) {
    out.v[0] = *p;
  } else {
    static_assert(kWidth == kVector<T>);
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    memcpy(out.v, &raw, sizeof(raw));
  }
  return out;
}

template <typename T, int kWidth>
__device__ inline void store_pack(T* p, const Pack<T, kWidth>& in) {
  if constexpr (kWidth == 1) {
    *p = in.v[0];
  } else {
    static_assert(kWidth == kVector<T>);
    uint4 raw;
    memcpy(&raw, in.v, sizeof(raw));
    *reinterpret_cast<uint4*>(p) = raw;
  }
}

// Elements from p to the next 16-byte boundary.
template <typename T>
__host__ __device__ inline int to_boundary(const T* p) {
  const auto past = static_cast<int>(reinterpret_cast<uintptr_t>(p) % kVectorBytes / sizeof(T));
  return past == 0 ? 0 : kVector<T> - past;
}

// ---- Reductions. add() takes positions in ascending order; merge() takes any order and gives the same answer.

template <typename A, typename I>
struct Sum {
  A value;

  __device__ static Sum empty() { return {A(0)}; }
  __device__ static Sum of(A x, I) { return {x}; }
  __device__ void add(A x, I) { value += x; }
  __device__ void merge(const Sum& other) { value += other.value; }
  __device__ Sum from_lane_xor(int offset) const { return {__shfl_xor_sync(kFullMask, value, offset)}; }
};

// The first maximum and where it stands; a NaN wins, the first one.
template <typename A, typename I>
struct Top {
  static constexpr I kNone = std::numeric_limits<I>::max();
  A value;
  I at;

  __device__ static Top empty() { return {-static_cast<A>(INFINITY), kNone}; }
  __device__ static Top of(A x, I i) { return {x, i}; }
  __device__ void add(A x, I i) {
    const bool larger = !(x <= value) && value == value;  // also when x is NaN
    if (larger || at == kNone) {
      value = x;
      at = i;
    }
  }
  __device__ void merge(const Top& other) {
    const bool nan = value != value, other_nan = other.value != other.value;
    const bool tie = nan ? other_nan : other.value == value;
    if (tie ? other.at < at : (other_nan || other.value > value)) *this = other;
  }
  __device__ Top from_lane_xor(int offset) const {
    return {__shfl_xor_sync(kFullMask, value, offset), __shfl_xor_sync(kFullMask, at, offset)};
  }
};

// Merges the lanes whose number differs in the bits from `first` up to, not including, `end` (powers of two).
template <typename R>
__device__ inline void merge_lanes(R& r, int first, int end) {
  for (int offset = first; offset < end; offset *= 2) r.merge(r.from_lane_xor(offset));
}

}  // namespace csg
