// gated_pool's CPU kernels for one instruction set; see ../common/simd.inl for how this file is compiled.
// Bytes that must move: forward reads x once; backward writes grad_x once; everything else is (N, K) or (C, K).

constexpr int64_t kChannelBlock = 256;       // channels handled together: their sums and gate rows stay in L1
constexpr int64_t kChannelStep = 32;         // where the channels of the gate's gradient may be split
constexpr int64_t kRowBlock = 64;            // rows of one work item
constexpr int64_t kWideBlock = 2048;         // the same for channels-last maps, where a block is one memory stream
constexpr int64_t kChain = 32;               // additions one after the other, whose rounding errors add up
constexpr int64_t kChainWide = 16;           // the same where a sum is one chain, not the sum of many
constexpr int64_t kSumBlockWide = 128;       // positions of channels-last maps summed in one go
constexpr int64_t kMaxBlock = 1 << 30;       // positions whose number fits a 32-bit lane
constexpr int64_t kPrefetchBytes = 4096;     // how far ahead of strided reads, into L1
constexpr int64_t kRowPrefetchBytes = 8192;  // the same for rows
constexpr int64_t kCacheBytes = 40 << 20;    // such an x is larger; prefetching slows down rows that are in a cache
constexpr int64_t kGrainBytes = 128 << 10;   // below this a second thread costs more than it brings
constexpr int64_t kZeroBytes = 896 << 10;    // from here on a parallel region for zeroing pays

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

// sum += v, with what rounding loses of it kept in `error`, to be added at the end by corrected(). Knuth's TwoSum.
template <typename V>
CSG_INLINE void add_exactly(V v, V* sum, V* error) {
  const V before = *sum, total = before + v, added = total - before;
  *error += (before - (total - added)) + (v - added);
  *sum = total;
}
template <typename V>
CSG_INLINE V corrected(V sum, V error) {
  return sum + (error - error == 0 ? error : V{});  // of an infinite sum it is a NaN
}

// Values whose partial sums are chains of kChain additions.
template <typename X>
constexpr int64_t kSumBlock = kChain * 4 * kLanes<X>;

