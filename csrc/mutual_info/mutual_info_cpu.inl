// mutual_info's CPU kernel for one instruction set; see ../common/simd.inl for how this file is compiled.
//
// Per feature: sort by linear buckets (which stay as an index into the sorted values), scatter by class, then two
// vectorised passes: every sample among its own class, and every sample among all samples with what changes when one
// of the classes around it is taken out. Memory that must move: the feature once; the work arrays, some 30 bytes per
// sample, stay in the second-level cache up to 30,000 samples.

// Not inlined: the stages stay apart for profilers, and their loops keep the registers to themselves.
#define CSG_STAGE static __attribute__((noinline, aligned(64)))

constexpr int kDoubles = CSG_WIDTH / 8;
typedef int32_t VecI32Half __attribute__((vector_size(CSG_WIDTH / 2)));

CSG_INLINE VecD larger(VecD a, VecD b) { return a > b ? a : b; }
CSG_INLINE VecD smaller(VecD a, VecD b) { return a < b ? a : b; }

// A product rounded on its own, never part of a fused multiply-add: NumPy's and scikit-learn's bits need that.
template <typename V>
CSG_INLINE V rounded(V product) {
#if CSG_X86
  __asm__("" : "+x"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#endif
  return product;
}

// ---- the feature as scikit-learn prepares it ------------------------------------------------------------------------

// NumPy's pairwise sum of f(x[i]): eight partial sums over at most 128 values, halves of a multiple of eight beyond.
template <typename F>
static double pairwise_sum(const double* x, int64_t n, F f) {
  if (n < 8) {
    double sum = 0;  // NumPy begins with -0.0, which a sum of at least one value cannot tell from 0
    for (int64_t i = 0; i < n; ++i) sum += f(x[i]);
    return sum;
  }
  if (n > 128) {
    const int64_t half = n / 2 - n / 2 % 8;
    return pairwise_sum(x, half, f) + pairwise_sum(x + half, n - half, f);
  }
  constexpr int parts = 8 / kDoubles;
  VecD part[parts];
  for (int j = 0; j < parts; ++j) part[j] = f(load_bits<VecD>(x + j * kDoubles));
  int64_t i = 8;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < parts; ++j) part[j] += f(load_bits<VecD>(x + i + j * kDoubles));
  double r[8];
  __builtin_memcpy(r, part, sizeof(r));
  double sum = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
  for (; i < n; ++i) sum += f(x[i]);
  return sum;
}

CSG_INLINE double magnitude(double v) { return __builtin_fabs(v); }
CSG_INLINE VecD magnitude(VecD v) { return v < 0 ? -v : v; }

// x / std, in place; returns the size of the noise: 1e-10 * max(1, mean |x / std|); NaN if std is not finite.
static double scale_feature(double* x, int64_t n) {
  const double mean = pairwise_sum(x, n, [](auto v) { return v; }) / double(n);
  const double variance = pairwise_sum(x, n,
                                       [mean](auto v) {
                                         const auto d = v - mean;
                                         return rounded(d * d);
                                       }) /
                          double(n);
  double deviation = __builtin_sqrt(variance);
  if (deviation < 10 * 0x1p-52) deviation = 1;
  if (!(deviation < __builtin_inf())) return __builtin_nan("");
  for (int64_t i = 0; i < n; ++i) x[i] /= deviation;
  const double size = pairwise_sum(x, n, [](auto v) { return magnitude(v); }) / double(n);
  return 1e-10 * (size > 1 ? size : 1);
}

// Columns [column, column + count) of the features, as doubles, one after the other.
template <typename X>
CSG_STAGE void load_columns_as(const LabelledFeatures& p, int64_t column, int64_t count, double* to) {
  const X* from = static_cast<const X*>(p.features) + column * p.stride_k;
  if (count == kColumns && p.stride_k == 1) {
    for (int64_t i = 0; i < p.n; ++i)
      for (int64_t j = 0; j < kColumns; ++j) to[j * p.n + i] = widen(from[i * p.stride_n + j]);
    return;
  }
  for (int64_t j = 0; j < count; ++j)
    for (int64_t i = 0; i < p.n; ++i) to[j * p.n + i] = widen(from[i * p.stride_n + j * p.stride_k]);
}
static void load_columns(const LabelledFeatures& p, int64_t column, int64_t count, double* to) {
  switch (p.type) {
    case ScalarType::Float32:
      load_columns_as<float>(p, column, count, to);
      break;
    case ScalarType::Float64:
      load_columns_as<double>(p, column, count, to);
      break;
    case ScalarType::Float16:
      load_columns_as<Half>(p, column, count, to);
      break;
    case ScalarType::BFloat16:
      load_columns_as<BFloat16>(p, column, count, to);
      break;
  }
}

