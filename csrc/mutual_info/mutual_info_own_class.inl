// mutual_info's CPU kernel, first pass: every sample among its own class. Part of mutual_info_cpu.inl.

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
