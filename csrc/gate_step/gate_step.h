// gate_step: what its CPU and CUDA kernels take. Plain pointers and sizes: no torch, no CUDA.
//
// One pass over the (C, K) matrix: SGD update of the gate, then its projection, column by column, onto
// V_G = {G in [0,1]^(C x K) : max_c G[c, k] = 1}.
#pragma once

#include <cstdint>

#include "../common/types.h"

namespace csg {

enum class Projection : int8_t {
  Scale,      // divide by the column's inf-norm over its positive part, clip to [0, 1]
  Euclidean,  // the nearest point of V_G: clip to [0, 1], set the (first) largest entry to 1
};
// Both: a column without a positive entry becomes one-hot at its (first) largest entry; a column that holds a NaN
// becomes NaN throughout, so that it is seen.

struct GateStep {
  void* gate;        // [C, K] contiguous, updated in place
  const void* grad;  // [C, K] contiguous, or nullptr: project only
  void* buffer;      // [C, K] contiguous momentum buffer, or nullptr: momentum is 0
  ScalarType type;   // of all three; half types are computed in fp32, rounded once
  int64_t c, k;
  // d = grad + weight_decay * gate;  buffer = first_step ? d : momentum * buffer + (1 - dampening) * d;
  // gate -= lr * (nesterov ? d + momentum * buffer : buffer)         (torch.optim.SGD)
  double lr, momentum, dampening, weight_decay;
  bool nesterov, first_step;
  Projection projection;
};

// Largest entry of each column and its (first) row; NaN, at the first NaN, if the column holds one.
struct ColumnMax {
  const void* gate;  // [C, K] contiguous
  ScalarType type;
  int64_t c, k;
  void* col_max;     // [K], type
  int64_t* col_arg;  // [K]
};

}  // namespace csg
