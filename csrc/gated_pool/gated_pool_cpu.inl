// gated_pool's CPU kernels for one instruction set; see ../common/simd.inl for how this file is compiled.
// Bytes that must move: forward reads x once; backward writes grad_x once; everything else is (N, K) or (C, K).

constexpr int64_t kChannelBlock = 256;      // channels handled together: their sums and gate rows stay in L1
constexpr int64_t kWideBlock = 2048;        // the same for channels-last maps, where a block is one memory stream
constexpr int64_t kGrainBytes = 128 << 10;  // below this a second thread costs more than it brings

// row[j] = P(gate)[labels[n], k0 + j]; NaN for a label outside the gate.
template <typename T>
CSG_INLINE void load_row(const GateRows& g, int64_t n, int64_t k0, int64_t len, int64_t channels, Accumulator<T>* row) {
  using A = Accumulator<T>;
  const int64_t c = g.labels ? g.labels[n] : n;
  if (c < 0 || c >= g.rows) {
    for (int64_t j = 0; j < len; ++j) row[j] = A(__builtin_nanf(""));
    return;
  }
  widen_block(row, static_cast<const T*>(g.gate) + c * channels + k0, len);
  if (g.col_max == nullptr) return;
  const T* top = static_cast<const T*>(g.col_max) + k0;
  for (int64_t j = 0; j < len; ++j) row[j] = project_scale(row[j], A(widen(top[j])), g.col_arg[k0 + j] == c);
}

// The gate's row as it lies in memory, or nullptr where load_row must make it.
template <typename T>
CSG_INLINE const T* stored_row(const GateRows& g, int64_t n, int64_t k0, int64_t channels) {
  const int64_t c = g.labels ? g.labels[n] : n;
  return c < 0 || c >= g.rows || g.col_max ? nullptr : static_cast<const T*>(g.gate) + c * channels + k0;
}

#include "gated_pool_forward_cpu.inl"

#include "gated_pool_backward_cpu.inl"
