// gated_pool's CPU kernels for one instruction set; see ../common/simd.inl for how this file is compiled.
// Bytes that must move: forward reads x once; backward writes grad_x once; everything else is (N, K) or (C, K).

constexpr int64_t kChannelBlock = 256;      // channels handled together: their sums and gate rows stay in L1
constexpr int64_t kRowBlock = 64;           // rows of one work item
constexpr int64_t kWideBlock = 2048;        // the same for channels-last maps, where a block is one memory stream
constexpr int64_t kSumBlock = 2048;         // positions summed in one go: bounds the rounding error of long sums
constexpr int64_t kSumBlockWide = 128;      // the same where one chain of additions sees every position
constexpr int64_t kMaxBlock = 1 << 30;      // positions whose number fits a 32-bit lane
constexpr int64_t kPrefetchBytes = 16384;   // how far ahead of strided reads: DRAM's latency at full bandwidth
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

// The gate's row as it lies in memory, or nullptr where load_row must make it.
template <typename T>
CSG_INLINE const T* stored_row(const GateRows& g, int64_t n, int64_t k0, int64_t channels) {
  const int64_t c = g.labels ? g.labels[n] : n;
  return c < 0 || c >= g.rows || g.col_max ? nullptr : static_cast<const T*>(g.gate) + c * channels + k0;
}

// pooled = sum / divisor, out = row * pooled; the row is of type T or already in the accumulator's.
template <typename T, typename Row>
CSG_INLINE void write_pooled(const Row* row, const Accumulator<T>* sum, Accumulator<T> divisor, int64_t len, T* out,
                             T* pooled) {
  using Vec = typename Simd<T>::Vec;
  int64_t j = 0;
  for (; j + kLanes<T> <= len; j += kLanes<T>) {
    const Vec v = load_bits<Vec>(sum + j) / divisor;
    Simd<T>::store(pooled + j, v);
    Simd<T>::store(out + j, v * Simd<Row>::load(row + j));
  }
  for (; j < len; ++j) {
    const Accumulator<T> v = sum[j] / divisor;
    pooled[j] = narrow<T>(v);
    out[j] = narrow<T>(v * widen(row[j]));
  }
}

// pooled and out of `len` channels from their sums (divisor: S) or maxima (divisor: 1).
template <typename T>
CSG_INLINE void finish_as(const GatedPoolForward& p, int64_t n, int64_t k0, int64_t len, const Accumulator<T>* sum) {
  const Accumulator<T> divisor = p.pool == Pool::Avg ? Accumulator<T>(p.s) : 1;
  T* out = static_cast<T*>(p.out) + n * p.k + k0;
  T* pooled = static_cast<T*>(p.pooled) + n * p.k + k0;
  if (const T* row = stored_row<T>(p.rows, n, k0, p.k)) return write_pooled<T>(row, sum, divisor, len, out, pooled);
  Accumulator<T> row[kChannelBlock];
  for (int64_t j = 0; j < len; j += kChannelBlock) {
    const int64_t m = min64(kChannelBlock, len - j);
    load_row<T>(p.rows, n, k0 + j, m, p.k, row);
    write_pooled<T>(row, sum + j, divisor, m, out + j, pooled + j);
  }
}
static void finish(const GatedPoolForward& p, int64_t n, int64_t k0, int64_t len, const float* sum) {
  if (p.rows.type == ScalarType::Float32) return finish_as<float>(p, n, k0, len, sum);
  if (p.rows.type == ScalarType::Float16) return finish_as<Half>(p, n, k0, len, sum);
  finish_as<BFloat16>(p, n, k0, len, sum);
}
static void finish(const GatedPoolForward& p, int64_t n, int64_t k0, int64_t len, const double* sum) {
  finish_as<double>(p, n, k0, len, sum);
}

// The lanes of the result add up to the sum of n contiguous values, kLanes<X> <= n <= kSumBlock.
template <typename X>
CSG_INLINE typename Simd<X>::Vec partial_sums(const X* x, int64_t n) {
  using S = Simd<X>;
  using Vec = typename S::Vec;
  using Int = typename S::Int;
  constexpr int L = kLanes<X>;
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
  return (a + b) + (c + d);
}

