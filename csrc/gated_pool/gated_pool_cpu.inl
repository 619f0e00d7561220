// gated_pool's CPU kernels for one instruction set; see ../common/simd.inl for how this file is compiled.
// Bytes that must move: forward reads x once; backward writes grad_x once; everything else is (N, K) or (C, K).

constexpr int64_t kChannelBlock = 256;      // channels handled together: their sums and gate rows stay in L1
constexpr int64_t kWideBlock = 1024;        // the same for channels-last maps, where a block is one memory stream
constexpr int64_t kSumBlock = 2048;         // positions summed in one go: bounds the rounding error of long sums
constexpr int64_t kSumBlockWide = 256;      // the same where one chain of additions sees every position
constexpr int64_t kGrainBytes = 128 << 10;  // below this a second thread costs more than it brings

// ---- the gate's row -------------------------------------------------------------------------------------------------

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

// ---- forward --------------------------------------------------------------------------------------------------------

// pooled and out of `len` channels from their pooled values in the accumulator's type.
template <typename T>
CSG_INLINE void finish(const GatedPoolForward& p, int64_t n, int64_t k0, int64_t len, const Accumulator<T>* pooled) {
  using A = Accumulator<T>;
  A row[kChannelBlock];
  for (int64_t j = 0; j < len; j += kChannelBlock) {
    const int64_t m = min64(kChannelBlock, len - j), at = n * p.k + k0 + j;
    load_row<T>(p.rows, n, k0 + j, m, p.k, row);
    for (int64_t i = 0; i < m; ++i) row[i] *= pooled[j + i];
    narrow_block(static_cast<T*>(p.out) + at, row, m);
    narrow_block(static_cast<T*>(p.pooled) + at, pooled + j, m);
  }
}

// Sum of n <= kSumBlock contiguous values.
template <typename X>
CSG_INLINE Accumulator<X> sum_block(const X* x, int64_t n) {
  using S = Simd<X>;
  using Vec = typename S::Vec;
  using Int = typename S::Int;
  constexpr int L = kLanes<X>;
  if (n < L) {
    Accumulator<X> sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += widen(x[i]);
    return sum;
  }
  Vec a = S::load(x), b{}, c{}, d{};
  int64_t i = L;
  for (; i + 4 * L <= n; i += 4 * L) {
    a += S::load(x + i);
    b += S::load(x + i + L);
    c += S::load(x + i + 2 * L);
    d += S::load(x + i + 3 * L);
  }
  if (i + L <= n) b += S::load(x + i), i += L;
  if (i + L <= n) c += S::load(x + i), i += L;
  if (i + L <= n) d += S::load(x + i), i += L;
  if (i < n) a += (Vec)((Int)S::load(x + n - L) & last_lanes<Int>(int(n - i)));
  return lane_sum((a + b) + (c + d));
}

template <typename X>
CSG_INLINE Accumulator<X> sum_row(const X* x, int64_t n) {
  if (n <= kSumBlock) return sum_block(x, n);
  Accumulator<X> sum = 0;
  for (int64_t i = 0; i < n; i += kSumBlock) sum += sum_block(x + i, min64(kSumBlock, n - i));
  return sum;
}