// Whether no magnitude exceeds the limit, and none is NaN.
static bool within(const double* x, int64_t n, double limit) {
  VecI64 outside{};
  int64_t i = 0;
  for (; i + kDoubles <= n; i += kDoubles) outside |= ~(VecI64)(magnitude(load_bits<VecD>(x + i)) <= limit);
  bool any = first_lane(outside) >= 0;
  for (; i < n; ++i) any = any || !(magnitude(x[i]) <= limit);
  return !any;
}

// One column made ready for its balls; false if that leaves no finite numbers.
static bool prepare(const MutualInfo& p, int64_t column, double* x) {
  if (p.ties == Ties::Noise) {
    const double size = scale_feature(x, p.n);
    const double* noise = p.noise + column * p.noise_stride_k;
    for (int64_t i = 0; i < p.n; ++i) x[i] += rounded(size * noise[i * p.noise_stride_n]);
    return size == size;
  }
  if (within(x, p.n, 0x1p1021)) return true;
  for (int64_t i = 0; i < p.n; ++i) x[i] *= 0.25;  // differences of the largest doubles must not overflow
  return within(x, p.n, 0x1p1022);
}

// ---- sorting, and the index that it leaves --------------------------------------------------------------------------

// bucket(v) = clamp((v - low) * scale) is monotone in v: values in order stand in buckets in order.
CSG_INLINE int32_t bucket_of(const Buckets& b, double v) {
  double x = (v - b.low) * b.scale;
  x = x > 0 ? x : 0;
  return int32_t(x < b.last ? x : b.last);
}
CSG_INLINE VecI32Half bucket_of(const Buckets& b, VecD v) {
  VecD x = (v - b.low) * b.scale;
  x = x > VecD{} ? x : VecD{};
  return __builtin_convertvector(x < b.last ? x : VecD{} + b.last, VecI32Half);
}

// Scatters n pairs into buckets; starts[i] becomes base + the number of pairs in buckets before i, i in [0, last + 1].
// starts has last + 3 elements.
CSG_STAGE void scatter(const Buckets& b, const double* from, const int32_t* from_label, int64_t n, int32_t base,
                       double* value, int32_t* label, int32_t* starts, int32_t* bucket) {
  const int64_t count = int64_t(b.last) + 1;
  __builtin_memset(starts, 0, size_t(count + 2) * sizeof(int32_t));
  starts[0] = base;
  int64_t i = 0;
  for (; i + kDoubles <= n; i += kDoubles) {
    store_bits(bucket + i, bucket_of(b, load_bits<VecD>(from + i)));
    for (int j = 0; j < kDoubles; ++j) ++starts[bucket[i + j] + 2];
  }
  for (; i < n; ++i) ++starts[(bucket[i] = bucket_of(b, from[i])) + 2];
  starts[1] = base;
  for (i = 2; i <= count; ++i) starts[i] += starts[i - 1];
  // The cursor of bucket i is starts[i + 1], which ends where bucket i + 1 begins.
  for (i = 0; i < n; ++i) {
    const int32_t at = starts[bucket[i] + 1]++;
    value[at] = from[i];
    label[at] = from_label[i];
  }
}

// Buckets over the bulk of the values: outliers share the first and the last bucket.
CSG_STAGE Buckets make_buckets(const double* x, int64_t n, int64_t count) {
  double sample[kSample];
  for (int i = 0; i < kSample; ++i) {  // evenly spaced, kept in order
    const double v = x[i * (n - 1) / (kSample - 1)];
    int j = i;
    for (; j > 0 && sample[j - 1] > v; --j) sample[j] = sample[j - 1];
    sample[j] = v;
  }
  double low = sample[kSample / 32], high = sample[kSample - 1 - kSample / 32];
  const double margin = 0.3 * (high - low);
  low -= margin, high += margin;
  if (!(low < high)) {
    low = high = x[0];
    for (int64_t i = 1; i < n; ++i) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
  }
  const double scale = double(count) / (high - low);
  const bool usable = scale > 0 && scale < 0x1p1000;  // not for one value, nor for ranges near the limits of doubles
  return {low, usable ? scale : 0, double(usable ? count - 1 : 0), 0};
}

// A crowded bucket gets buckets of its own; x is scratch.
CSG_STAGE void refine(SortWorkspace& w, int32_t begin, int32_t end, double* x, int32_t* starts) {
  const int64_t n = end - begin;
  __builtin_memcpy(x, w.value + begin, size_t(n) * sizeof(double));
  __builtin_memcpy(w.spare_label, w.label + begin, size_t(n) * sizeof(int32_t));
  Buckets& b = w.sub[w.sub_count++];
  b = make_buckets(x, n, n / 2);
  b.starts = starts - w.starts;
  scatter(b, x, w.spare_label, n, begin, w.value, w.label, starts, w.bucket);
  for (int64_t i = 0; i <= int64_t(b.last); ++i)
    if (starts[i + 1] - starts[i] > kCrowded)
      sort_pairs(w.value + starts[i], w.label + starts[i], starts[i + 1] - starts[i]);
}

