// gated_pool's CPU kernel, forward: sums or maxima over the positions, then pooled and out. Part of gated_pool_cpu.inl.

constexpr int64_t kRowBlock = 128;            // most rows of one work item
constexpr int64_t kRowBlockBytes = 64 << 10;  // what more than 32 rows hold at most: long rows for more threads
constexpr int64_t kChain = 32;                // additions one after the other, whose rounding errors add up
constexpr int64_t kChainWide = 16;            // the same where a sum is one chain, not the sum of many
constexpr int64_t kSumBlockWide = 128;        // positions of channels-last maps summed in one go
constexpr int64_t kMaxBlock = 1 << 30;        // positions whose number fits a 32-bit lane
constexpr int64_t kPrefetchBytes = 4096;      // how far ahead of strided reads, into L1
constexpr int64_t kFarBytes = 16384;          // the same into L2 on AMD, where x may not lie in the last cache:
constexpr int64_t kFarFromBytes = 16 << 20;   // from this size on
constexpr int64_t kRowPrefetchBytes = 8192;   // how far ahead of rows, into L1
constexpr int64_t kCacheBytes = 40 << 20;     // such an x is larger; prefetching slows down rows that are in a cache

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
    a = add_widened<X>(a, S::load(x + i));
    b = add_widened<X>(b, S::load(x + i + L));
    c = add_widened<X>(c, S::load(x + i + 2 * L));
    d = add_widened<X>(d, S::load(x + i + 3 * L));
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
  CSG_MEMBER void add(Int bits) { sum = add_widened<X>(sum, (Vec)bits); }
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
    even = add_widened<BFloat16>(even, (VecF)((VecU32)bits << 16));
    odd = add_widened<BFloat16>(odd, (VecF)((VecU32)bits & 0xffff0000u));
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
template <bool prefetch>
CSG_INLINE int64_t sum_rows_of_49(const BFloat16* x, int64_t stride, int64_t len, float* sum) {
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
      if (prefetch) __builtin_prefetch(later, 0, 3);
      if (prefetch && r % 2) __builtin_prefetch(later + 48, 0, 3);  // a row is one and a half cache lines
      const __m512i first = loaded_once(load_bits<__m512i>(x));
      const __m512i last = loaded_once(load_bits<__m512i>(x + 49 - 2 * lanes));
      constexpr auto add = add_widened<BFloat16>;
      const VecF even = add((VecF)_mm512_slli_epi32(first, 16), (VecF)_mm512_maskz_slli_epi32(even_fresh, last, 16));
      const VecF odd = add((VecF)((VecU32)first & 0xffff0000u), (VecF)((VecU32)last & odd_fresh));
      part[r] = add(even, odd);
    }
    store_bits(sum + j, transposed_sum<1>(part));
  }
  return j;
}
CSG_INLINE int64_t sum_rows_of_49(const BFloat16* x, int64_t stride, int64_t len, bool from_dram, float* sum) {
  return from_dram ? sum_rows_of_49<true>(x, stride, len, sum) : sum_rows_of_49<false>(x, stride, len, sum);
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
CSG_INLINE void forward_rows(const GatedPoolForward& p, int64_t rows, int64_t begin, int64_t end) {
  using A = Accumulator<X>;
  A pooled[kRowBlock];
  // Intel's processors gain by fetching 7 x 7 rows of bf16 ahead from the last cache, too.
  const bool always = CSG_LEVEL == 2 && __is_same(X, BFloat16) && p.s == 49 && !cpu_is_amd();
  const bool from_dram = always || p.n * p.k * p.s * int64_t(sizeof(X)) > kCacheBytes;
  const int64_t blocks = (p.k + rows - 1) / rows;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / blocks, k0 = item % blocks * rows;
    const int64_t len = min64(rows, p.k - k0);
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
template <int Strips, bool far, typename X>
CSG_INLINE void sum_strips(const X* x, int64_t stride, int64_t count, const X* next, Accumulator<X>* sum) {
  constexpr int channels = Strip<X>::lanes;
  constexpr int64_t piece = Strips * channels * int64_t(sizeof(X));
  const int64_t near_ahead = min64(count, max64(1, kPrefetchBytes / piece));
  const int64_t far_ahead = min64(count, max64(1, kFarBytes / piece));
  Strip<X> total[Strips];
  for (int64_t s = 0; s < count;) {
    Strip<X> strip[Strips];
    for (const int64_t end = min64(count, s + kChainWide); s < end; ++s, x += stride) {
      const auto position = [=](int64_t ahead) {
        return s + ahead < count ? x + ahead * stride : next + (s + ahead - count) * stride;
      };
      const X *soon = position(near_ahead), *later = position(far_ahead);
#pragma GCC unroll 16
      for (int i = 0; i < Strips; ++i) {
        if (i * channels * sizeof(X) % 64 == 0 && stride != Strips * channels) {
          __builtin_prefetch(soon + i * channels, 0, 3);
          if (far) __builtin_prefetch(later + i * channels, 0, 2);
        }
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
template <int Strips, bool far, typename X>
CSG_INLINE int64_t sum_whole_strips(const X* x, int64_t stride, int64_t count, int64_t len, const X* next,
                                    Accumulator<X>* sum) {
  constexpr int piece = Strips * Strip<X>::lanes;
  int64_t j = 0;
  for (; j + piece <= len; j += piece)
    sum_strips<Strips, far>(x + j, stride, count, j + 2 * piece <= len ? x + j + piece : next, sum + j);
  if constexpr (Strips > 1) j += sum_whole_strips<Strips / 2, far>(x + j, stride, count, len - j, next, sum + j);
  return j;
}

// sum[j] = the sum of x[s, j] over `count` positions; `next`: what will be read after them.
template <bool far, typename X>
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
  } else if (sum_whole_strips<kStrips<X>, far>(x, stride, count, len, next, sum) < len) {
    sum_strips<1, far>(x + len - lanes, stride, count, next, sum + len - lanes);  // overlaps: sums some again
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
template <bool far, typename X>
CSG_INLINE void forward_channels_last(const GatedPoolForward& p, int64_t block, int64_t begin, int64_t end) {
  using A = Accumulator<X>;
  using Lane = decltype(typename Simd<X>::Int{}[0] + 0);
  A pooled[kWideBlock], part[kWideBlock], error[kWideBlock];
  Lane where[kWideBlock];
  const int64_t blocks = (p.k + block - 1) / block;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / blocks, k0 = item % blocks * block;
    const int64_t len = min64(block, p.k - k0);
    const X* x = static_cast<const X*>(p.x) + n * p.stride_n + k0;
    if (p.pool == Pool::Avg) {
      for (int64_t s = 0; s < p.s; s += kSumBlockWide) {
        const int64_t count = min64(kSumBlockWide, p.s - s);
        const X* at = x + s * p.stride_s;
        const X* next = s + count < p.s  ? at + count * p.stride_s
                        : k0 + len < p.k ? x + len
                        : n + 1 < p.n    ? x + p.stride_n - k0
                                         : x;
        sum_positions<far>(at, p.stride_s, count, len, next, s == 0 ? pooled : part);
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
    const int64_t size = p.n * p.k * p.s * int64_t(sizeof(X));
    int64_t block = kWideBlock;
    const auto items = [&] { return p.n * ((p.k + block - 1) / block); };
    // Few samples: fewer channels at a time give more threads work, but narrow reads cost more.
    while (size > kGrainBytes && items() < (block > 256 ? 8 : 4) && block > 64) block /= 2;
    const int64_t bytes = p.s * min64(p.k, block) * int64_t(sizeof(X));
    const bool far = size >= kFarFromBytes && cpu_is_amd();
    parallel_ranges(parallel_for, items(), max64(1, kGrainBytes / max64(1, bytes)), [&](int64_t begin, int64_t end) {
      if (far)
        forward_channels_last<true, X>(p, block, begin, end);
      else
        forward_channels_last<false, X>(p, block, begin, end);
    });
  } else {
    int64_t rows = kRowBlock;
    while (rows > 32 && rows * p.s * int64_t(sizeof(X)) > kRowBlockBytes) rows /= 2;
    const int64_t blocks = (p.k + rows - 1) / rows;
    const int64_t bytes = p.s * min64(p.k, rows) * int64_t(sizeof(X));
    parallel_ranges(parallel_for, p.n * blocks, max64(1, kGrainBytes / bytes),
                    [&](int64_t begin, int64_t end) { forward_rows<X>(p, rows, begin, end); });
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
