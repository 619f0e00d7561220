// The arithmetic of one sample of one sorted feature, compiled for the CPU and for CUDA: what the fast paths leave to
// it (ties, duplicates, classes that come close together) and what defines their results.
//
// All comparisons are on the rounded difference of two values, as scikit-learn's are (never on x - r or x + r).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CSG_HOST_DEVICE __host__ __device__ inline
#else
#define CSG_HOST_DEVICE inline
#endif

namespace csg {

// One feature of N samples, sorted, beside the same values in class order.
struct SortedFeature {
  const double* value;         // [N] ascending, with -inf before and +inf behind it
  const int32_t* label;        // [N] class of each, or ~class for a class that takes no corrections in the fast path
  const int32_t* slot;         // [N] where each stands in class_value; needed by closed balls only
  const double* class_value;   // every class's values ascending, with -inf before and +inf behind each class
  const int64_t* class_begin;  // [classes] where a class begins in class_value
  const int64_t* class_size;   // [classes]
  const int64_t* psi;          // [N + 1] fixed point
  int64_t n, k;                // samples, neighbours; N >= 4 k + 8
  int64_t dominant;            // the class that leaves at most 2 k + 1 samples to the rest, or -1
};

CSG_HOST_DEVICE int32_t class_of(int32_t label) { return label ^ (label >> 31); }

// First index in [0, n) of an ascending array from which on every value lies at most r (closed) or less than r (open)
// below x; `from` is a guess from which the search gallops. n if there is none.
CSG_HOST_DEVICE int64_t first_inside(const double* value, int64_t n, double x, double r, bool closed, int64_t from) {
  const auto inside = [&](int64_t i) { return closed ? x - value[i] <= r : x - value[i] < r; };
  int64_t low, high;  // value[low] is outside (or low == -1), value[high] inside (or high == n)
  int64_t step = 1;
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
    const int64_t middle = low + (high - low) / 2;
    (inside(middle) ? high : low) = middle;
  }
  return high;
}

// One past the last index whose value lies at most r (closed) or less than r (open) above x.
CSG_HOST_DEVICE int64_t end_inside(const double* value, int64_t n, double x, double r, bool closed, int64_t from) {
  const auto inside = [&](int64_t i) { return closed ? value[i] - x <= r : value[i] - x < r; };
  int64_t low, high;  // value[low] is inside (or low == -1), value[high] outside (or high == n)
  int64_t step = 1;
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
    const int64_t middle = low + (high - low) / 2;
    (inside(middle) ? low : high) = middle;
  }
  return high;
}

// Begin of the k + 1 consecutive values (p among them) that hold p's k nearest neighbours.
CSG_HOST_DEVICE int64_t window_begin(const double* value, int64_t p, int64_t k) {
  const double x = value[p];
  int64_t l = p > k ? p - k : 0;
  while (l < p && value[l + k + 1] - x < x - value[l]) ++l;
  return l;
}

// The samples nearest to p outside a window, those of one class left out.
struct Outward {
  const SortedFeature& f;
  double x;
  int32_t left_out;
  int64_t left, right;  // the next candidates

  CSG_HOST_DEVICE double next() {
    while (left >= 0 && f.label[left] == left_out) --left;
    while (right < f.n && f.label[right] == left_out) ++right;
    const double below = x - f.value[left], above = f.value[right] - x;  // inf at the ends
    if (below < above) return --left, below;
    return ++right, above;
  }
};

// Open balls, k_i = k. Returns psi(k) - psi(m_p) of sample p among all samples; emit(c, d) for every class c that
// stands near p: without class c's samples among p's neighbours that value grows by d.
template <typename Emit>
CSG_HOST_DEVICE int64_t open_ball(const SortedFeature& f, int64_t p, Emit&& emit) {
  const double* s = f.value;
  const int64_t k = f.k, l = window_begin(s, p, k);
  const double x = s[p], below = x - s[l], above = s[l + k] - x, reach = below > above ? below : above;
  const int32_t own = f.label[p];
  int64_t run = 0, m = 0;  // samples equal to p; samples in its ball
  if (reach == 0) {
    run = m = end_inside(s, f.n, x, 0, true, l + k) - first_inside(s, f.n, x, 0, true, l);
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
    Outward outward{f, x, label, l - 1, l + k + 1};
    double r = 0;
    for (; repeat > 0; --repeat) r = outward.next();
    int64_t inside = run;
    if (r > 0)
      inside = end_inside(s, f.n, x, r, false, outward.right) - first_inside(s, f.n, x, r, false, outward.left);
    if (single) inside -= r == 0 || (i < p ? x - s[i] : s[i] - x) < r;
    emit(c, f.psi[k] - f.psi[inside] - generic);
  }
  return generic;
}

// Samples of the class at or after `slot` (the first of them inside) that lie in the closed ball.
CSG_HOST_DEVICE int64_t class_inside(const SortedFeature& f, int32_t c, int64_t slot, double x, double r) {
  const double* v = f.class_value + f.class_begin[c];
  const int64_t first = slot - f.class_begin[c];
  return end_inside(v, f.class_size[c], x, r, true, first) - first;
}

// psi(k') - psi(m') of a sample at x for the target class c, which has q samples in the closed ball [begin, end) of
// the sample's k nearest neighbours.
CSG_HOST_DEVICE int64_t without_class(const SortedFeature& f, double x, int64_t begin, int64_t end, int32_t label,
                                      int64_t q, int64_t slot) {
  const int64_t all = end - begin - 1;
  int64_t rest = all - q;
  if (rest >= f.k) return f.psi[rest] - f.psi[all];
  Outward outward{f, x, label, begin - 1, end};
  double r = 0;
  for (; rest < f.k; ++rest) r = outward.next();
  const int64_t first = first_inside(f.value, f.n, x, r, true, outward.left);
  const int64_t m = end_inside(f.value, f.n, x, r, true, outward.right) - first - 1;
  const int32_t c = class_of(label);
  const double* v = f.class_value + f.class_begin[c];
  const int64_t near = slot - f.class_begin[c];
  const int64_t among =
      end_inside(v, f.class_size[c], x, r, true, near) - first_inside(v, f.class_size[c], x, r, true, near);
  return f.psi[m - among] - f.psi[m];
}

// Closed balls. Among all samples psi(k_p) - psi(m_p) is zero; emit(c, d) as above. A run of equal values is dealt with
// at its first sample, for all of them.
template <typename Emit>
CSG_HOST_DEVICE void closed_ball(const SortedFeature& f, int64_t p, Emit&& emit) {
  const double* s = f.value;
  const int64_t k = f.k, l = window_begin(s, p, k);
  const double x = s[p], below = x - s[l], above = s[l + k] - x, reach = below > above ? below : above;
  const bool is_run = reach == 0;
  if (is_run && p > 0 && s[p - 1] == x) return;
  const int64_t begin = first_inside(s, f.n, x, reach, true, l), end = end_inside(s, f.n, x, reach, true, l + k);
  const int32_t own = f.label[p];
  for (int64_t i = begin; i < end; ++i) {
    const int32_t label = f.label[i];
    if (label < 0 || (label == own && !is_run)) continue;
    const int64_t slot = f.slot[i];
    const double before = f.class_value[slot - 1];
    if (before <= x ? x - before <= reach : before - x <= reach) continue;  // not the first of its class in the ball
    const int64_t q = class_inside(f, label, slot, x, reach);
    const int64_t points = is_run ? end - begin - q : 1;  // samples of other classes with this ball
    if (points > 0) emit(label, points * without_class(f, x, begin, end, label, q, slot));
  }
}

}  // namespace csg