// v with the two of each pair of lanes exchanged.
template <typename V, size_t... I>
CSG_INLINE V exchange_pairs(V v, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, int(I ^ 1)...);
#else
  return __builtin_shuffle(v, decltype(v < v){int(I ^ 1)...});
#endif
}

// Swaps neighbours in the wrong order, pair by pair from `begin` on: most buckets hold two or three values, and this
// takes no branch that depends on them.
CSG_STAGE void order_pairs(double* value, int32_t* label, int64_t begin, int64_t n) {
  constexpr std::make_index_sequence<kDoubles> lanes;
  VecI64 odd;
  for (int i = 0; i < kDoubles; ++i) odd[i] = -(i & 1);
  for (int64_t i = begin; i + kDoubles <= n; i += kDoubles) {
    const VecD v = load_bits<VecD>(value + i), w = exchange_pairs(v, lanes);
    const VecI32Half l = load_bits<VecI32Half>(label + i), m = exchange_pairs(l, lanes);
    const VecI64 swap = ((VecI64)(v > w) & ~odd) | ((VecI64)(w > v) & odd);
    store_bits(value + i, swap ? w : v);
    store_bits(label + i, __builtin_convertvector(swap, VecI32Half) ? m : l);
  }
}

// Puts values that are in the wrong order inside their buckets in order.
CSG_STAGE void insertion_sort(double* value, int32_t* label, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    const double v = value[i];
    if (v >= value[i - 1]) continue;
    const int32_t l = label[i];
    int64_t j = i;
    do {
      value[j] = value[j - 1], label[j] = label[j - 1];
      --j;
    } while (value[j - 1] > v);
    value[j] = v, label[j] = l;
  }
}

// Puts x with its labels into w.value and w.label bucket by bucket and makes the index. Values are in order then but
// for those of one bucket of at most kCrowded. x is scratch afterwards.
static void fill_buckets(SortWorkspace& w, double* x, const int32_t* labels, int64_t n, int64_t buckets) {
  w.top = make_buckets(x, n, buckets);
  w.sub_count = 0;
  scatter(w.top, x, labels, n, 0, w.value, w.label, w.starts, w.bucket);
  const int64_t count = int64_t(w.top.last) + 1;
  int32_t* free = w.starts + n + 3;
  int32_t begin = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t end = w.starts[i + 1];
    if (end - begin > kCrowded) {
      refine(w, begin, end, x, free);
      w.starts[i] = ~(w.sub_count - 1);
      free += int64_t(w.sub[w.sub_count - 1].last) + 3;
    }
    begin = end;
  }
}

static void sort_feature(SortWorkspace& w, double* x, const int32_t* labels, int64_t n) {
  fill_buckets(w, x, labels, n, n);
  for (int pass = 0; pass < kPasses; ++pass) order_pairs(w.value, w.label, pass % 2, n);
  insertion_sort(w.value, w.label, n);
}

// ---- counting the samples of a ball ---------------------------------------------------------------------------------

// Where the values of v's bucket begin.
CSG_INLINE int64_t bucket_start(const Workspace& w, double v, int32_t bucket) {
  const int32_t at = w.starts[bucket];
  if (at >= 0) return at;
  const Buckets& b = w.sub[~at];
  return w.starts[b.starts + bucket_of(b, v)];
}

// Bit i: whether the i-th of eight values from `value` on lies inside the ball of radius r around x, which they are on
// one side of.
template <bool Closed, bool Above>
CSG_INLINE unsigned inside_bits(const double* value, double x, double r) {
  unsigned bits = 0;
  for (int i = 0; i < 8; i += kDoubles) {
    const VecD v = load_bits<VecD>(value + i), d = Above ? v - x : x - v;
#if CSG_LEVEL == 2
    bits |= _mm512_cmp_pd_mask((__m512d)d, _mm512_set1_pd(r), Closed ? _CMP_LE_OQ : _CMP_LT_OQ);
#elif CSG_LEVEL == 1
    bits |= unsigned(_mm256_movemask_pd((__m256d)(Closed ? d <= r : d < r))) << i;
#else
    for (int j = 0; j < kDoubles; ++j) bits |= unsigned(Closed ? d[j] <= r : d[j] < r) << (i + j);
#endif
  }
  return bits;
}