// What one load brings, and its sum with others. Lanes are values, not what they are added in: bf16 needs no conversion
// when even and odd elements are added apart, the even ones shifted up, the odd ones masked.
template <typename X>
struct Strip {
  using Vec = typename Simd<X>::Vec;
  using Int = typename Simd<X>::Int;
  static constexpr int lanes = kLanes<X>;
  Vec sum{};
  static CSG_MEMBER Int load(const X* x) { return (Int)Simd<X>::load(x); }
  CSG_MEMBER void set(Int bits) { sum = (Vec)bits; }
  CSG_MEMBER void add(Int bits) { sum += (Vec)bits; }
  CSG_MEMBER Vec total() const { return sum; }
  CSG_MEMBER void store(Accumulator<X>* to) const { store_bits(to, sum); }
};
#if CSG_LEVEL > 0
template <>
struct Strip<BFloat16> {
  typedef uint16_t Int __attribute__((vector_size(CSG_WIDTH)));
  static constexpr int lanes = 2 * kLanes<BFloat16>;
  VecF even{}, odd{};
  static CSG_MEMBER Int load(const BFloat16* x) { return load_bits<Int>(x); }
  CSG_MEMBER void set(Int bits) {
    even = (VecF)((VecU32)bits << 16);
    odd = (VecF)((VecU32)bits & 0xffff0000u);
  }
  CSG_MEMBER void add(Int bits) {
    even += (VecF)((VecU32)bits << 16);
    odd += (VecF)((VecU32)bits & 0xffff0000u);
  }
  CSG_MEMBER VecF total() const { return even + odd; }
  CSG_MEMBER void store(float* to) const { store_interleaved(to, even, odd); }
};
CSG_INLINE VecF partial_sums(const BFloat16* x, int64_t n) {
  using S = Strip<BFloat16>;
  if (n < S::lanes) return partial_sums<BFloat16>(x, n);
  S sum;
  int64_t i = 0;
  for (; i + S::lanes <= n; i += S::lanes) sum.add(S::load(x + i));
  if (i < n) sum.add(S::load(x + n - S::lanes) & last_lanes<S::Int>(int(n - i)));
  return sum.total();
}
#endif

// The sums of as many rows of n values as a load has lanes, which lie one after the other: n whole vectors, none of
// which crosses a cache line where the first is aligned. One that holds the end of a row and the begin of the next is
// split by a mask.
template <int n, typename X>
CSG_INLINE void sum_adjacent_rows(const X* x, Accumulator<X>* sum) {
  using S = Strip<X>;
  typename Simd<X>::Vec part[S::lanes];
  S row;
#pragma GCC unroll 64
  for (int i = 0; i < n; ++i) {
    const int r = i * S::lanes / n, begun = i * S::lanes - r * n, left = n - begun;
    const auto bits = S::load(x + i * S::lanes);
    const auto next = bits & last_lanes<typename S::Int>(left < S::lanes ? S::lanes - left : 0);
    const auto here = bits ^ next;
    if (begun == 0)
      row.set(here);
    else
      row.add(here);
    if (left > S::lanes) continue;
    part[r] = row.total();
    row.set(next);
  }
  for (int r = 0; r < S::lanes; r += kLanes<X>) store_bits(sum + r, transposed_sum<1>(part + r));
}

template <int n, typename X>
CSG_INLINE int64_t sum_all_adjacent_rows(const X* x, int64_t len, Accumulator<X>* sum) {
  int64_t j = 0;
  for (; j + Strip<X>::lanes <= len; j += Strip<X>::lanes) sum_adjacent_rows<n>(x + j * n, sum + j);
  return j;
}

