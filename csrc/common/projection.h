// The projection of one gate entry, for every kernel but gate_step's on the CPU, which has the formulas for vectors.
#pragma once

#if defined(__CUDACC__)
#define CSG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define CSG_HOST_DEVICE inline
#endif

namespace csg {

// clip(g / ||column||_inf, 0, 1) with top the column's largest entry; where no entry is positive, one-hot at the entry
// that is_top names. A NaN is never turned into a number.
template <typename A>
CSG_HOST_DEVICE A project_scale(A g, A top, bool is_top) {
  if (top > 0) {
    const A v = g / top;
    return v < 0 ? A(0) : v > 1 ? A(1) : v;
  }
  return top != top ? top : A(is_top);
}

// The nearest point of V_G: clip(g, 0, 1), and 1 for the column's largest entry.
template <typename A>
CSG_HOST_DEVICE A project_euclidean(A g, A top, bool is_top) {
  if (top != top) return top;
  return is_top || g > 1 ? A(1) : g < 0 ? A(0) : g;
}

}  // namespace csg