// First index whose value is inside the ball, and one past the last one; `at` is where the bucket of the ball's edge
// begins. The edge is rounded: should the value before the bucket be on the wrong side, or seven not reach, search.
template <bool Closed>
CSG_INLINE int64_t ball_begin(const Workspace& w, int64_t n, double x, double r, int64_t at) {
  const int first = __builtin_ctz(inside_bits<Closed, false>(w.value + at - 1, x, r) | 256u);
  if (unsigned(first - 1) < 7) [[likely]]
    return at - 1 + first;
  return first_inside(w.value, n, x, r, Closed, at);
}
template <bool Closed>
CSG_INLINE int64_t ball_end(const Workspace& w, int64_t n, double x, double r, int64_t at) {
  const int end = __builtin_ctz(~inside_bits<Closed, true>(w.value + at - 1, x, r));
  if (unsigned(end - 1) < 7) [[likely]]
    return at - 1 + end;
  return end_inside(w.value, n, x, r, Closed, at);
}

// Samples in the ball, x itself among them.
template <bool Closed>
CSG_INLINE int64_t ball_size(const Workspace& w, int64_t n, double x, double r) {
  const double low = x - r, high = x + r;
  return ball_end<Closed>(w, n, x, r, bucket_start(w, high, bucket_of(w.top, high))) -
         ball_begin<Closed>(w, n, x, r, bucket_start(w, low, bucket_of(w.top, low)));
}

// ---- samples among their own class ----------------------------------------------------------------------------------

// The k-th smallest of the distances from v[i] to the others. Open balls: as scikit-learn's brute force has it, which
// takes groups of at most 2 k + 1 samples: x^2 - 2 x y + y^2 with its cancellation.
template <bool Closed>
CSG_INLINE double kth_distance(const double* v, int64_t n, int64_t i, int64_t k, double* nearest) {
  int64_t found = 0;
  for (int64_t j = 0; j < n; ++j) {
    if (j == i) continue;
    double d;
    if (Closed) {
      d = magnitude(v[i] - v[j]);
    } else {
      const double a = rounded(v[i] * v[i]), b = rounded(v[i] * v[j]), c = rounded(v[j] * v[j]);
      d = (a - 2 * b) + c;
      d = d > 0 ? d : 0;
    }
    if (found == k && d >= nearest[k - 1]) continue;
    int64_t at = found < k ? found++ : k - 1;
    for (; at > 0 && nearest[at - 1] > d; --at) nearest[at] = nearest[at - 1];
    nearest[at] = d;
  }
  return Closed ? nearest[k - 1] : __builtin_sqrt(nearest[k - 1]);
}

// Sum of psi(k_i) - psi(m_i) over a group of 2 <= n <= 2 k + 1 samples, value by value.
template <bool Closed>
CSG_STAGE PsiSum small_group(const Workspace& w, const SortedFeature& f, const double* v, int64_t n) {
  const int64_t k = min64(f.k, n - 1);
  PsiSum sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double r = kth_distance<Closed>(v, n, i, k, w.nearest);
    int64_t m = ball_size<Closed>(w, f.n, v[i], r);
    int64_t own = k;
    if (Closed) {
      own = -1;
      for (int64_t j = 0; j < n; ++j) own += magnitude(v[i] - v[j]) <= r;
      --m;
    } else if (r == 0) {
      m = ball_size<true>(w, f.n, v[i], 0);
    }
    sum += f.psi[own] - f.psi[m];
  }
  return sum;
}

// psi(k_i) - psi(m_i) of sample t of a class where values or distances are equal.
template <bool Closed>
static int64_t tied_sample(const Workspace& w, const SortedFeature& f, const double* v, int64_t n, int64_t t,
                           double r) {
  if (!Closed) return f.psi[f.k] - f.psi[ball_size<true>(w, f.n, v[t], 0)];
  const int64_t own = end_inside(v, n, v[t], r, true, t) - first_inside(v, n, v[t], r, true, t);
  return f.psi[own - 1] - f.psi[ball_size<true>(w, f.n, v[t], r) - 1];
}

static_assert(kDoubles <= kMostLanes);

// Samples with the radii of their balls, class after class. What is known of a class's sum of psi(k_i) - psi(m_i) is
// in total; psi(m_i) of the samples that wait here is still to be taken off.
struct Balls {
  PsiSum* total;
  double x[kBatch + kDoubles], radius[kBatch + kDoubles];
  int count = 0;
  int begin[kBatch + kDoubles + 1], parts = 0;  // where each class begins
  int64_t owner[kBatch + kDoubles];             // its place in total

  // NOLINTNEXTLINE(cppcoreguidelines-pro-type-member-init): beyond count and parts nothing is used
  explicit Balls(PsiSum* of_classes) : total(of_classes) {}
};

CSG_INLINE void begin_class(Balls& b, int64_t owner, PsiSum total) {
  b.total[owner] = total;
  if (b.parts > 0 && b.begin[b.parts - 1] == b.count) --b.parts;
  b.begin[b.parts] = b.count;
  b.owner[b.parts++] = owner;
}

