// gated_pool: what its CPU and CUDA kernels take. Plain pointers, sizes and strides: no torch, no CUDA.
//
//   pooled[n, k] = pool_s x[n, k, s]                 pool: mean or max over the S flattened spatial positions
//   out[n, k]    = row[n, k] * pooled[n, k]          row[n, k] = P(gate)[labels[n], k]
//
// P is the identity, or (col_max given) the projection clip(gate / ||column||_inf, 0, 1).
#pragma once

#include <cstdint>

#include "../common/types.h"

namespace csg {

enum class Pool : int8_t { Avg, Max };

// The row of the gate that each sample uses.
struct GateRows {
  const void* gate;        // [rows, K] contiguous
  ScalarType type;         // of gate, out, pooled and their gradients; equals the type of x, or is Float32 with half x
  int64_t rows;            // C with labels; N without
  const int64_t* labels;   // [N], or nullptr: sample n uses row n. A label outside [0, rows) makes its sample NaN.
  const void* col_max;     // [K] largest entry of each column, or nullptr: the gate is used as it is
  const int64_t* col_arg;  // [K] row of that entry (the first one); nullptr with col_max
};

struct GatedPoolForward {
  const void* x;  // [N, K, S]
  ScalarType x_type;
  Pool pool;
  int64_t n, k, s;
  int64_t stride_n, stride_k, stride_s;  // in elements; stride_s == 1 ("rows") or stride_k == 1 ("channels last")
  GateRows rows;
  void* out;       // [N, K] contiguous
  void* pooled;    // [N, K] contiguous
  int64_t* index;  // [N, K] position s of the maximum (the first one; the first NaN if there is one); nullptr for Avg
};

struct GatedPoolBackward {
  const void* grad_out;     // [N, K] contiguous, or nullptr: zero
  const void* grad_pooled;  // [N, K] contiguous, or nullptr: zero
  const void* pooled;       // [N, K], as the forward pass wrote it
  const int64_t* index;     // [N, K] for Max
  Pool pool;
  int64_t n, k, s;
  GateRows rows;
  void* grad_x;  // [N, K, S], or nullptr: not wanted
  ScalarType x_type;
  // Of grad_x: dense rows (stride_s == 1), dense channels last (stride_k == 1), or for Avg stride_s == 0: [N, K]
  // contiguous, a value that all positions share.
  int64_t stride_n, stride_k, stride_s;
  void* grad_gate;  // [rows, K] contiguous, every element written, or nullptr: not wanted
};

}  // namespace csg