// First maximum of a row, or its first NaN.
template <typename X>
CSG_INLINE Accumulator<X> max_row(const X* x, int64_t n, int64_t* where) {
  using A = Accumulator<X>;
  using S = Simd<X>;
  using Vec = typename S::Vec;
  using Int = typename S::Int;
  constexpr int L = kLanes<X>;
  A best;
  if (n < L) {
    best = widen(x[0]);
    *where = 0;
    for (int64_t i = 1; i < n; ++i) {
      const A v = widen(x[i]);
      if (v > best || (v != v && best == best)) best = v, *where = i;
    }
    return best;
  }
  Vec top = S::load(x);
  Int nan = top != top;
  for (int64_t i = L; i < n; i += L) {
    const Vec v = S::load(x + min64(i, n - L));  // the last load overlaps: a maximum does not mind
    nan |= v != v;
    top = v > top ? v : top;
  }
  A lane[L];
  Int is_nan = nan;
  store_bits(lane, top);
  decltype(is_nan[0] + 0) any = 0;
  for (int i = 0; i < L; ++i) any |= is_nan[i];
  best = lane[0];
  for (int i = 1; i < L; ++i) best = lane[i] > best ? lane[i] : best;
  // The second reading comes from L1; it ends at the first hit.
  for (int64_t i = 0;; i += L) {
    const int64_t at = min64(i, n - L);
    const Vec v = S::load(x + at);
    const Int hit = any ? (Int)(v != v) : (Int)(v == best);
    decltype(is_nan[0] + 0) found = 0;
    for (int j = 0; j < L; ++j) found |= hit[j];
    if (!found) continue;
    int j = 0;
    while (!hit[j]) ++j;
    *where = at + j;
    return v[j];
  }
}

// Rows: every channel's positions are contiguous. Work items are the N * K rows.
template <typename X, typename T>
CSG_INLINE void forward_rows(const GatedPoolForward& p, int64_t begin, int64_t end) {
  using A = Accumulator<X>;
  A pooled[kChannelBlock];
  for (int64_t at = begin; at < end;) {
    const int64_t n = at / p.k, k0 = at % p.k;
    const int64_t len = min64(min64(end - at, p.k - k0), kChannelBlock);
    const X* x = static_cast<const X*>(p.x) + n * p.stride_n + k0 * p.stride_k;
    if (p.pool == Pool::Avg) {
      for (int64_t j = 0; j < len; ++j) pooled[j] = sum_row(x + j * p.stride_k, p.s);
      for (int64_t j = 0; j < len; ++j) pooled[j] /= A(p.s);
    } else {
      for (int64_t j = 0; j < len; ++j) pooled[j] = max_row(x + j * p.stride_k, p.s, p.index + at + j);
    }
    finish<T>(p, n, k0, len, pooled);
    at += len;
  }
}

// sum[j] += x[s, j] over `count` positions; four positions a step, so that the sums are loaded once for four rows.
template <typename X>
CSG_INLINE void add_positions(const X* x, int64_t stride, int64_t count, int64_t len, Accumulator<X>* sum) {
  using S = Simd<X>;
  using Vec = typename S::Vec;
  constexpr int L = kLanes<X>;
  int64_t s = 0;
  for (; s + 4 <= count; s += 4, x += 4 * stride) {
    int64_t j = 0;
    for (; j + L <= len; j += L) {
      const Vec front = S::load(x + j) + S::load(x + stride + j);
      const Vec back = S::load(x + 2 * stride + j) + S::load(x + 3 * stride + j);
      store_bits(sum + j, load_bits<Vec>(sum + j) + (front + back));
    }
    for (; j < len; ++j)
      sum[j] += (widen(x[j]) + widen(x[stride + j])) + (widen(x[2 * stride + j]) + widen(x[3 * stride + j]));
  }
  for (; s < count; ++s, x += stride) {
    int64_t j = 0;
    for (; j + L <= len; j += L) store_bits(sum + j, load_bits<Vec>(sum + j) + S::load(x + j));
    for (; j < len; ++j) sum[j] += widen(x[j]);
  }
}

template <typename X>
CSG_INLINE void max_positions(const X* x, int64_t stride, int64_t count, int64_t len, Accumulator<X>* top,
                              int64_t* where) {
  for (int64_t j = 0; j < len; ++j) top[j] = widen(x[j]), where[j] = 0;
  for (int64_t s = 1; s < count; ++s) {
    x += stride;
    for (int64_t j = 0; j < len; ++j) {
      const Accumulator<X> v = widen(x[j]);
      const bool better = (v > top[j]) | ((v != v) & (top[j] == top[j]));
      top[j] = better ? v : top[j];
      where[j] = better ? s : where[j];
    }
  }
}