// Counts the first kBatch balls, or all: their memory accesses travel together.
template <bool Closed>
CSG_STAGE void count_balls(const Workspace& w, const SortedFeature& f, Balls& b) {
  double edge[2][kBatch];
  int32_t bucket[2][kBatch];
  int64_t at[2][kBatch], psi[kBatch + 1];  // psi: sums over the balls before
  const int count = b.count < kBatch ? b.count : kBatch;
  for (int i = 0; i < count; i += kDoubles) {
    const VecD x = load_bits<VecD>(b.x + i), r = load_bits<VecD>(b.radius + i), low = x - r, high = x + r;
    store_bits(edge[0] + i, low);
    store_bits(edge[1] + i, high);
    store_bits(bucket[0] + i, bucket_of(w.top, low));
    store_bits(bucket[1] + i, bucket_of(w.top, high));
  }
  for (int side = 0; side < 2; ++side)
    for (int i = 0; i < count; ++i) {
      at[side][i] = bucket_start(w, edge[side][i], bucket[side][i]);
      __builtin_prefetch(w.value + at[side][i] - 1);
    }
  int64_t sum = psi[0] = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t m = ball_end<Closed>(w, f.n, b.x[i], b.radius[i], at[1][i]) -
                      ball_begin<Closed>(w, f.n, b.x[i], b.radius[i], at[0][i]);
    psi[i + 1] = sum += f.psi[Closed ? m - 1 : m];
  }
  b.begin[b.parts] = count;
  for (int i = 0; i < b.parts; ++i) {
    const int end = b.begin[i + 1] < count ? b.begin[i + 1] : count;
    b.total[b.owner[i]] -= psi[end] - psi[b.begin[i]];
  }
  // What is left is of the last class.
  b.begin[0] = 0, b.owner[0] = b.owner[b.parts - 1], b.parts = 1;
  b.count -= count;
  store_bits(b.x, load_bits<VecD>(b.x + kBatch));
  store_bits(b.radius, load_bits<VecD>(b.radius + kBatch));
}

// Adds the first `count` lanes; those that are slow give their psi(k) - psi(m) to tied().
template <bool Closed, typename Slow, typename Tied>
CSG_INLINE void add_balls(const Workspace& w, const SortedFeature& f, Balls& b, VecD x, VecD r, int count, Slow slow,
                          Tied&& tied) {
  store_bits(b.x + b.count, x);
  store_bits(b.radius + b.count, r);
  if (first_lane((VecI64)slow) < 0) {
    b.count += count;
  } else {
    const double *xs = b.x + b.count, *radii = b.radius + b.count;
    for (int i = 0; i < count; ++i) {
      const double value = xs[i], radius = radii[i];
      if (slow[i]) {
        tied(i, value, radius);
      } else {
        b.x[b.count] = value, b.radius[b.count] = radius;
        ++b.count;
      }
    }
  }
  if (b.count >= kBatch) count_balls<Closed>(w, f, b);
}

// A class of more than k samples. K is k, or 0: not known when this is compiled.
template <bool Closed, int K>
CSG_INLINE void add_large(const Workspace& w, const SortedFeature& f, const double* v, int64_t n, int64_t owner,
                          Balls& b) {
  const int64_t k = K ? K : f.k;
  double tied_x = 0, tied_r = -1;  // duplicates share their result
  int64_t tied = 0;
  begin_class(b, owner, PsiSum(n) * f.psi[k]);
  for (int64_t t = 0; t < n; t += kDoubles) {
    const double* here = v + t;
    const VecD x = load_bits<VecD>(here);
    // The narrowest of the windows of as many neighbours.
    const auto reach = [&](int64_t neighbors) {
      VecD r = larger(x - load_bits<VecD>(here - neighbors), load_bits<VecD>(here) - x);
#pragma GCC unroll 8
      for (int64_t a = 1; a <= neighbors; ++a)
        r = smaller(r, larger(x - load_bits<VecD>(here - neighbors + a), load_bits<VecD>(here + a) - x));
      return r;
    };
    const VecD r = reach(k);
    auto slow = r == VecD{};
    if (Closed) slow |= reach(k + 1) <= r;
    add_balls<Closed>(w, f, b, x, r, int(min64(kDoubles, n - t)), slow, [&](int i, double value, double radius) {
      if (tied_x != value || tied_r != radius) {
        tied_x = value, tied_r = radius;
        tied = tied_sample<Closed>(w, f, v, n, t + i, radius) - f.psi[k];
      }
      b.total[owner] += tied;
    });
  }
}

