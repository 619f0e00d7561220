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

#include "mutual_info_own_class.inl"
// after the first pass, whose counting of balls it shares
#include "mutual_info_all_samples.inl"

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
