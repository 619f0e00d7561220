// The arithmetic of one sample of one sorted feature, compiled for the CPU and for CUDA: what the fast paths leave to
// it (ties, duplicates, classes that come close together) and what defines their results.
//
// All comparisons are on the rounded difference of two values, as scikit-learn's are (never on x - r or x + r).
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define CSG_HOST_DEVICE __host__ __device__ inline
#else
#define CSG_HOST_DEVICE inline
#endif

namespace csg {

// A sum of psi in fixed point: exact, so the same in any order. A term, and a sum of 32 of them, fits into 64 bits.
using PsiSum = __int128;

// sum / (n 2^bits), at least 0. Rounded here and nowhere before: sum, and quotient.
CSG_HOST_DEVICE double mean_of(PsiSum sum, int64_t n, int bits) {
  if (sum <= 0) return 0;
  const double high = static_cast<double>(static_cast<int64_t>(sum >> 64)) * 0x1p64;  // exact: also if it is fused
  return (high + static_cast<double>(static_cast<uint64_t>(sum))) /
         (static_cast<double>(n) * static_cast<double>(int64_t(1) << bits));
}

// n psi(n) - s psi(s) - (n - s) psi(n - s): what the sizes of a class and of its rest add to N MI.
CSG_HOST_DEVICE PsiSum of_sizes(const int64_t* psi, int64_t n, int64_t s) {
  return PsiSum(n) * psi[n] - PsiSum(s) * psi[s] - PsiSum(n - s) * psi[n - s];
}

// One feature of N samples, sorted, beside the same values in class order. The functions below take any type with its
// fields value, label, class_size, psi, n, k, dominant and with its member functions.
struct SortedFeature {
  const double* value;         // [N] ascending, with -inf before and +inf behind it
  const int32_t* label;        // [N] class of each, or ~class for a class that takes no corrections in the fast path
  const int32_t* slot;         // [N] where each stands in class_value; needed by closed balls only
  const double* class_value;   // every class's values ascending, with -inf before and +inf behind each class
  const int64_t* class_begin;  // [classes] where a class begins in class_value
  const int64_t* class_size;   // [classes]
  const int64_t* psi;          // [N + 1] as in MutualInfo
  int64_t n, k;                // samples, neighbours; N >= 4 k + 8
  int64_t dominant;            // the class that leaves at most 2 k + 1 samples to the rest, or -1

