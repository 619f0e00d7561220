// mutual_info's CPU kernel, second pass: every sample among all samples, and what changes when one of the classes
// around it is taken out. Part of mutual_info_cpu.inl.

// ---- samples among all samples, one class taken out -----------------------------------------------------------------

// A label for each of kDoubles samples, and what comparisons of them or of their distances give.
#if CSG_LEVEL == 2
typedef VecI32Half Labels;
typedef __mmask8 Mask;
CSG_INLINE Labels load_labels(const int32_t* p) { return load_bits<Labels>(p); }
CSG_INLINE Mask less(VecD a, VecD b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LT_OQ); }
CSG_INLINE Mask equal(Labels a, Labels b) { return _mm256_cmpeq_epi32_mask((__m256i)a, (__m256i)b); }
CSG_INLINE Mask greater(Labels a, int b) { return _mm256_cmpgt_epi32_mask((__m256i)a, _mm256_set1_epi32(b)); }
CSG_INLINE VecD choose(Mask m, VecD a, VecD b) { return (VecD)_mm512_mask_blend_pd(m, (__m512d)b, (__m512d)a); }
CSG_INLINE Labels choose(Mask m, Labels a, Labels b) {
  return (Labels)_mm256_mask_blend_epi32(m, (__m256i)b, (__m256i)a);
}
CSG_INLINE bool any(Mask m) { return m != 0; }
CSG_INLINE bool in_lane(Mask m, int lane) { return m >> lane & 1; }
CSG_INLINE VecD gather(const double* p, const int32_t* at) {  // gcc warns of the gather without a mask
  return (VecD)_mm512_mask_i32gather_pd(__m512d{}, 0xff, load_bits<__m256i>(at), p, 8);
}
CSG_INLINE Labels gather_labels(const int32_t* p, const int32_t* at) {
  return (Labels)_mm256_i32gather_epi32(p, load_bits<__m256i>(at), 4);
}
#else
typedef VecI64 Labels;
typedef VecI64 Mask;
CSG_INLINE Labels load_labels(const int32_t* p) { return __builtin_convertvector(load_bits<VecI32Half>(p), Labels); }
CSG_INLINE Mask less(VecD a, VecD b) { return (Mask)(a < b); }
CSG_INLINE Mask equal(Labels a, Labels b) { return (Mask)(a == b); }
CSG_INLINE Mask greater(Labels a, int b) { return (Mask)(a > b); }
CSG_INLINE VecD choose(Mask m, VecD a, VecD b) { return m ? a : b; }
CSG_INLINE Labels choose(Mask m, Labels a, Labels b) { return m ? a : b; }
CSG_INLINE bool any(Mask m) { return first_lane(m) >= 0; }
CSG_INLINE bool in_lane(Mask m, int lane) { return m[lane] != 0; }
CSG_INLINE VecD gather(const double* p, const int32_t* at) {
  VecD v;
  for (int i = 0; i < kDoubles; ++i) v[i] = p[at[i]];
  return v;
}
CSG_INLINE Labels gather_labels(const int32_t* p, const int32_t* at) {
  Labels v;
  for (int i = 0; i < kDoubles; ++i) v[i] = p[at[i]];
  return v;
}
#endif

// Puts a bitonic sequence of T distances in order, the labels with them.
template <int T>
CSG_INLINE void bitonic_sort(VecD* d, Labels* label) {
#pragma GCC unroll 8
  for (int half = T / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < T; ++i) {
      if (i & half) continue;
      const Mask swap = less(d[i + half], d[i]);
      const VecD low = choose(swap, d[i + half], d[i]), high = choose(swap, d[i], d[i + half]);
      const Labels first = choose(swap, label[i + half], label[i]), second = choose(swap, label[i], label[i + half]);
      d[i] = low, d[i + half] = high, label[i] = first, label[i + half] = second;
    }
  }
}

template <bool Closed>
CSG_INLINE void one_sample(const Workspace& w, const SortedFeature& f, int64_t p) {
  const auto emit = [&](int32_t c, PsiSum d) { w.without[c] += d; };
  if (Closed) {
    closed_ball(f, p, emit);
  } else {
    const int64_t generic = open_ball(f, p, emit);
    w.generic[class_of(f.label[p])] += generic;
  }
}

// Counts one for each index.
CSG_INLINE void count_each(int32_t* counts, Labels index) {
  decltype(Labels{}[0] + 0) at[kDoubles];
  store_bits(at, index);
  __asm__("" ::"r"(at) : "memory");  // loads are cheaper than taking the vector apart
  for (const auto lane : at) ++counts[lane];
}

// Events of each class c that move the ball without class c to rank k + e, counted by c and e < Ranks. Where there are
// many classes, the counts of an e stand side by side: nearly all are of e = 1 and stay in the first-level cache then.
template <bool Many, int Ranks>
struct Events {
  int32_t* counts;
  int64_t classes;