// The sums of `len` rows.
template <typename X>
CSG_INLINE void sum_rows(const X* x, int64_t stride, int64_t n, int64_t len, Accumulator<X>* sum) {
  using Vec = typename Simd<X>::Vec;
  constexpr int L = kLanes<X>;
  if (n < L) {
    for (int64_t j = 0; j < len; ++j, x += stride) {
      Accumulator<X> v = 0;
      for (int64_t i = 0; i < n; ++i) v += widen(x[i]);
      sum[j] = v;
    }
  } else if (n <= kSumBlock) {
    int64_t j = 0;
    Vec part[L];
    if (stride == n && n == 49) j = sum_all_adjacent_rows<49>(x, len, sum);
    if (stride == n && n == 64) j = sum_all_adjacent_rows<64>(x, len, sum);
    for (; j + L <= len; j += L) {
      for (int r = 0; r < L; ++r) part[r] = partial_sums(x + (j + r) * stride, n);
      store_bits(sum + j, transposed_sum<1>(part));
    }
    if (j < len) {
      for (int r = 0; r < L; ++r) part[r] = j + r < len ? partial_sums(x + (j + r) * stride, n) : Vec{};
      const Vec last = transposed_sum<1>(part);
      for (int r = 0; j + r < len; ++r) sum[j + r] = last[r];
    }
  } else {
    for (int64_t j = 0; j < len; ++j, x += stride) {
      sum[j] = 0;
      int64_t i = 0;
      for (; i + kSumBlock <= n; i += kSumBlock) sum[j] += lane_sum(partial_sums(x + i, kSumBlock));
      if (n - i >= L) {
        sum[j] += lane_sum(partial_sums(x + i, n - i));
      } else {
        for (; i < n; ++i) sum[j] += widen(x[i]);
      }
    }
  }
}

// First maximum of a row, or its first NaN.
template <typename X>
CSG_INLINE Accumulator<X> max_row(const X* x, int64_t n, int64_t* where) {
  using A = Accumulator<X>;
  using S = Simd<X>;
  using Vec = typename S::Vec;
  using Int = typename S::Int;
  constexpr int L = kLanes<X>;
  if (n < L) {
    A best = widen(x[0]);
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
  const bool any_nan = first_lane(nan) >= 0;
  const A best = any_nan ? A(0) : lane_max(top);
  // The second reading comes from L1; it ends at the first hit.
  for (int64_t i = 0;; i += L) {
    const int64_t at = min64(i, n - L);
    const Vec v = S::load(x + at);
    const int lane = first_lane(any_nan ? (Int)(v != v) : (Int)(v == best));
    if (lane < 0) continue;
    *where = at + lane;
    return any_nan ? widen(x[at + lane]) : best;
  }
}

// Rows: every channel's positions are contiguous. Work items are (sample, block of channels): which rows are added
// together, and so the bits of their sums, does not depend on the threads.
template <typename X>
CSG_INLINE void forward_rows(const GatedPoolForward& p, int64_t begin, int64_t end) {
  using A = Accumulator<X>;
  A pooled[kRowBlock];
  const int64_t blocks = (p.k + kRowBlock - 1) / kRowBlock;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / blocks, k0 = item % blocks * kRowBlock;
    const int64_t len = min64(kRowBlock, p.k - k0);
    const X* x = static_cast<const X*>(p.x) + n * p.stride_n + k0 * p.stride_k;
    if (p.pool == Pool::Avg) {
      sum_rows(x, p.stride_k, p.s, len, pooled);
    } else {
      int64_t* index = p.index + n * p.k + k0;
      for (int64_t j = 0; j < len; ++j) pooled[j] = max_row(x + j * p.stride_k, p.s, index + j);
    }
    finish(p, n, k0, len, pooled);
  }
}

// Half of the vector registers hold sums.
template <typename X>
constexpr int kStrips = (CSG_LEVEL == 2 ? 16 : 8) * kLanes<X> / Strip<X>::lanes;