// The lanes of the result add up to the sum of n contiguous values, kLanes<X> <= n.
template <typename X>
CSG_INLINE typename Simd<X>::Vec block_sums(const X* x, int64_t n, bool from_dram) {
  using S = Simd<X>;
  using Vec = typename S::Vec;
  using Int = typename S::Int;
  constexpr int L = kLanes<X>;
  Vec a = S::load(x), b{}, c{}, d{};
  int64_t i = L;
  for (; i + 4 * L <= n; i += 4 * L) {
    if (from_dram)
      for (int ahead = 0; ahead < 4 * CSG_WIDTH; ahead += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(x + i) + kRowPrefetchBytes + ahead, 0, 2);
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
  CSG_MEMBER void add(const Strip& other) { sum += other.sum; }
  CSG_MEMBER Vec total() const { return sum; }
  CSG_MEMBER void store(Accumulator<X>* to) const { store_bits(to, sum); }
};
#if CSG_LEVEL > 0
template <>
struct Strip<BFloat16> {
  typedef uint16_t Int __attribute__((vector_size(CSG_WIDTH)));
  static constexpr int lanes = 2 * kLanes<BFloat16>;
  VecF even{}, odd{};
  static CSG_MEMBER Int load(const BFloat16* x) { return loaded_once(load_bits<Int>(x)); }
  CSG_MEMBER void set(Int bits) {
    even = (VecF)((VecU32)bits << 16);
    odd = (VecF)((VecU32)bits & 0xffff0000u);
  }
  CSG_MEMBER void add(Int bits) {
    even += (VecF)((VecU32)bits << 16);
    odd += (VecF)((VecU32)bits & 0xffff0000u);
  }
  CSG_MEMBER void add(const Strip& other) { even += other.even, odd += other.odd; }
  CSG_MEMBER VecF total() const { return even + odd; }
  CSG_MEMBER void store(float* to) const { store_interleaved(to, even, odd); }
};
template <>
constexpr int64_t kSumBlock<BFloat16> = kChain * 2 * Strip<BFloat16>::lanes;
CSG_INLINE VecF block_sums(const BFloat16* x, int64_t n, bool) {
  using S = Strip<BFloat16>;
  if (n < S::lanes) return block_sums<BFloat16>(x, n, false);
  S a, b;  // two, or the processor waits for additions
  int64_t i = 0;
  for (; i + 2 * S::lanes <= n; i += 2 * S::lanes) {
    a.add(S::load(x + i));
    b.add(S::load(x + i + S::lanes));
  }
  if (i + S::lanes <= n) a.add(S::load(x + i)), i += S::lanes;
  if (i < n) b.add(S::load(x + n - S::lanes) & last_lanes<S::Int>(int(n - i)));
  a.add(b);
  return a.total();
}
#endif

// The same, from blocks of a long row.
template <typename X>
CSG_INLINE typename Simd<X>::Vec partial_sums(const X* x, int64_t n, bool from_dram) {
  constexpr int64_t block = kSumBlock<X>;
  if (n <= block) return block_sums(x, n, from_dram);
  typename Simd<X>::Vec sum{}, error{};
  for (; n >= block + kLanes<X>; n -= block, x += block) add_exactly(block_sums(x, block, from_dram), &sum, &error);
  add_exactly(block_sums(x, n, from_dram), &sum, &error);  // up to a vector longer than a block
  return corrected(sum, error);
}

// The sums of as many rows of n values as a load has lanes, which lie one after the other: n whole vectors, none of
// which crosses a cache line where the first is aligned. One that holds the end of a row and the begin of the next is
// split by a mask.
template <int n, typename X>
CSG_INLINE void sum_adjacent_rows(const X* x, bool prefetch, Accumulator<X>* sum) {
  using S = Strip<X>;
  typename Simd<X>::Vec part[S::lanes];
  S row;
#pragma GCC unroll 64
  for (int i = 0; i < n; ++i) {
    const int r = i * S::lanes / n, begun = i * S::lanes - r * n, left = n - begun;
    if (prefetch && i * S::lanes * sizeof(X) % 64 == 0)
      __builtin_prefetch(reinterpret_cast<const char*>(x + i * S::lanes) + kRowPrefetchBytes, 0, 3);
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
CSG_INLINE int64_t sum_all_adjacent_rows(const X* x, int64_t len, bool from_dram, Accumulator<X>* sum) {
  int64_t j = 0;
  if (from_dram && sizeof(X) == 2) {  // converting halves, the processor does not read far enough ahead by itself
    for (; j + Strip<X>::lanes <= len; j += Strip<X>::lanes) sum_adjacent_rows<n>(x + j * n, true, sum + j);
  } else {
    for (; j + Strip<X>::lanes <= len; j += Strip<X>::lanes) sum_adjacent_rows<n>(x + j * n, false, sum + j);
  }
  return j;
}

// 7 x 7, the commonest last map. Returns how many of the rows are done.
template <typename X>
CSG_INLINE int64_t sum_rows_of_49(const X* x, int64_t stride, int64_t len, bool from_dram, Accumulator<X>* sum) {
  return stride == 49 ? sum_all_adjacent_rows<49>(x, len, from_dram, sum) : 0;
}
#if CSG_LEVEL == 2
// From two loads of 32 that overlap: fewer instructions than splitting the vectors that two rows share.
CSG_INLINE int64_t sum_rows_of_49(const BFloat16* x, int64_t stride, int64_t len, bool, float* sum) {
  constexpr int lanes = kLanes<BFloat16>, fresh = 15;  // the second load's first element that the other does not hold
  VecU32 odd_fresh;
  for (int i = 0; i < lanes; ++i) odd_fresh[i] = 2 * i + 1 >= fresh ? 0xffff0000u : 0;
  constexpr auto even_fresh = __mmask16(0xffff << (fresh + 1) / 2);
  VecF part[lanes];
  int64_t j = 0;
  for (; j + lanes <= len; j += lanes) {
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r, x += stride) {
      const char* later = reinterpret_cast<const char*>(x) + kRowPrefetchBytes;
      __builtin_prefetch(later, 0, 3);
      if (r % 2) __builtin_prefetch(later + 48, 0, 3);  // a row is one and a half cache lines
      const __m512i first = loaded_once(load_bits<__m512i>(x));
      const __m512i last = loaded_once(load_bits<__m512i>(x + 49 - 2 * lanes));
      const VecF even = (VecF)_mm512_slli_epi32(first, 16) + (VecF)_mm512_maskz_slli_epi32(even_fresh, last, 16);
      const VecF odd = (VecF)((VecU32)first & 0xffff0000u) + (VecF)((VecU32)last & odd_fresh);
      part[r] = even + odd;
    }
    store_bits(sum + j, transposed_sum<1>(part));
  }
  return j;
}
#endif

// The sums of `len` rows.
template <typename X>
CSG_INLINE void sum_rows(const X* x, int64_t stride, int64_t n, int64_t len, bool from_dram, Accumulator<X>* sum) {
  using Vec = typename Simd<X>::Vec;
  constexpr int L = kLanes<X>;
  if (n < L) {
    for (int64_t j = 0; j < len; ++j, x += stride) {
      Accumulator<X> v = 0;
      for (int64_t i = 0; i < n; ++i) v += widen(x[i]);
      sum[j] = v;
    }
  } else {
    int64_t j = 0;
    Vec part[L];
    const bool prefetch = from_dram && n >= 256;  // shorter rows have no room for it
    if (n == 49) j = sum_rows_of_49(x, stride, len, from_dram, sum);
    if (stride == n && n == 64) j = sum_all_adjacent_rows<64>(x, len, from_dram, sum);
    for (; j + L <= len; j += L) {
      for (int r = 0; r < L; ++r) part[r] = partial_sums(x + (j + r) * stride, n, prefetch);
      store_bits(sum + j, transposed_sum<1>(part));
    }
    if (j < len) {
      for (int r = 0; r < L; ++r) part[r] = j + r < len ? partial_sums(x + (j + r) * stride, n, prefetch) : Vec{};
      const Vec last = transposed_sum<1>(part);
      for (int r = 0; j + r < len; ++r) sum[j + r] = last[r];
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
  const bool from_dram = p.n * p.k * p.s * int64_t(sizeof(X)) > kCacheBytes;
  const int64_t blocks = (p.k + kRowBlock - 1) / kRowBlock;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / blocks, k0 = item % blocks * kRowBlock;
    const int64_t len = min64(kRowBlock, p.k - k0);
    const X* x = static_cast<const X*>(p.x) + n * p.stride_n + k0 * p.stride_k;
    if (p.pool == Pool::Avg) {
      sum_rows(x, p.stride_k, p.s, len, from_dram, pooled);
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
  Strip<X> total[Strips];
  for (int64_t s = 0; s < count;) {
    Strip<X> strip[Strips];
    for (const int64_t end = min64(count, s + kChainWide); s < end; ++s, x += stride) {
      const X* later = s + ahead < count ? x + ahead * stride : next + (s + ahead - count) * stride;
#pragma GCC unroll 16
      for (int i = 0; i < Strips; ++i) {
        if (i * channels * sizeof(X) % 64 == 0 && stride != Strips * channels)
          __builtin_prefetch(later + i * channels, 0, 3);
        strip[i].add(Strip<X>::load(x + i * channels));
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < Strips; ++i) total[i].add(strip[i]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < Strips; ++i) total[i].store(sum + i * channels);
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
    for (int64_t s = 0; s < count;) {
      Accumulator<X> part[lanes] = {};
      for (const int64_t end = min64(count, s + kChainWide); s < end; ++s, x += stride)
        for (int64_t j = 0; j < len; ++j) part[j] += widen(x[j]);
      for (int64_t j = 0; j < len; ++j) sum[j] += part[j];
    }
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
  A pooled[kWideBlock], part[kWideBlock], error[kWideBlock];
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
        for (int64_t j = 0; j < len && s == 0; ++j) error[j] = 0;
        for (int64_t j = 0; j < len && s > 0; ++j) add_exactly(part[j], &pooled[j], &error[j]);
      }
      for (int64_t j = 0; j < len && p.s > kSumBlockWide; ++j) pooled[j] = corrected(pooled[j], error[j]);
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

// Work items are samples: positions [s, channel] of one sample are one stream.
template <typename X>
CSG_INLINE void backward_channels_last(const GatedPoolBackward& p, int64_t begin, int64_t end) {
  X value[kWideBlock];
  for (int64_t n = begin; n < end; ++n) {
    X* grad_x = static_cast<X*>(p.grad_x) + n * p.s * p.k;
    X* row = p.k <= kWideBlock ? value : grad_x;  // what every position receives; in position 0 where it is too wide
    if (p.pool == Pool::Max) __builtin_memset(grad_x, 0, size_t(p.s * p.k) * sizeof(X));
    for (int64_t k0 = 0; k0 < p.k; k0 += kChannelBlock) {
      const int64_t len = min64(kChannelBlock, p.k - k0);
      position_gradient(p, n, k0, len, p.pool == Pool::Max ? value : row + k0);
      if (p.pool == Pool::Max) {
        for (int64_t j = 0; j < len; ++j) grad_x[p.index[n * p.k + k0 + j] * p.k + k0 + j] = value[j];
      }
    }
    if (p.pool == Pool::Avg) copy_row(row == value ? grad_x : grad_x + p.k, row == value ? p.s : p.s - 1, row, p.k);
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
  const bool channels_last = p.stride_k == 1 && (p.stride_s != 1 || p.s == 1);
  const bool fill = p.grad_x && p.n > 0;
  const int64_t items = !fill ? p.k : channels_last ? p.n : p.n * p.k;
  const int64_t gate_bytes = p.grad_gate ? (p.rows.rows + 2 * p.n) * p.k * int64_t(sizeof(X)) : 0;
  const int64_t bytes = gate_bytes + (fill ? p.n * p.k * p.s * int64_t(sizeof(X)) : 0);
  const bool zeroed = zero_gate_gradient(p, parallel_for);
  const auto first_channel = [&](int64_t item) {
    return item == items ? p.k : p.k * item / items / kChannelStep * kChannelStep;
  };
  parallel_ranges(parallel_for, items, max64(1, kGrainBytes / max64(1, bytes / items)),
                  [&](int64_t begin, int64_t end) {
                    if (p.grad_gate) backward_gate(p, first_channel(begin), first_channel(end), zeroed);
                    if (!fill) return;
                    if (channels_last) return backward_channels_last<X>(p, begin, end);
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
