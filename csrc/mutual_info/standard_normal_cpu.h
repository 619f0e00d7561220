// NumPy's legacy stream of standard normal numbers (RandomState.standard_normal), which scikit-learn adds to features.
#pragma once

#include <cstdint>

#include "../common/cpu.h"

namespace csg {

// RandomState.get_state(): the Mersenne Twister's words, the next one to use, and the second half of a pair if one is
// left over.
struct NormalState {
  uint32_t key[624];
  int position;  // in [0, 624]
  bool has_gauss;
  double gauss;
};

// Draws n x k numbers in row-major order, as standard_normal((n, k)) does, and keeps columns [begin, end):
// out[(j - begin) * n + i] = draw[i, j]. The state moves past all of them. The polar method of Marsaglia (1964).
void standard_normal_cpu(NormalState& state, int64_t n, int64_t k, int64_t begin, int64_t end, double* out,
                         ParallelFor parallel_for);

}  // namespace csg