// sum[j] = the sum of x[s, j] over `count` positions, for the channels of Strips strips: the sums stay in registers, so
// memory is read in pieces of Strips strips, one from each position. `next` is where the next piece begins.
template <int Strips, typename X>
CSG_INLINE void sum_strips(const X* x, int64_t stride, int64_t count, const X* next, Accumulator<X>* sum) {
  constexpr int channels = Strip<X>::lanes;
  constexpr int64_t piece = Strips * channels * int64_t(sizeof(X));
  const int64_t ahead = min64(count, max64(1, kPrefetchBytes / piece));
  Strip<X> strip[Strips];
  for (int64_t s = 0; s < count; ++s, x += stride) {
    const X* later = s + ahead < count ? x + ahead * stride : next + (s + ahead - count) * stride;
#pragma GCC unroll 16
    for (int i = 0; i < Strips; ++i) {
      if (i * channels * sizeof(X) % 64 == 0 && stride != Strips * channels)
        __builtin_prefetch(later + i * channels, 0, 2);
      strip[i].add(Strip<X>::load(x + i * channels));
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Strips; ++i) strip[i].store(sum + i * channels);
}

// The same for the channels of whole strips; returns how many they are.
template <int Strips, typename X>
CSG_INLINE int64_t sum_whole_strips(const X* x, int64_t stride, int64_t count, int64_t len, const X* next,
                                    Accumulator<X>* sum) {
  constexpr int piece = Strips * Strip<X>::lanes;
  int64_t j = 0;
  for (; j + piece <= len; j += piece)
    sum_strips<Strips>(x + j, stride, count, j + 2 * piece <= len ? x + j + piece : next, sum + j);
  if constexpr (Strips > 1) j += sum_whole_strips<Strips / 2>(x + j, stride, count, len - j, next, sum + j);
  return j;
}

// sum[j] = the sum of x[s, j] over `count` positions; `next`: what will be read after them.
template <typename X>
CSG_INLINE void sum_positions(const X* x, int64_t stride, int64_t count, int64_t len, const X* next,
                              Accumulator<X>* sum) {
  constexpr int lanes = Strip<X>::lanes;
  if (len < lanes) {
    for (int64_t j = 0; j < len; ++j) sum[j] = 0;
    for (int64_t s = 0; s < count; ++s, x += stride)
      for (int64_t j = 0; j < len; ++j) sum[j] += widen(x[j]);
  } else if (sum_whole_strips<kStrips<X>>(x, stride, count, len, next, sum) < len) {
    sum_strips<1>(x + len - lanes, stride, count, next, sum + len - lanes);  // overlaps: sums some again
  }
}

// The same for the first maximum (or the first NaN) and its position, numbered in a lane of the values' width.
template <typename X, typename Lane>
CSG_INLINE void max_positions(const X* x, int64_t stride, int64_t count, int64_t len, Accumulator<X>* top,
                              Lane* where) {
  using S = Simd<X>;
  using Vec = typename S::Vec;
  using Int = typename S::Int;
  constexpr int L = kLanes<X>;
  widen_block(top, x, len);
  for (int64_t j = 0; j < len; ++j) where[j] = 0;
  for (int64_t s = 1; s < count; ++s) {
    x += stride;
    int64_t j = 0;
    for (; j + L <= len; j += L) {
      const Vec v = S::load(x + j), best = load_bits<Vec>(top + j);
      const Int better = (v > best) | ((v != v) & (best == best));
      store_bits(top + j, better ? v : best);
      store_bits(where + j, better ? Int{} + Lane(s) : load_bits<Int>(where + j));
    }
    for (; j < len; ++j) {
      const Accumulator<X> v = widen(x[j]);
      if (v > top[j] || (v != v && top[j] == top[j])) top[j] = v, where[j] = Lane(s);
    }
  }
}

// Channels last: the channels of one position are contiguous. Work items are (sample, block of channels).
template <typename X>
CSG_INLINE void forward_channels_last(const GatedPoolForward& p, int64_t begin, int64_t end) {
  using A = Accumulator<X>;
  using Lane = decltype(typename Simd<X>::Int{}[0] + 0);
  A pooled[kWideBlock], part[kWideBlock];
  Lane where[kWideBlock];
  const int64_t blocks = (p.k + kWideBlock - 1) / kWideBlock;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / blocks, k0 = item % blocks * kWideBlock;
    const int64_t len = min64(kWideBlock, p.k - k0);
    const X* x = static_cast<const X*>(p.x) + n * p.stride_n + k0;
    if (p.pool == Pool::Avg) {
      for (int64_t s = 0; s < p.s; s += kSumBlockWide) {
        const int64_t count = min64(kSumBlockWide, p.s - s);
        const X* at = x + s * p.stride_s;
        const X* next = s + count < p.s ? at + count * p.stride_s : x + p.stride_n;
        sum_positions(at, p.stride_s, count, len, next, s == 0 ? pooled : part);
        if (s == 0) continue;
        for (int64_t j = 0; j < len; ++j) pooled[j] += part[j];
      }
    } else {
      int64_t* index = p.index + n * p.k + k0;
      for (int64_t s = 0; s < p.s; s += kMaxBlock) {
        max_positions(x + s * p.stride_s, p.stride_s, min64(kMaxBlock, p.s - s), len, part, where);
        for (int64_t j = 0; j < len; ++j) {
          const bool better = s == 0 || part[j] > pooled[j] || (part[j] != part[j] && pooled[j] == pooled[j]);
          pooled[j] = better ? part[j] : pooled[j];
          index[j] = better ? s + where[j] : index[j];
        }
      }
    }
    finish(p, n, k0, len, pooled);
  }
}