  // The values of one class, and where sample i of that class stands among them.
  const double* values_of(int32_t c) const { return class_value + class_begin[c]; }
  int64_t rank(int64_t i, int32_t c) const { return slot[i] - class_begin[c]; }
  // The nearest sample at or before (at or after) i with another label; -1 (n) if there is none.
  int64_t skip_left(int64_t i, int32_t left_out) const {
    while (i >= 0 && label[i] == left_out) --i;
    return i;
  }
  int64_t skip_right(int64_t i, int32_t left_out) const {
    while (i < n && label[i] == left_out) ++i;
    return i;
  }
};

CSG_HOST_DEVICE int32_t class_of(int32_t label) { return label ^ (label >> 31); }

// First index in [0, n) of an ascending array from which on every value lies at most r (closed) or less than r (open)
// below x; `from` is a guess from which the search gallops. n if there is none.
template <typename Values, typename I>
CSG_HOST_DEVICE I first_inside(const Values& value, I n, double x, double r, bool closed,
                               std::type_identity_t<I> from) {
  const auto inside = [&](I i) { return closed ? x - value[i] <= r : x - value[i] < r; };
  I low, high;  // value[low] is outside (or low == -1), value[high] inside (or high == n)
  I step = 1;
  if (from < n && (from < 0 || !inside(from))) {
    low = from < 0 ? -1 : from, high = low + 1;
    while (high < n && !inside(high)) low = high, high += step, step *= 2;
    if (high > n) high = n;
  } else {
    high = from < n ? from : n, low = high - 1;
    while (low >= 0 && inside(low)) high = low, low -= step, step *= 2;
    if (low < -1) low = -1;
  }
  while (high - low > 1) {
    const I middle = low + (high - low) / 2;
    (inside(middle) ? high : low) = middle;
  }
  return high;
}

// One past the last index whose value lies at most r (closed) or less than r (open) above x.
template <typename Values, typename I>
CSG_HOST_DEVICE I end_inside(const Values& value, I n, double x, double r, bool closed, std::type_identity_t<I> from) {
  const auto inside = [&](I i) { return closed ? value[i] - x <= r : value[i] - x < r; };
  I low, high;  // value[low] is inside (or low == -1), value[high] outside (or high == n)
  I step = 1;
  if (from < n && (from < 0 || inside(from))) {
    low = from < 0 ? -1 : from, high = low + 1;
    while (high < n && inside(high)) low = high, high += step, step *= 2;
    if (high > n) high = n;
  } else {
    high = from < n ? from : n, low = high - 1;
    while (low >= 0 && !inside(low)) high = low, low -= step, step *= 2;
    if (low < -1) low = -1;
  }
  while (high - low > 1) {
    const I middle = low + (high - low) / 2;
    (inside(middle) ? low : high) = middle;
  }
  return high;
}

// Begin of the k + 1 consecutive values (p among them) that hold p's k nearest neighbours.
template <typename Values, typename I>
CSG_HOST_DEVICE I window_begin(const Values& value, I p, I k) {
  const double x = value[p];
  I l = p > k ? p - k : 0;
  while (l < p && value[l + k + 1] - x < x - value[l]) ++l;
  return l;
}

// The samples nearest to p outside a window, those of one class left out.
template <typename Feature>
struct Outward {
  const Feature& f;
  double x;
  int32_t left_out;
  int64_t left, right;  // the next candidates

