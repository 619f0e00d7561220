// gated_pool's CPU kernel, backward: what every position receives, and the gate's gradient. Part of gated_pool_cpu.inl.

constexpr int64_t kChannelStep = 32;       // where the channels of the gate's gradient may be split
constexpr int64_t kZeroBytes = 896 << 10;  // from here on a parallel region for zeroing pays

// value = (grad_out * row + grad_pooled) / divisor, rounded to X; the row is of type T or already in the accumulator's.
template <typename X, typename T, typename Row>
CSG_INLINE void spread_gradient(const Row* row, const T* grad_out, const T* grad_pooled, Accumulator<T> divisor,
                                int64_t len, X* value) {
  using Vec = typename Simd<T>::Vec;
  int64_t j = 0;
  for (; j + kLanes<T> <= len; j += kLanes<T>) {
    Vec sum{};
    if (grad_out) sum = Simd<T>::load(grad_out + j) * Simd<Row>::load(row + j);
    if (grad_pooled) sum += Simd<T>::load(grad_pooled + j);
    Simd<X>::store(value + j, sum / divisor);
  }
  for (; j < len; ++j) {
    Accumulator<T> sum = 0;
    if (grad_out) sum = widen(grad_out[j]) * widen(row[j]);
    if (grad_pooled) sum += widen(grad_pooled[j]);
    value[j] = narrow<X>(sum / divisor);
  }
}
template <typename X, typename T>
CSG_INLINE void position_gradient_as(const GatedPoolBackward& p, int64_t n, int64_t k0, int64_t len, X* value) {
  const int64_t at = n * p.k + k0;
  const T* grad_out = p.grad_out ? static_cast<const T*>(p.grad_out) + at : nullptr;
  const T* grad_pooled = p.grad_pooled ? static_cast<const T*>(p.grad_pooled) + at : nullptr;
  const Accumulator<T> divisor = p.pool == Pool::Avg ? Accumulator<T>(p.s) : 1;
  if (const T* row = stored_row<T>(p.rows, n, k0, p.k))
    return spread_gradient(row, grad_out, grad_pooled, divisor, len, value);
  Accumulator<T> row[kChannelBlock];
  load_row<T>(p.rows, n, k0, len, p.k, row);
  spread_gradient(row, grad_out, grad_pooled, divisor, len, value);
}
// What every position of channel k0 + j receives, or for Max the position of its maximum; len <= kChannelBlock.
template <typename X>
static void position_gradient(const GatedPoolBackward& p, int64_t n, int64_t k0, int64_t len, X* value) {
  if constexpr (sizeof(X) == 2)
    if (p.rows.type == ScalarType::Float32) return position_gradient_as<X, float>(p, n, k0, len, value);
  position_gradient_as<X, X>(p, n, k0, len, value);
}

typedef uint16_t VecU16 __attribute__((vector_size(CSG_WIDTH)));
CSG_INLINE VecI32 splat(float v) { return (VecI32)(VecF{} + v); }
CSG_INLINE VecI64 splat(double v) { return (VecI64)(VecD{} + v); }
CSG_INLINE VecU16 splat(Half v) { return VecU16{} + v.bits; }
CSG_INLINE VecU16 splat(BFloat16 v) { return VecU16{} + v.bits; }

// n copies of one value: stores of a whole vector, the last one overlapping.
template <typename X>
CSG_INLINE void fill_row(X* to, X value, int64_t n) {
  constexpr int64_t L = CSG_WIDTH / int64_t(sizeof(X));
  if (n < L) {
    for (int64_t i = 0; i < n; ++i) to[i] = value;
    return;
  }
  const auto v = splat(value);
  for (int64_t i = 0; i + L <= n; i += L) store_bits(to + i, v);
  if (n % L) store_bits(to + n - L, v);
}

// As many rows of n values as a vector has lanes, which lie one after the other: whole vectors, as in
// sum_adjacent_rows.
template <int n, typename X>
CSG_INLINE void fill_adjacent_rows(X* to, const X* value) {
  constexpr int lanes = CSG_WIDTH / int(sizeof(X));
  using Int = decltype(splat(X{}));
#pragma GCC unroll 64
  for (int i = 0; i < n; ++i) {
    const int r = i * lanes / n, left = (r + 1) * n - i * lanes;
    Int v = splat(value[r]);
    if (left < lanes) v = last_lanes<Int>(lanes - left) ? splat(value[r + 1]) : v;
    store_bits(to + i * lanes, v);
  }
}