// The radii of kDoubles samples from t on in a group of n: the k-th smallest distances to the others. Open balls: as
// scikit-learn's brute force has it, which takes groups of at most 2 k + 1 samples: x^2 - 2 x y + y^2 with its
// cancellation.
template <bool Closed>
CSG_INLINE VecD radii(const Workspace& w, const double* v, int64_t n, int64_t t, int64_t k) {
  const VecD inf = VecD{} + __builtin_inf(), x = load_bits<VecD>(v + t), square = rounded(x * x);
  for (int64_t a = 0; a < k; ++a) store_bits(w.nearest + a * kDoubles, inf);
  VecI64 itself;
  for (int i = 0; i < kDoubles; ++i) itself[i] = t + i;
  for (int64_t j = 0; j < n; ++j) {
    const double y = v[j];
    VecD d;
    if (Closed) {
      d = magnitude(x - y);
    } else {
      d = (square - 2 * rounded(x * y)) + rounded(y * y);
      d = d > 0 ? d : VecD{};
    }
    d = itself == j ? inf : d;
    for (int64_t a = 0; a < k; ++a) {
      const VecD nearest = load_bits<VecD>(w.nearest + a * kDoubles);
      store_bits(w.nearest + a * kDoubles, smaller(nearest, d));
      d = larger(nearest, d);
    }
  }
  VecD r = load_bits<VecD>(w.nearest + (k - 1) * kDoubles);
  if (!Closed) {
#if CSG_LEVEL == 2
    r = (VecD)_mm512_sqrt_pd((__m512d)r);
#else
    for (int i = 0; i < kDoubles; ++i) r[i] = __builtin_sqrt(r[i]);
#endif
  }
  return r;
}

// A class of at most 2 k + 1 samples; closed balls: at most k, all of them in the ball of each.
template <bool Closed>
CSG_INLINE void add_small(const Workspace& w, const SortedFeature& f, const double* v, int64_t n, int64_t owner,
                          Balls& b) {
  const int64_t k = min64(f.k, n - 1);
  begin_class(b, owner, PsiSum(n) * f.psi[k]);
  for (int64_t t = 0; t < n; t += kDoubles) {
    const VecD x = load_bits<VecD>(v + t), r = radii<Closed>(w, v, n, t, k);
    const auto slow = Closed ? r != r : r == VecD{};
    add_balls<Closed>(w, f, b, x, r, int(min64(kDoubles, n - t)), slow,
                      [&](int, double value, double) { b.total[owner] -= f.psi[ball_size<true>(w, f.n, value, 0)]; });
  }
}

// The sum of psi(k_i) - psi(m_i) over a class of more than k samples.
template <bool Closed>
static PsiSum large_class(const Workspace& w, const SortedFeature& f, const double* v, int64_t n) {
  PsiSum total = 0;
  Balls b(&total);
  if (f.k == 3) {
    add_large<Closed, 3>(w, f, v, n, 0, b);
  } else {
    add_large<Closed, 0>(w, f, v, n, 0, b);
  }
  count_balls<Closed>(w, f, b);
  return total;
}

// w.own: the sums of psi(k_i) - psi(m_i) over each class. Classes smaller than `large` are small groups.
template <bool Closed, int K>
CSG_STAGE void own_classes(const Workspace& w, const SortedFeature& f, int64_t classes, int64_t large) {
  Balls b(w.own);
  begin_class(b, 0, 0);
  for (int64_t c = 0; c < classes; ++c) {
    const int64_t size = f.class_size[c];
    const double* v = f.values_of(int32_t(c));
    if (size >= large) {
      add_large<Closed, K>(w, f, v, size, c, b);
    } else if (size > 1) {
      add_small<Closed>(w, f, v, size, c, b);
    } else {
      w.own[c] = 0;
    }
  }
  count_balls<Closed>(w, f, b);
}

// The class that holds all samples but one, in its own target, which leaves that one out. Open balls.
static PsiSum all_but_one(const SortedFeature& f, const double* v, int64_t n) {
  PsiSum sum = 0;
  for (int64_t t = 0; t < n; ++t) {
    const int64_t l = window_begin(v, t, f.k);
    const double below = v[t] - v[l], above = v[l + f.k] - v[t], r = below > above ? below : above;
    const bool closed = r == 0;
    const int64_t m = end_inside(v, n, v[t], r, closed, t) - first_inside(v, n, v[t], r, closed, t);
    sum += f.psi[f.k] - f.psi[m];
  }
  return sum;
}

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

// ---- one feature ----------------------------------------------------------------------------------------------------