template <typename X>
CSG_INLINE void forward(const GatedPoolForward& p, ParallelFor parallel_for) {
  if (p.stride_k == 1 && (p.stride_s != 1 || p.s == 1)) {
    const int64_t blocks = (p.k + kWideBlock - 1) / kWideBlock;
    const int64_t bytes = p.s * min64(p.k, kWideBlock) * int64_t(sizeof(X));
    parallel_ranges(parallel_for, p.n * blocks, max64(1, kGrainBytes / max64(1, bytes)),
                    [&](int64_t begin, int64_t end) { forward_channels_last<X>(p, begin, end); });
  } else {
    const int64_t blocks = (p.k + kRowBlock - 1) / kRowBlock;
    const int64_t bytes = p.s * min64(p.k, kRowBlock) * int64_t(sizeof(X));
    parallel_ranges(parallel_for, p.n * blocks, max64(1, kGrainBytes / bytes),
                    [&](int64_t begin, int64_t end) { forward_rows<X>(p, begin, end); });
  }
}

void gated_pool_forward(const GatedPoolForward& p, ParallelFor parallel_for) {
  switch (p.x_type) {
    case ScalarType::Float32:
      return forward<float>(p, parallel_for);
    case ScalarType::Float64:
      return forward<double>(p, parallel_for);
    case ScalarType::Float16:
      return forward<Half>(p, parallel_for);
    case ScalarType::BFloat16:
      return forward<BFloat16>(p, parallel_for);
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// What every position of channel k0 + j receives: (grad_out * row + grad_pooled) / S, or undivided for Max.
template <typename T>
CSG_INLINE void position_gradient_as(const GatedPoolBackward& p, int64_t n, int64_t k0, int64_t len,
                                     Accumulator<T>* v) {
  using A = Accumulator<T>;
  A grad[kChannelBlock];
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
}
static void position_gradient(const GatedPoolBackward& p, int64_t n, int64_t k0, int64_t len, float* v) {
  if (p.rows.type == ScalarType::Float32) return position_gradient_as<float>(p, n, k0, len, v);
  if (p.rows.type == ScalarType::Float16) return position_gradient_as<Half>(p, n, k0, len, v);
  position_gradient_as<BFloat16>(p, n, k0, len, v);
}
static void position_gradient(const GatedPoolBackward& p, int64_t n, int64_t k0, int64_t len, double* v) {
  position_gradient_as<double>(p, n, k0, len, v);
}

CSG_INLINE VecU32 splat(float v) { return (VecU32)(VecF{} + v); }
CSG_INLINE VecU32 splat(double v) { return (VecU32)(VecD{} + v); }
CSG_INLINE VecU32 splat(Half v) { return VecU32{} + v.bits * 0x10001u; }
CSG_INLINE VecU32 splat(BFloat16 v) { return VecU32{} + v.bits * 0x10001u; }

// n copies of one value: stores of a whole vector, the last one overlapping.
template <typename X>
CSG_INLINE void fill_row(X* to, X value, int64_t n) {
  constexpr int64_t L = CSG_WIDTH / int64_t(sizeof(X));
  if (n < L) {
    for (int64_t i = 0; i < n; ++i) to[i] = value;
    return;
  }
  const VecU32 v = splat(value);
  for (int64_t i = 0; i + L <= n; i += L) store_bits(to + i, v);
  if (n % L) store_bits(to + n - L, v);
}

// Long rows by memcpy, whose string instructions do not read what they overwrite, but start too slowly for short ones.
template <typename X>
CSG_INLINE void copy_row(X* to, const X* from, int64_t n) {
  constexpr int64_t L = CSG_WIDTH / int64_t(sizeof(X));
  if (n * int64_t(sizeof(X)) > 4096) {
    __builtin_memcpy(to, from, size_t(n) * sizeof(X));
    return;
  }
  if (n < L) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i + L <= n; i += L) store_bits(to + i, load_bits<VecU32>(from + i));
  if (n % L) store_bits(to + n - L, load_bits<VecU32>(from + n - L));
}

template <typename X>
CSG_INLINE void backward_rows(const GatedPoolBackward& p, int64_t begin, int64_t end) {
  Accumulator<X> exact[kChannelBlock];
  X value[kChannelBlock];
  X* grad_x = static_cast<X*>(p.grad_x);
  for (int64_t at = begin; at < end;) {
    const int64_t n = at / p.k, k0 = at % p.k;
    const int64_t len = min64(min64(end - at, p.k - k0), kChannelBlock);
    position_gradient(p, n, k0, len, exact);
    narrow_block(value, exact, len);
    if (p.pool == Pool::Avg) {
      for (int64_t j = 0; j < len; ++j) fill_row(grad_x + (at + j) * p.s, value[j], p.s);
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

// Work items are samples: positions [s, channel] of one sample are one stream.
template <typename X>
CSG_INLINE void backward_channels_last(const GatedPoolBackward& p, int64_t begin, int64_t end) {
  Accumulator<X> exact[kChannelBlock];
  X value[kChannelBlock];
  for (int64_t n = begin; n < end; ++n) {
    X* grad_x = static_cast<X*>(p.grad_x) + n * p.s * p.k;
    if (p.pool == Pool::Max) __builtin_memset(grad_x, 0, size_t(p.s * p.k) * sizeof(X));
    for (int64_t k0 = 0; k0 < p.k; k0 += kChannelBlock) {
      const int64_t len = min64(kChannelBlock, p.k - k0);
      position_gradient(p, n, k0, len, exact);
      if (p.pool == Pool::Max) {
        narrow_block(value, exact, len);
        for (int64_t j = 0; j < len; ++j) grad_x[p.index[n * p.k + k0 + j] * p.k + k0 + j] = value[j];
      } else {
        narrow_block(grad_x + k0, exact, len);  // position 0, copied to the others below
      }
    }
    if (p.pool == Pool::Avg)
      for (int64_t s = 1; s < p.s; ++s) copy_row(grad_x + s * p.k, grad_x, p.k);
  }
}

template <typename X>
CSG_INLINE void backward_x(const GatedPoolBackward& p, ParallelFor parallel_for) {
  if (p.stride_k == 1 && (p.stride_s != 1 || p.s == 1)) {
    parallel_ranges(parallel_for, p.n, max64(1, kGrainBytes / (p.s * p.k * int64_t(sizeof(X)))),
                    [&](int64_t begin, int64_t end) { backward_channels_last<X>(p, begin, end); });
  } else {
    parallel_ranges(parallel_for, p.n * p.k, max64(1, kGrainBytes / (p.s * int64_t(sizeof(X)))),
                    [&](int64_t begin, int64_t end) { backward_rows<X>(p, begin, end); });
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

template <typename T>
CSG_INLINE void backward_gate(const GatedPoolBackward& p, ParallelFor parallel_for) {
  using A = Accumulator<T>;
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

void gated_pool_backward(const GatedPoolBackward& p, ParallelFor parallel_for) {
  if (p.grad_x && p.n * p.k > 0) {
    switch (p.x_type) {
      case ScalarType::Float32:
        backward_x<float>(p, parallel_for);
        break;
      case ScalarType::Float64:
        backward_x<double>(p, parallel_for);
        break;
      case ScalarType::Float16:
        backward_x<Half>(p, parallel_for);
        break;
      case ScalarType::BFloat16:
        backward_x<BFloat16>(p, parallel_for);
        break;
    }
  }
  if (p.grad_gate && p.k > 0) {
    switch (p.rows.type) {
      case ScalarType::Float32:
        backward_gate<float>(p, parallel_for);
        break;
      case ScalarType::Float64:
        backward_gate<double>(p, parallel_for);
        break;
      case ScalarType::Float16:
        backward_gate<Half>(p, parallel_for);
        break;
      case ScalarType::BFloat16:
        backward_gate<BFloat16>(p, parallel_for);
        break;
    }
  }
}