// `len` rows of n values.
template <typename X>
CSG_INLINE void fill_rows(X* to, const X* value, int64_t n, int64_t len) {
  constexpr int64_t lanes = CSG_WIDTH / int64_t(sizeof(X));
  int64_t j = 0;
  if (n == 49)
    for (; j + lanes <= len; j += lanes) fill_adjacent_rows<49>(to + j * n, value + j);
  for (; j < len; ++j) fill_row(to + j * n, value[j], n);
}

// `count` rows of n values, each a copy of `row`; up to Vectors vectors stay in registers.
template <int Vectors, typename X>
CSG_INLINE void copy_short_row(X* to, int64_t count, const X* row) {
  constexpr int64_t lanes = CSG_WIDTH / int64_t(sizeof(X));
  VecU32 v[Vectors];
  for (int i = 0; i < Vectors; ++i) v[i] = load_bits<VecU32>(row + i * lanes);
  for (int64_t s = 0; s < count; ++s, to += Vectors * lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < Vectors; ++i) store_bits(to + i * lanes, v[i]);
  }
}
template <typename X>
CSG_INLINE void copy_row(X* to, int64_t count, const X* row, int64_t n) {
  constexpr int64_t lanes = CSG_WIDTH / int64_t(sizeof(X));
  if (n == 16 * lanes) return copy_short_row<16>(to, count, row);
  if (n == 8 * lanes) return copy_short_row<8>(to, count, row);
  if (n == 4 * lanes) return copy_short_row<4>(to, count, row);
  if (n == 2 * lanes) return copy_short_row<2>(to, count, row);
  if (n < lanes) {
    for (int64_t s = 0; s < count; ++s, to += n)
      for (int64_t i = 0; i < n; ++i) to[i] = row[i];
    return;
  }
  for (int64_t s = 0; s < count; ++s, to += n) {
    for (int64_t i = 0; i + lanes <= n; i += lanes) store_bits(to + i, load_bits<VecU32>(row + i));
    if (n % lanes) store_bits(to + n - lanes, load_bits<VecU32>(row + n - lanes));
  }
}

template <typename X>
CSG_INLINE void backward_rows(const GatedPoolBackward& p, int64_t begin, int64_t end) {
  X value[kChannelBlock];
  X* grad_x = static_cast<X*>(p.grad_x);
  for (int64_t at = begin; at < end;) {
    const int64_t n = at / p.k, k0 = at % p.k;
    const int64_t len = min64(min64(end - at, p.k - k0), kChannelBlock);
    position_gradient(p, n, k0, len, value);
    if (p.pool == Pool::Avg) {
      fill_rows(grad_x + at * p.s, value, p.s, len);
    } else {
      for (int64_t j = 0; j < len; ++j) {
        X* row = grad_x + (at + j) * p.s;
        fill_row(row, X{}, p.s);
        row[p.index[at + j]] = value[j];
      }
    }
    at += len;
  }
}

// Work items are the rows: one value for all positions of each.
template <typename X>
CSG_INLINE void backward_shared(const GatedPoolBackward& p, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end;) {
    const int64_t len = min64(min64(end - at, p.k - at % p.k), kChannelBlock);
    position_gradient(p, at / p.k, at % p.k, len, static_cast<X*>(p.grad_x) + at);
    at += len;
  }
}

// Work items are (sample, span of positions): positions [s, channel] of one sample are one stream, cut where there are
// few samples.
template <typename X>
CSG_INLINE void backward_channels_last(const GatedPoolBackward& p, int64_t span, int64_t begin, int64_t end) {
  X value[kWideBlock];
  X other_span{};  // takes what belongs to other spans
  const int64_t spans = (p.s + span - 1) / span;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / spans, first = item % spans * span, count = min64(span, p.s - first);
    X* grad_x = static_cast<X*>(p.grad_x) + (n * p.s + first) * p.k;
    X* row = p.k <= kWideBlock ? value : grad_x;  // what every position receives; in the first where it is too wide
    if (p.pool == Pool::Max) __builtin_memset(grad_x, 0, size_t(count * p.k) * sizeof(X));
    for (int64_t k0 = 0; k0 < p.k; k0 += kChannelBlock) {
      const int64_t len = min64(kChannelBlock, p.k - k0);
      position_gradient(p, n, k0, len, p.pool == Pool::Max ? value : row + k0);
      for (int64_t j = 0; j < len && p.pool == Pool::Max; ++j) {
        const int64_t s = p.index[n * p.k + k0 + j] - first;
        X* to = uint64_t(s) < uint64_t(count) ? grad_x + s * p.k + k0 + j : &other_span;  // a branch would be guessed
        *to = value[j];
      }
    }
    if (p.pool == Pool::Avg) copy_row(row == value ? grad_x : grad_x + p.k, row == value ? count : count - 1, row, p.k);
  }
}