// Few samples: every target in turn, every sample against every other. group[i] < 0: left out.
template <bool Closed>
static double direct(const MutualInfo& p, const Workspace& w, const double* x, int64_t groups) {
  int64_t total = 0;
  PsiSum sum = 0;
  for (int64_t g = 0; g < groups; ++g) {
    int64_t size = 0;
    for (int64_t i = 0; i < p.n; ++i) size += w.group[i] == g;
    if (size == 1)
      for (int64_t i = 0; i < p.n; ++i) w.group[i] = w.group[i] == g ? -1 : w.group[i];
    if (size > 1) total += size, sum -= PsiSum(size) * p.psi[size];
  }
  if (total == 0) return 0;
  for (int64_t i = 0; i < p.n; ++i) {
    if (w.group[i] < 0) continue;
    int64_t size = 0, at = 0;
    for (int64_t j = 0; j < p.n; ++j) {
      if (w.group[j] != w.group[i]) continue;
      if (j == i) at = size;
      w.members[size++] = x[j];
    }
    const int64_t k = min64(p.neighbors, size - 1);
    double r;
    if (Closed || k >= size / 2) {
      r = kth_distance<Closed>(w.members, size, at, k, w.nearest);
    } else {
      r = kth_distance<true>(w.members, size, at, k, w.nearest);
    }
    const bool closed = Closed || r == 0;
    int64_t m = 0, own = k;
    for (int64_t j = 0; j < p.n; ++j) {
      const double d = magnitude(x[i] - x[j]);
      m += w.group[j] >= 0 && (closed ? d <= r : d < r);
    }
    if (Closed) {
      own = -1;
      for (int64_t j = 0; j < size; ++j) own += magnitude(x[i] - w.members[j]) <= r;
      --m;
    }
    sum += p.psi[own] - p.psi[m];
  }
  return mean_of(sum + PsiSum(total) * p.psi[total], total, p.psi_bits);
}

template <bool Closed>
static void few_samples(const MutualInfo& p, const Workspace& w, const double* x, double* out) {
  if (p.multiclass) {
    for (int64_t i = 0; i < p.n; ++i) w.group[i] = int32_t(p.labels[i]);
    out[0] = direct<Closed>(p, w, x, p.classes);
    return;
  }
  for (int64_t c = 0; c < p.classes; ++c) {
    for (int64_t i = 0; i < p.n; ++i) w.group[i] = p.labels[i] == c;
    out[c] = direct<Closed>(p, w, x, 2);
  }
}

template <bool Closed>
static void one_feature(const MutualInfo& p, Workspace& w, double* x, double* out) {
  const Classes& classes = *w.classes;
  const int64_t n = classes.n, count = p.classes;
  sort_feature(w, x, classes.label, n);
  // By class: ascending, because the samples come in order.
  __builtin_memcpy(w.cursor, classes.begin, size_t(count) * sizeof(int64_t));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = w.cursor[class_of(w.label[i])]++;
    w.class_value[at] = w.value[i];
    if (Closed) w.bucket[i] = int32_t(at);
  }
  classes.set_sentinels(w.class_value);

  const SortedFeature f{w.value,      w.label, w.bucket, w.class_value, classes.begin,
                        classes.size, p.psi,   n,        p.neighbors,   classes.dominant};
  if (f.k == 3) {
    own_classes<Closed, 3>(w, f, count, classes.large);
  } else {
    own_classes<Closed, 0>(w, f, count, classes.large);
  }
  PsiSum all = 0;
  for (int64_t c = 0; c < count; ++c) all += w.own[c];
  if (count == 2 && min64(classes.size[0], classes.size[1]) > 1) {  // one class is the other's rest
    out[0] = mean_of(classes.constant[0] + all, n, p.psi_bits);
    if (!p.multiclass) out[1] = out[0];
    return;
  }
  if (p.multiclass) {
    out[0] = mean_of(classes.weighted + all, n, p.psi_bits);
    return;
  }

  __builtin_memset(w.without, 0, size_t(count) * sizeof(PsiSum));
  __builtin_memset(w.generic, 0, size_t(count) * sizeof(PsiSum));
  if (classes.three) {
    among_other_two<Closed>(w, f);
  } else if (f.k == 3 && count >= kMany) {
    among_all<Closed, 3, 8, true>(w, f, count);
  } else if (f.k == 3) {
    among_all<Closed, 3, 8, false>(w, f, count);
  } else if (f.k <= 7) {
    among_all<Closed, 0, 16, false>(w, f, count);
  } else {
    for (int64_t i = 0; i < n; ++i) one_sample<Closed>(w, f, i);
  }
  PsiSum generic = 0;
  for (int64_t c = 0; c < count; ++c) generic += w.generic[c];
  for (int64_t c = 0; c < count; ++c) {
    const int64_t size = classes.size[c], others = n - size;
    PsiSum sum = 0;  // N MI of the samples that take part
    int64_t taking_part = n;
    if (size == 0 || others == 0) {
      sum = generic;
    } else if (size == 1) {
      if (!Closed) sum = generic - w.generic[c] + w.without[c];
      taking_part = n - 1;
    } else if (others == 1) {
      if (!Closed) sum = all_but_one(f, w.class_value + classes.begin[c], size);
      taking_part = size;
    } else {
      PsiSum rest = generic - w.generic[c] + w.without[c];
      if (c == classes.dominant) {
        int64_t found = 0;
        for (int64_t b = 0; b < count; ++b)
          for (int64_t i = 0; b != c && i < classes.size[b]; ++i)
            w.members[found++] = w.class_value[classes.begin[b] + i];
        rest = small_group<Closed>(w, f, w.members, found);
      }
      sum = classes.constant[c] + w.own[c] + rest;
    }
    out[c] = mean_of(sum, taking_part, p.psi_bits);
  }
}