  CSG_HOST_DEVICE double next() {
    left = f.skip_left(left, left_out);
    right = f.skip_right(right, left_out);
    const double below = x - f.value[left], above = f.value[right] - x;  // inf at the ends
    if (below < above) return --left, below;
    return ++right, above;
  }
};

// Open balls, k_i = k. Returns psi(k) - psi(m_p) of sample p among all samples; emit(c, d) for every class c that
// stands near p: without class c's samples among p's neighbours that value grows by d.
template <typename Feature, typename Emit>
CSG_HOST_DEVICE int64_t open_ball(const Feature& f, int64_t p, Emit&& emit) {
  const auto& s = f.value;
  const int64_t n = f.n, k = f.k, l = window_begin(s, p, k);
  const double x = s[p], below = x - s[l], above = s[l + k] - x, reach = below > above ? below : above;
  const int32_t own = f.label[p];
  int64_t run = 0, m = 0;  // samples equal to p; samples in its ball
  if (reach == 0) {
    run = m = end_inside(s, n, x, 0, true, l + k) - first_inside(s, n, x, 0, true, l);
  } else {
    for (int64_t i = l; i <= l + k; ++i) m += (i < p ? x - s[i] : s[i] - x) < reach;
  }
  const int64_t generic = f.psi[k] - f.psi[m];
  const bool long_run = reach == 0 && run >= k + 2;
  // A class of one sample is left out of the sample's own target: its duplicates each count one sample less.
  if (long_run && f.class_size[class_of(own)] == 1) emit(class_of(own), (run - 1) * (f.psi[run] - f.psi[run - 1]));
  for (int64_t i = l; i <= l + k; ++i) {
    const int32_t label = f.label[i], c = class_of(label);
    if (label == own || c == f.dominant) continue;
    int64_t repeat = 0;
    bool seen = false;
    for (int64_t j = l; j <= l + k; ++j) {
      if (f.label[j] != label) continue;
      seen = seen || j < i;
      ++repeat;
    }
    const bool single = f.class_size[c] == 1;
    if (seen || (single && long_run)) continue;
    Outward<Feature> outward{f, x, label, l - 1, l + k + 1};
    double r = 0;
    for (; repeat > 0; --repeat) r = outward.next();
    int64_t inside = run;
    if (r > 0) inside = end_inside(s, n, x, r, false, outward.right) - first_inside(s, n, x, r, false, outward.left);
    if (single) inside -= r == 0 || (i < p ? x - s[i] : s[i] - x) < r;
    emit(c, f.psi[k] - f.psi[inside] - generic);
  }
  return generic;
}

// Samples of the class at or after `rank` (the first of them inside) that lie in the closed ball.
template <typename Feature>
CSG_HOST_DEVICE int64_t class_inside(const Feature& f, int32_t c, int64_t rank, double x, double r) {
  const int64_t size = f.class_size[c];
  return end_inside(f.values_of(c), size, x, r, true, rank) - rank;
}

// psi(k') - psi(m') of a sample at x for the target class c, which has q samples in the closed ball [begin, end) of
// the sample's k nearest neighbours; `rank` is that of one of them, or near.
template <typename Feature>
CSG_HOST_DEVICE int64_t without_class(const Feature& f, double x, int64_t begin, int64_t end, int32_t label, int64_t q,
                                      int64_t rank) {
  const int64_t n = f.n, all = end - begin - 1;
  int64_t rest = all - q;
  if (rest >= f.k) return f.psi[rest] - f.psi[all];
  Outward<Feature> outward{f, x, label, begin - 1, end};
  double r = 0;
  for (; rest < f.k; ++rest) r = outward.next();
  const int64_t first = first_inside(f.value, n, x, r, true, outward.left);
  const int64_t m = end_inside(f.value, n, x, r, true, outward.right) - first - 1;
  const int32_t c = class_of(label);
  const auto& v = f.values_of(c);
  const int64_t size = f.class_size[c];
  const int64_t among = end_inside(v, size, x, r, true, rank) - first_inside(v, size, x, r, true, rank);
  return f.psi[m - among] - f.psi[m];
}

// The closed ball of a sample's k nearest neighbours: the samples [begin, end). A run: all of them are equal.
struct ClosedBall {
  double x, reach;
  int64_t begin, end;
};

template <typename Feature>
CSG_HOST_DEVICE ClosedBall closed_ball_of(const Feature& f, int64_t p) {
  const int64_t n = f.n, k = f.k, l = window_begin(f.value, p, k);
  const double x = f.value[p], below = x - f.value[l], above = f.value[l + k] - x,
               reach = below > above ? below : above;
  return {x, reach, first_inside(f.value, n, x, reach, true, l), end_inside(f.value, n, x, reach, true, l + k)};
}

// Sample i of the ball of a sample with the label `own`, or of a run: what its class changes, if it is the first of it.
template <typename Feature, typename Emit>
CSG_HOST_DEVICE void member_of_ball(const Feature& f, const ClosedBall& ball, int64_t i, int32_t own, Emit&& emit) {
  const bool is_run = ball.reach == 0;
  const int32_t label = f.label[i];
  if (label < 0 || (label == own && !is_run)) return;
  const int64_t rank = f.rank(i, label);
  const double x = ball.x, before = f.values_of(label)[rank - 1];
  if (before <= x ? x - before <= ball.reach : before - x <= ball.reach) return;
  const int64_t q = class_inside(f, label, rank, x, ball.reach);
  const int64_t points = is_run ? ball.end - ball.begin - q : 1;  // samples of other classes with this ball
  if (points > 0) emit(label, PsiSum(points) * without_class(f, x, ball.begin, ball.end, label, q, rank));
}

// Closed balls. Among all samples psi(k_p) - psi(m_p) is zero; emit(c, d) as above. A run of equal values is dealt with
// at its first sample, for all of them.
template <typename Feature, typename Emit>
CSG_HOST_DEVICE void closed_ball(const Feature& f, int64_t p, Emit&& emit) {
  if (p > 0 && f.value[p - 1] == f.value[p]) {
    const int64_t l = window_begin(f.value, p, f.k);
    if (f.value[l] == f.value[l + f.k]) return;
  }
  const ClosedBall ball = closed_ball_of(f, p);
  for (int64_t i = ball.begin; i < ball.end; ++i) member_of_ball(f, ball, i, f.label[p], emit);
}

}  // namespace csg