// sum += grad_out * pooled, and where the row is given also along += grad_out * pooled * row.
template <typename T>
CSG_INLINE void add_gate_gradient(const T* grad_out, const T* pooled, const Accumulator<T>* row, int64_t len,
                                  Accumulator<T>* sum, Accumulator<T>* along) {
  using Vec = typename Simd<T>::Vec;
  int64_t j = 0;
  for (; j + kLanes<T> <= len; j += kLanes<T>) {
    const Vec v = Simd<T>::load(grad_out + j) * Simd<T>::load(pooled + j);
    store_bits(sum + j, load_bits<Vec>(sum + j) + v);
    if (row) store_bits(along + j, load_bits<Vec>(along + j) + v * load_bits<Vec>(row + j));
  }
  for (; j < len; ++j) {
    const Accumulator<T> v = widen(grad_out[j]) * widen(pooled[j]);
    sum[j] += v;
    if (row) along[j] += v * row[j];
  }
}

// The sums of `len` channels of grad_gate; row c's are at sum[slot[c] * stride], or where there are no slots at
// sum[c * stride]. Samples are added in their order, so the result does not depend on the threads.
template <typename T>
CSG_INLINE void sum_gate_gradient(const GatedPoolBackward& p, int64_t k0, int64_t len, Accumulator<T>* sum,
                                  int64_t stride, const int64_t* slot) {
  using A = Accumulator<T>;
  const GateRows& g = p.rows;
  A row[kChannelBlock], along[kChannelBlock] = {};
  for (int64_t n = 0; n < p.n && p.grad_out; ++n) {
    const int64_t c = g.labels ? g.labels[n] : n, at = n * p.k + k0;
    if (c < 0 || c >= g.rows) continue;
    if (g.col_max) load_row<T>(g, n, k0, len, p.k, row);
    add_gate_gradient(static_cast<const T*>(p.grad_out) + at, static_cast<const T*>(p.pooled) + at,
                      g.col_max ? row : nullptr, len, sum + (slot ? slot[c] : c) * stride, along);
  }
  if (g.col_max == nullptr) return;
  // d clip(g_c / m) with m = g_top: 1/m into row c where 0 <= g_c, -P_c/m into the row of the maximum.
  const T* gate = static_cast<const T*>(g.gate) + k0;
  const T* col_max = static_cast<const T*>(g.col_max) + k0;
  for (int64_t c = 0; c < g.rows; ++c) {
    for (int64_t j = 0; j < len; ++j) {
      const A top = widen(col_max[j]);
      A v = sum[c * stride + j];
      v = widen(gate[c * p.k + j]) >= 0 ? v : A(0);
      v = g.col_arg[k0 + j] == c ? v - along[j] : v;
      sum[c * stride + j] = top > 0 ? v / top : (top != top ? top : A(0));
    }
  }
}

// grad_gate of the channels [begin, end).
template <typename T>
static void backward_gate_as(const GatedPoolBackward& p, int64_t begin, int64_t end, bool zeroed) {
  using A = Accumulator<T>;
  const GateRows& g = p.rows;
  T* out = static_cast<T*>(p.grad_gate);
  if (!zeroed)  // most rows may have no sample: in stretches as long as there are
    for (int64_t c = 0; c < g.rows; ++c) __builtin_memset(out + c * p.k + begin, 0, size_t(end - begin) * sizeof(T));
  if constexpr (sizeof(T) == sizeof(A)) {
    for (int64_t k0 = begin; k0 < end; k0 += kChannelBlock)
      sum_gate_gradient<T>(p, k0, min64(kChannelBlock, end - k0), out + k0, p.k, nullptr);
  } else {
    // Half types are summed in fp32 beside the result, the rows that have a sample, and rounded once.
    const Scratch slots(g.rows * int64_t(sizeof(int64_t)));
    int64_t* slot = static_cast<int64_t*>(slots.get());
    int64_t used = g.col_max ? g.rows : 0;
    for (int64_t c = 0; c < g.rows; ++c) slot[c] = g.col_max ? c : -1;
    for (int64_t n = 0; n < p.n; ++n) {
      const int64_t c = g.labels ? g.labels[n] : n;
      if (c >= 0 && c < g.rows && slot[c] < 0) slot[c] = used++;
    }
    const Scratch sums(used * min64(end - begin, kChannelBlock) * int64_t(sizeof(A)));
    A* sum = static_cast<A*>(sums.get());
    for (int64_t k0 = begin; k0 < end; k0 += kChannelBlock) {
      const int64_t len = min64(kChannelBlock, end - k0);
      __builtin_memset(sum, 0, size_t(used * len) * sizeof(A));
      sum_gate_gradient<T>(p, k0, len, sum, len, slot);
      for (int64_t c = 0; c < g.rows; ++c)
        if (slot[c] >= 0) narrow_block(out + c * p.k + k0, sum + slot[c] * len, len);
    }
  }
}
static void backward_gate(const GatedPoolBackward& p, int64_t begin, int64_t end, bool zeroed) {
  if (begin >= end) return;
  switch (p.rows.type) {
    case ScalarType::Float32:
      return backward_gate_as<float>(p, begin, end, zeroed);
    case ScalarType::Float64:
      return backward_gate_as<double>(p, begin, end, zeroed);
    case ScalarType::Float16:
      return backward_gate_as<Half>(p, begin, end, zeroed);
    case ScalarType::BFloat16:
      return backward_gate_as<BFloat16>(p, begin, end, zeroed);
  }
}