// Features [begin, end) in blocks of kColumns.
template <bool Closed>
static void features(const MutualInfo& p, Workspace& w, int64_t begin, int64_t end) {
  const Classes& classes = *w.classes;
  const int64_t width = p.multiclass ? 1 : p.classes;
  for (int64_t column = begin; column < end; column += kColumns) {
    const int64_t count = min64(kColumns, end - column);
    load_columns(p, column, count, w.columns);
    for (int64_t j = 0; j < count; ++j) {
      double* x = w.columns + j * p.n;
      double* out = p.out + (column + j) * width;
      if (!prepare(p, column + j, x)) {
        for (int64_t c = 0; c < width; ++c) out[c] = __builtin_nan("");
        continue;
      }
      if (classes.few) {
        few_samples<Closed>(p, w, x, out);
        continue;
      }
      if (classes.kept)  // the multi-class value leaves classes of one sample out
        for (int64_t i = 0; i < classes.n; ++i) x[i] = x[classes.kept[i]];
      w.class_value = x + p.n - std::max(classes.padded, p.n);
      one_feature<Closed>(p, w, x, out);
    }
  }
}

// ---- equal-frequency bins -------------------------------------------------------------------------------------------

// Puts the bucket that holds position i in order, for a feature whose buckets are filled; returns where it ends.
static int64_t order_bucket(const SortWorkspace& w, int64_t i) {
  const double v = w.value[i];
  const int32_t top = bucket_of(w.top, v);
  const auto first = [&](int32_t bucket) {
    const int32_t at = w.starts[bucket];
    return at >= 0 ? at : w.starts[w.sub[~at].starts];
  };
  int32_t begin = w.starts[top], end = first(top + 1);
  if (begin < 0) {
    const Buckets& b = w.sub[~begin];
    const int32_t* starts = w.starts + b.starts + bucket_of(b, v);
    begin = starts[0], end = starts[1];
  }
  if (end - begin <= kCrowded) insertion_sort(w.value + begin, w.label + begin, end - begin);
  return end;
}

// Adds what a bin, the samples with these labels, adds to N MI of every class.
static void count_bin(const BinnedWorkspace& w, const int32_t* label, int64_t size, int64_t classes, double* sum) {
  const double* rest = w.terms + size;
  const auto add = [&](int32_t c) {
    const int64_t of_class = w.counts[c];
    w.counts[c] = 0;
    sum[c] += w.terms[of_class] + (rest[-of_class] - rest[0]);  // 0 if there is none
  };
  for (int64_t i = 0; i < size; ++i) ++w.counts[label[i]];
  if (classes <= size) {
    for (int32_t c = 0; c < classes; ++c) add(c);
  } else {
    for (int64_t i = 0; i < size; ++i) add(label[i]);
  }
}

static void binned_feature(const BinnedMutualInfo& p, BinnedWorkspace& w, double* x, double* out) {
  fill_buckets(w, x, w.labels, p.n, max64(p.n / kShared, 1));
  for (int64_t c = 0; c < p.classes; ++c) out[c] = 0;
  int64_t begin = 0;
  for (int64_t b = 1; b <= p.bins; ++b) {
    int64_t end = (b * p.n + p.bins - 1) / p.bins;
    if (end <= begin) continue;  // equal values fill this bin's ranks
    if (end < p.n) {
      const int64_t last = order_bucket(w, end - 1);
      while (end < last && w.value[end] == w.value[end - 1]) ++end;
    }
    if (end - begin == p.n) return;  // one bin tells nothing: exactly 0
    count_bin(w, w.label + begin, end - begin, p.classes, out);
    begin = end;
  }
  for (int64_t c = 0; c < p.classes; ++c) {
    const double sum = out[c] + w.constants[c];  // last: smaller sums round less
    out[c] = sum > 0 ? sum / double(p.n) : 0;
  }
}

void binned_mutual_info_features(const BinnedMutualInfo& p, BinnedWorkspace& w, int64_t begin, int64_t end) {
  for (int64_t column = begin; column < end; column += kColumns) {
    const int64_t count = min64(kColumns, end - column);
    load_columns(p, column, count, w.columns);
    for (int64_t j = 0; j < count; ++j) {
      double* x = w.columns + j * p.n;
      double* out = p.out + (column + j) * p.classes;
      if (within(x, p.n, __DBL_MAX__)) {
        binned_feature(p, w, x, out);
      } else {
        for (int64_t c = 0; c < p.classes; ++c) out[c] = __builtin_nan("");
      }
    }
  }
}

void mutual_info_features(const MutualInfo& p, Workspace& w, int64_t begin, int64_t end) {
  if (p.ties == Ties::Exact) return features<true>(p, w, begin, end);
  features<false>(p, w, begin, end);
}