// Channels last: the channels of one position are contiguous. Work items are (sample, block of channels).
template <typename X, typename T>
CSG_INLINE void forward_channels_last(const GatedPoolForward& p, int64_t begin, int64_t end) {
  using A = Accumulator<X>;
  A pooled[kWideBlock], part[kWideBlock];
  const int64_t blocks = (p.k + kWideBlock - 1) / kWideBlock;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / blocks, k0 = item % blocks * kWideBlock;
    const int64_t len = min64(kWideBlock, p.k - k0);
    const X* x = static_cast<const X*>(p.x) + n * p.stride_n + k0;
    if (p.pool == Pool::Avg) {
      __builtin_memset(pooled, 0, size_t(len) * sizeof(A));
      if (p.s <= kSumBlockWide) {
        add_positions(x, p.stride_s, p.s, len, pooled);
      } else {
        for (int64_t s = 0; s < p.s; s += kSumBlockWide) {
          __builtin_memset(part, 0, size_t(len) * sizeof(A));
          add_positions(x + s * p.stride_s, p.stride_s, min64(kSumBlockWide, p.s - s), len, part);
          for (int64_t j = 0; j < len; ++j) pooled[j] += part[j];
        }
      }
      for (int64_t j = 0; j < len; ++j) pooled[j] /= A(p.s);
    } else {
      max_positions(x, p.stride_s, p.s, len, pooled, p.index + n * p.k + k0);
    }
    finish<T>(p, n, k0, len, pooled);
  }
}