  template <typename V>
  CSG_MEMBER V at(V c, V e) const {
    return Many ? c + e * int32_t(classes) : c * Ranks + e;
  }
  CSG_MEMBER int32_t count(int64_t c, int64_t e) const { return counts[Many ? c + e * classes : c * Ranks + e]; }
};

// Samples by what their neighbours say: some distances are equal, or too many neighbours are of one class.
struct Unsettled {
  Mask tied, far;
};

// T neighbours of kDoubles samples, k < T, found by the functions value(offset) and label(offset): where their
// distances differ, the ball without class c reaches to the k-th neighbour of another class, at rank k + e with e
// neighbours of class c before it. K is k, or 0: not known when this is compiled.
template <int K, int T, typename Counted, typename Value, typename Label>
CSG_INLINE Unsettled among_nearest(const Counted& events, int64_t neighbors, const Value& value, const Label& labels) {
  const int64_t k = K ? K : neighbors;
  const VecD x = value(0);
  const Labels own = labels(0);
  VecD d[T];
  Labels label[T];
#pragma GCC unroll 16
  for (int j = 0; j < T; ++j) {  // the T smallest of two ascending sequences, as a bitonic one
    const VecD below = x - value(-1 - j), above = value(T - j) - x;
    const Mask take = less(below, above);
    d[j] = choose(take, below, above);
    label[j] = choose(take, labels(-1 - j), labels(T - j));
  }
  bitonic_sort<T>(d, label);
  Mask differ = less(VecD{}, d[k - 1]) & less(d[T - 1], VecD{} + __builtin_inf());
#pragma GCC unroll 16
  for (int j = 0; j + 1 < T; ++j) differ &= less(d[j], d[j + 1]);
  Mask fast = differ;
  Labels extra[T];
#pragma GCC unroll 16
  for (int i = 0; i < (K ? K : T); ++i) {
    if (!K && i >= k) break;
    const Labels c = label[i];
    Labels e{};
#pragma GCC unroll 16
    for (int j = 0; j + 1 < T; ++j) {
      if (j < k) {
        e = choose(equal(c, label[j]), e + 1, e);
      } else {
        e = choose(equal(c, label[j]) & greater(e, j - int(k)), e + 1, e);
      }
    }
    e = choose(greater(c, -1), e, Labels{});
    e = choose(equal(c, own), Labels{}, e);
#pragma GCC unroll 16
    for (int j = 0; j < i; ++j) e = choose(equal(c, label[j]), Labels{}, e);
    fast &= ~greater(e, T - 1 - int(k));
    extra[i] = e;
  }
#pragma GCC unroll 16
  for (int i = 0; i < (K ? K : T); ++i) {
    if (!K && i >= k) break;
    const Labels c = choose(greater(label[i], 0), label[i], Labels{});
    count_each(events.counts, events.at(c, choose(fast, extra[i], Labels{})));
  }
  return {Mask(~differ), Mask(differ & ~fast)};
}

// Whether one of kDoubles samples is of the class of one of the four that follow it.
CSG_INLINE bool repeats(const int32_t* label) {
  const Labels own = load_labels(label);
  return any(Mask(equal(own, load_labels(label + 1)) | equal(own, load_labels(label + 2)) |
                  equal(own, load_labels(label + 3)) | equal(own, load_labels(label + 4))));
}

// k = 3, and each of kDoubles samples and its four nearest are all of different classes: the ball without the class of
// one of the three nearest reaches to the fourth. Returns the samples with equal distances.
template <bool Closed, typename Counted>
CSG_INLINE Mask among_different(const Counted& events, const double* value, const int32_t* label) {
  const VecD x = load_bits<VecD>(value);
  VecD below[4], above[4], first[4], d[4];
  for (int j = 0; j < 4; ++j)
    below[j] = x - load_bits<VecD>(value - 1 - j), above[j] = load_bits<VecD>(value + 1 + j) - x;
  for (int j = 0; j < 4; ++j) first[j] = smaller(below[j], above[3 - j]);  // the four nearest, as a bitonic sequence
  for (int j = 0; j < 2; ++j) d[j] = smaller(first[j], first[j + 2]), d[j + 2] = larger(first[j], first[j + 2]);
  const VecD third = smaller(d[2], d[3]), fourth = larger(d[2], d[3]);
  Mask fast = less(third, fourth);
  if (Closed) {
    VecD fifth = smaller(x - load_bits<VecD>(value - 5), load_bits<VecD>(value + 5) - x);
    for (int j = 0; j < 4; ++j) fifth = smaller(fifth, larger(below[j], above[3 - j]));
    fast &= less(fourth, fifth) & less(VecD{}, third);  // closed_ball deals with a run at once
  } else {
    fast &= less(larger(d[0], d[1]), third);
  }
  for (int j = 0; j < 3; ++j) {
    const Labels c = choose(less(below[j], above[2 - j]), load_labels(label - 1 - j), load_labels(label + 3 - j));
    count_each(events.counts, choose(Mask(fast & greater(c, -1)), events.at(c, Labels{} + 1), Labels{}));
  }
  return Mask(~fast);
}