// Zeroes a gate's gradient that is large enough to be shared out by rows, each thread one stretch of memory.
CSG_INLINE bool zero_gate_gradient(const GatedPoolBackward& p, ParallelFor parallel_for) {
  const ScalarType type = p.rows.type;
  const int64_t row = p.k * (type == ScalarType::Float64 ? 8 : type == ScalarType::Float32 ? 4 : 2);
  if (!p.grad_gate || p.rows.rows * row < kZeroBytes) return false;
  parallel_ranges(parallel_for, p.rows.rows, max64(1, kGrainBytes / row), [&](int64_t begin, int64_t end) {
    __builtin_memset(static_cast<char*>(p.grad_gate) + begin * row, 0, size_t((end - begin) * row));
  });
  return true;
}

// Both gradients in one parallel region: who has the items [begin, end) of `items` has the same share of the channels.
// The gate's comes first, as writing grad_x drives what it reads out of the cache.
template <typename X>
CSG_INLINE void backward(const GatedPoolBackward& p, ParallelFor parallel_for) {
  const bool shared = p.stride_s == 0;
  const bool channels_last = !shared && p.stride_k == 1 && (p.stride_s != 1 || p.s == 1);
  const bool fill = p.grad_x && p.n > 0;
  int64_t span = p.s;  // few large samples: cut, for more threads, into positions enough to repay the row's computation
  const auto spans = [&] { return (p.s + span - 1) / span; };
  if (channels_last && fill && p.n * p.k * p.s * int64_t(sizeof(X)) > kGrainBytes) {
    while (p.n * spans() < 8 && span > (p.pool == Pool::Avg ? 32 : 256)) span = (span + 1) / 2;
  }
  const int64_t items = !fill ? p.k : p.n * (channels_last ? spans() : p.k);
  const int64_t gate_bytes = p.grad_gate ? (p.rows.rows + 2 * p.n) * p.k * int64_t(sizeof(X)) : 0;
  const int64_t bytes = gate_bytes + (fill ? p.n * p.k * (shared ? 1 : p.s) * int64_t(sizeof(X)) : 0);
  const bool zeroed = zero_gate_gradient(p, parallel_for);
  const auto first_channel = [&](int64_t item) {
    return item == items ? p.k : p.k * item / items / kChannelStep * kChannelStep;
  };
  parallel_ranges(parallel_for, items, max64(1, kGrainBytes / max64(1, bytes / items)),
                  [&](int64_t begin, int64_t end) {
                    if (p.grad_gate) backward_gate(p, first_channel(begin), first_channel(end), zeroed);
                    if (!fill) return;
                    if (shared) return backward_shared<X>(p, begin, end);
                    if (channels_last) return backward_channels_last<X>(p, span, begin, end);
                    backward_rows<X>(p, begin, end);
                  });
}

void gated_pool_backward(const GatedPoolBackward& p, ParallelFor parallel_for) {
  if (p.k == 0) return;
  switch (p.x_type) {
    case ScalarType::Float32:
      return backward<float>(p, parallel_for);
    case ScalarType::Float64:
      return backward<double>(p, parallel_for);
    case ScalarType::Float16:
      return backward<Half>(p, parallel_for);
    case ScalarType::BFloat16:
      return backward<BFloat16>(p, parallel_for);
  }
}