template <typename X, typename T>
CSG_INLINE void forward(const GatedPoolForward& p, ParallelFor parallel_for) {
  if (p.stride_k == 1 && (p.stride_s != 1 || p.s == 1)) {
    const int64_t blocks = (p.k + kWideBlock - 1) / kWideBlock;
    const int64_t bytes = p.s * min64(p.k, kWideBlock) * int64_t(sizeof(X));
    parallel_ranges(parallel_for, p.n * blocks, max64(1, kGrainBytes / max64(1, bytes)),
                    [&](int64_t begin, int64_t end) { forward_channels_last<X, T>(p, begin, end); });
  } else {
    parallel_ranges(parallel_for, p.n * p.k, max64(1, kGrainBytes / (p.s * int64_t(sizeof(X)))),
                    [&](int64_t begin, int64_t end) { forward_rows<X, T>(p, begin, end); });
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// What every position of channel k0 + j receives: (grad_out * row + grad_pooled) / S, or undivided for Max.
template <typename X, typename T>
CSG_INLINE void position_gradient(const GatedPoolBackward& p, int64_t n, int64_t k0, int64_t len, X* value) {
  using A = Accumulator<T>;
  A v[kChannelBlock], grad[kChannelBlock];
  const int64_t at = n * p.k + k0;
  if (p.grad_out) {
    load_row<T>(p.rows, n, k0, len, p.k, v);
    widen_block(grad, static_cast<const T*>(p.grad_out) + at, len);
    for (int64_t j = 0; j < len; ++j) v[j] *= grad[j];
  } else {
    __builtin_memset(v, 0, size_t(len) * sizeof(A));
  }
  if (p.grad_pooled) {
    widen_block(grad, static_cast<const T*>(p.grad_pooled) + at, len);
    for (int64_t j = 0; j < len; ++j) v[j] += grad[j];
  }
  if (p.pool == Pool::Avg)
    for (int64_t j = 0; j < len; ++j) v[j] /= A(p.s);
  narrow_block(value, v, len);
}

// n copies of one value: stores of a whole vector, the last one overlapping.
template <typename X>
CSG_INLINE void fill_row(X* to, X value, int64_t n) {
  typedef X Pattern[CSG_WIDTH / sizeof(X)];
  constexpr int64_t L = CSG_WIDTH / int64_t(sizeof(X));
  if (n < L) {
    for (int64_t i = 0; i < n; ++i) to[i] = value;
    return;
  }
  Pattern pattern;
  for (int64_t i = 0; i < L; ++i) pattern[i] = value;
  const VecU32 v = load_bits<VecU32>(pattern);
  int64_t i = 0;
  for (; i + L <= n; i += L) store_bits(to + i, v);
  if (i < n) store_bits(to + n - L, v);
}

template <typename X, typename T>
CSG_INLINE void backward_rows(const GatedPoolBackward& p, int64_t begin, int64_t end) {
  X value[kChannelBlock];
  X* grad_x = static_cast<X*>(p.grad_x);
  for (int64_t at = begin; at < end;) {
    const int64_t n = at / p.k, k0 = at % p.k;
    const int64_t len = min64(min64(end - at, p.k - k0), kChannelBlock);
    position_gradient<X, T>(p, n, k0, len, value);
    if (p.pool == Pool::Avg) {
      for (int64_t j = 0; j < len; ++j) fill_row(grad_x + (at + j) * p.s, value[j], p.s);
    } else {
      __builtin_memset(grad_x + at * p.s, 0, size_t(len * p.s) * sizeof(X));
      for (int64_t j = 0; j < len; ++j) grad_x[(at + j) * p.s + p.index[at + j]] = value[j];
    }
    at += len;
  }
}

// Work items are samples: positions [s, channel] of one sample are one stream.
template <typename X, typename T>
CSG_INLINE void backward_channels_last(const GatedPoolBackward& p, int64_t begin, int64_t end) {
  X value[kChannelBlock];
  for (int64_t n = begin; n < end; ++n) {
    X* grad_x = static_cast<X*>(p.grad_x) + n * p.s * p.k;
    if (p.pool == Pool::Max) __builtin_memset(grad_x, 0, size_t(p.s * p.k) * sizeof(X));
    for (int64_t k0 = 0; k0 < p.k; k0 += kChannelBlock) {
      const int64_t len = min64(kChannelBlock, p.k - k0);
      if (p.pool == Pool::Max) {
        position_gradient<X, T>(p, n, k0, len, value);
        for (int64_t j = 0; j < len; ++j) grad_x[p.index[n * p.k + k0 + j] * p.k + k0 + j] = value[j];
      } else {
        position_gradient<X, T>(p, n, k0, len, grad_x + k0);  // position 0, copied to the others below
      }
    }
    if (p.pool == Pool::Avg)
      for (int64_t s = 1; s < p.s; ++s) __builtin_memcpy(grad_x + s * p.k, grad_x, size_t(p.k) * sizeof(X));
  }
}

// grad_gate of `len` channels. Samples are added in their order, so the result does not depend on the threads.
template <typename T>
CSG_INLINE void backward_gate(const GatedPoolBackward& p, int64_t k0, int64_t len, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const GateRows& g = p.rows;
  A grad[kChannelBlock], pooled[kChannelBlock], row[kChannelBlock], along[kChannelBlock];
  T* out = static_cast<T*>(p.grad_gate) + k0;
  const int64_t rows = g.rows;
  // Half types are summed in fp32 beside the result and rounded once; the others are summed in place.
  A* sum = scratch ? scratch : reinterpret_cast<A*>(out);
  const int64_t stride = scratch ? len : p.k;
  for (int64_t c = 0; c < rows; ++c) __builtin_memset(sum + c * stride, 0, size_t(len) * sizeof(A));
  __builtin_memset(along, 0, sizeof(along));
  if (p.grad_out) {
    for (int64_t n = 0; n < p.n; ++n) {
      const int64_t c = g.labels ? g.labels[n] : n, at = n * p.k + k0;
      if (c < 0 || c >= rows) continue;
      widen_block(grad, static_cast<const T*>(p.grad_out) + at, len);
      widen_block(pooled, static_cast<const T*>(p.pooled) + at, len);
      A* to = sum + c * stride;
      for (int64_t j = 0; j < len; ++j) to[j] += grad[j] * pooled[j];
      if (g.col_max == nullptr) continue;
      load_row<T>(g, n, k0, len, p.k, row);
      for (int64_t j = 0; j < len; ++j) along[j] += grad[j] * pooled[j] * row[j];
    }
  }
  if (g.col_max) {
    // d clip(g_c / m) with m = g_top: 1/m into row c where 0 <= g_c, -P_c/m into the row of the maximum.
    const T* gate = static_cast<const T*>(g.gate) + k0;
    const T* col_max = static_cast<const T*>(g.col_max) + k0;
    for (int64_t c = 0; c < rows; ++c) {
      for (int64_t j = 0; j < len; ++j) {
        const A top = widen(col_max[j]);
        A v = sum[c * stride + j];
        v = widen(gate[c * p.k + j]) >= 0 ? v : A(0);
        v = g.col_arg[k0 + j] == c ? v - along[j] : v;
        sum[c * stride + j] = top > 0 ? v / top : (top != top ? top : A(0));
      }
    }
  }
  if (scratch)
    for (int64_t c = 0; c < rows; ++c) narrow_block(out + c * p.k, sum + c * stride, len);
}

template <typename X, typename T>
CSG_INLINE void backward(const GatedPoolBackward& p, ParallelFor parallel_for) {
  using A = Accumulator<T>;
  if (p.grad_x && p.n * p.k > 0) {
    if (p.stride_k == 1 && (p.stride_s != 1 || p.s == 1)) {
      parallel_ranges(parallel_for, p.n, max64(1, kGrainBytes / (p.s * p.k * int64_t(sizeof(X)))),
                      [&](int64_t begin, int64_t end) { backward_channels_last<X, T>(p, begin, end); });
    } else {
      parallel_ranges(parallel_for, p.n * p.k, max64(1, kGrainBytes / (p.s * int64_t(sizeof(X)))),
                      [&](int64_t begin, int64_t end) { backward_rows<X, T>(p, begin, end); });
    }
  }
  if (p.grad_gate && p.k > 0) {
    const int64_t blocks = (p.k + kChannelBlock - 1) / kChannelBlock;
    const int64_t bytes = (p.rows.rows + 2 * p.n) * min64(p.k, kChannelBlock) * int64_t(sizeof(T));
    parallel_ranges(parallel_for, blocks, max64(1, kGrainBytes / max64(1, bytes)), [&](int64_t begin, int64_t end) {
      constexpr bool beside = sizeof(T) < sizeof(A);
      const Scratch scratch(beside ? p.rows.rows * min64(p.k, kChannelBlock) * int64_t(sizeof(A)) : 0);
      A* sum = beside ? static_cast<A*>(scratch.get()) : nullptr;
      for (int64_t b = begin; b < end; ++b)
        backward_gate<T>(p, b * kChannelBlock, min64(kChannelBlock, p.k - b * kChannelBlock), sum);
    });
  }
}

// ---- types ----------------------------------------------------------------------------------------------------------

// Calls f<X, T>() for the types of x and of the gate: equal, or half x with an fp32 gate.
template <typename Params, template <typename, typename> class F>
CSG_INLINE void dispatch_types(const Params& p, ParallelFor parallel_for) {
  const bool same = p.x_type == p.rows.type;
  switch (p.x_type) {
    case ScalarType::Float32: return F<float, float>::run(p, parallel_for);
    case ScalarType::Float64: return F<double, double>::run(p, parallel_for);
    case ScalarType::Float16:
      return same ? F<Half, Half>::run(p, parallel_for) : F<Half, float>::run(p, parallel_for);
    case ScalarType::BFloat16:
      return same ? F<BFloat16, BFloat16>::run(p, parallel_for) : F<BFloat16, float>::run(p, parallel_for);
  }
}
template <typename X, typename T>
struct Forward {
  static void run(const GatedPoolForward& p, ParallelFor parallel_for) { forward<X, T>(p, parallel_for); }
};
template <typename X, typename T>
struct Backward {
  static void run(const GatedPoolBackward& p, ParallelFor parallel_for) { backward<X, T>(p, parallel_for); }
};

void gated_pool_forward(const GatedPoolForward& p, ParallelFor parallel_for) {
  dispatch_types<GatedPoolForward, Forward>(p, parallel_for);
}
void gated_pool_backward(const GatedPoolBackward& p, ParallelFor parallel_for) {
  dispatch_types<GatedPoolBackward, Backward>(p, parallel_for);
}