template <bool Closed>
CSG_INLINE void samples_of(Mask samples, const Workspace& w, const SortedFeature& f, int64_t p) {
  if (any(samples))
    for (int lane = 0; lane < kDoubles; ++lane)
      if (in_lane(samples, lane)) one_sample<Closed>(w, f, p + lane);
}

// kDoubles samples that stand at `far`, among T neighbours. On its own, because it takes many registers.
template <bool Closed, int K, int T, typename Counted>
CSG_STAGE void among_more(const Workspace& w, const SortedFeature& f, const Counted& events, const int32_t* far) {
  const Unsettled rest = among_nearest<K, T>(
      events, f.k, [&](int j) { return gather(f.value + j, far); },
      [&](int j) { return gather_labels(f.label + j, far); });
  for (int lane = 0; lane < kDoubles; ++lane)
    if (in_lane(Mask(rest.tied | rest.far), lane)) one_sample<Closed>(w, f, far[lane]);
}

// Every sample among T neighbours, and k = 3: among different ones first where there are many classes, among 2 T where
// there are few.
template <bool Closed, int K, int T, bool Many>
CSG_STAGE void among_all(const Workspace& w, const SortedFeature& f, int64_t classes) {
  constexpr bool further = K == 3 && !Many;
  constexpr int ranks = further ? 2 * T : T;
  static_assert(ranks <= kRanks);
  constexpr int ahead = (3 + kDoubles) / kDoubles;  // vectors that hold four neighbours
  const Events<Many, ranks> events{w.counts, classes};
  __builtin_memset(w.counts, 0, size_t(classes * ranks) * sizeof(int32_t));
  unsigned repeated = ~0u;  // bit i: repeats() of the vector i before the last one that was looked at
  int32_t far[2 * kDoubles];
  int far_count = 0, seen = T;  // seen: all e are less than it - k
  const int64_t n = f.n;
  int64_t p = 0;
  for (; p + kDoubles <= n; p += kDoubles) {
    const double* value = f.value + p;
    const int32_t* label = f.label + p;
    if (Many) {
      repeated = repeated << 1 | unsigned(repeats(label + ahead * kDoubles));
      if ((repeated & ((2u << 2 * ahead) - 1)) == 0) {
        samples_of<Closed>(among_different<Closed>(events, value, label), w, f, p);
        continue;
      }
    }
    const Unsettled unsettled = among_nearest<K, T>(
        events, f.k, [&](int j) { return load_bits<VecD>(value + j); }, [&](int j) { return load_labels(label + j); });
    if (!further) {
      samples_of<Closed>(Mask(unsettled.tied | unsettled.far), w, f, p);
      continue;
    }
    samples_of<Closed>(unsettled.tied, w, f, p);
    if (!any(unsettled.far)) continue;
    for (int lane = 0; lane < kDoubles; ++lane)
      if (in_lane(unsettled.far, lane)) far[far_count++] = int32_t(p + lane);
    if (far_count < kDoubles) continue;
    among_more<Closed, K, ranks>(w, f, events, far);
    seen = ranks;
    far_count -= kDoubles;
    for (int i = 0; i < far_count; ++i) far[i] = far[i + kDoubles];
  }
  for (; p < n; ++p) one_sample<Closed>(w, f, p);
  for (int i = 0; i < far_count; ++i) one_sample<Closed>(w, f, far[i]);
  for (int64_t e = 1; e < seen - f.k; ++e)
    for (int64_t c = 0; c < classes; ++c)
      if (const int32_t count = events.count(c, e)) w.without[c] += PsiSum(count) * (f.psi[f.k] - f.psi[f.k + e]);
}

// Three large classes: the other two as one class. Faster than among_all, which leaves a sample to one_sample where
// most of its neighbours are of one class.
template <bool Closed>
static void among_other_two(const Workspace& w, const SortedFeature& f) {
  double* rest = w.members + f.k + 1;
  for (int32_t c = 0; c < 3; ++c) {
    const int64_t size = f.n - f.class_size[c];
    int64_t at = 0;
    for (int64_t i = 0; i < f.n; ++i) {
      rest[at] = f.value[i];
      at += f.label[i] != c;
    }
    for (int64_t i = 0; i <= f.k; ++i) rest[-1 - i] = -__builtin_inf(), rest[size + i] = __builtin_inf();
    w.without[c] = large_class<Closed>(w, f, rest, size);
  }
}
