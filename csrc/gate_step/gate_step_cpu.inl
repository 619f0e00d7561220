// gate_step's CPU kernels for one instruction set; see ../common/simd.inl for how this file is compiled.
// Bytes that must move: gate and buffer read and written once, grad read once. Rows are updated one after the other, a
// panel of columns at a time whose maxima stay in L1, and projected in a second pass. Of a gate beyond the cache it
// moves twice, but in the order in which memory is read fastest: narrow panels were slower. Threads share out the rows:
// where each had columns of every row, the prefetchers fetched what another thread was writing.

constexpr int64_t kColumnBlock = 32;             // columns that threads do not share
constexpr int64_t kPanelBytes = 16 << 10;        // maxima in L1
constexpr int kStripVectors = 4;                 // of a row, side by side in registers
constexpr int64_t kGrainElements = 32 << 10;     // below this a second thread costs more than it brings
constexpr int64_t kPartElements = 24 << 10;      // the same of the parts of the rows that threads share out
constexpr int64_t kMinRows = 8, kMaxParts = 64;  // each part has maxima of its own

// How a strip of a row is read and written: `count` vectors of `lanes` elements, or one element alone. The formulas
// below take either.
template <typename T, int N>
struct Vectors {
  using Vec = typename Simd<T>::Vec;
  static constexpr int count = N, lanes = kLanes<T>;
  CSG_MEMBER Vec load(const T* from) const { return Simd<T>::load(from); }
  CSG_MEMBER void store(T* to, Vec v) const { Simd<T>::store(to, v); }
};
template <typename T>
struct Element {
  using Vec = Accumulator<T>;
  static constexpr int count = 1, lanes = 1;
  CSG_MEMBER Vec load(const T* from) const { return widen_element(*from); }
  CSG_MEMBER void store(T* to, Vec v) const { *to = narrow_element<T>(v); }
};

// Calls f(first column, access) for the strips of a row of `len` columns.
template <typename T, typename F>
CSG_INLINE void for_strips(int64_t len, F f) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t j = 0;
  for (; j + kStripVectors * lanes <= len; j += kStripVectors * lanes) f(j, Vectors<T, kStripVectors>{});
  for (; j + lanes <= len; j += lanes) f(j, Vectors<T, 1>{});
  for (; j < len; ++j) f(j, Element<T>{});
}

// Where `value` takes the place of the maximum `top` of the rows above: the first of equals stays, the first NaN wins.
template <typename V>
CSG_INLINE auto exceeds(V value, V top) {
  return (value > top) | ((value != value) & (top == top));
}

// What one strip of a row becomes before its projection; its momentum is written where `keep` says so.
template <typename T, typename Access>
CSG_INLINE void update_strip(const GateStep& p, int64_t at, Access access, bool keep, typename Access::Vec* gate) {
  using A = Accumulator<T>;
  using V = typename Access::Vec;
  constexpr int n = Access::count, lanes = Access::lanes;
  const A lr = A(p.lr), momentum = A(p.momentum), fresh = A(1 - p.dampening), decay = A(p.weight_decay);
  const T* from = static_cast<const T*>(p.gate) + at;
  for (int i = 0; i < n; ++i) gate[i] = access.load(from + i * lanes);
  if (!p.grad) return;
  const T* grad = static_cast<const T*>(p.grad) + at;
  V d[n];
  for (int i = 0; i < n; ++i) d[i] = access.load(grad + i * lanes);
  if (decay != 0)
    for (int i = 0; i < n; ++i) d[i] += decay * gate[i];
  if (p.buffer) {
    T* kept = static_cast<T*>(p.buffer) + at;
    V buffer[n];
    if (p.first_step) {
      for (int i = 0; i < n; ++i) buffer[i] = d[i];
    } else {
      for (int i = 0; i < n; ++i) buffer[i] = momentum * access.load(kept + i * lanes) + fresh * d[i];
    }
    if (keep)
      for (int i = 0; i < n; ++i) access.store(kept + i * lanes, buffer[i]);
    if (p.nesterov) {
      for (int i = 0; i < n; ++i) d[i] += momentum * buffer[i];
    } else {
      for (int i = 0; i < n; ++i) d[i] = buffer[i];
    }
  }
  for (int i = 0; i < n; ++i) gate[i] -= lr * d[i];
}

// projection.h's formulas for a vector or an element. `wanted` names the (first) largest entry of a column that has
// none above zero (Scale) or none of 1 or more (Euclidean): the maximum until it is met, else NaN.
template <typename V>
CSG_INLINE V one_where_met(V g, V* wanted) {
  const auto met = g == *wanted;
  *wanted = met ? V{} + __builtin_nanf("") : *wanted;
  return met ? V{} + 1 : V{};
}
template <typename V>
CSG_INLINE V clipped(V v) {
  v = v < 0 ? V{} : v;
  return v > 1 ? V{} + 1 : v;
}
template <typename V>
CSG_INLINE V project_scale_vector(V g, V top, V* wanted) {
  const V one_hot = one_where_met(g, wanted);
  const V dead = top != top ? top : one_hot;
  return top > 0 ? clipped(V(g / top)) : dead;
}
template <typename V>
CSG_INLINE V project_euclidean_vector(V g, V top, V* wanted) {
  const V one_hot = one_where_met(g, wanted);
  const V v = one_hot > 0 ? one_hot : clipped(g);
  return top != top ? top : v;
}

// A panel's columns: their maxima and what project_*_vector wants, and by vector, whether it wants anything.
template <typename T>
struct Panel {
  using A = Accumulator<T>;
  static constexpr int64_t columns = kPanelBytes / int64_t(sizeof(A));
  A top[columns], wanted[columns];
  bool wants[columns / kLanes<T>];
};
template <typename T>
CSG_INLINE int64_t whole_vectors(int64_t len) {
  return (len + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Half types are rounded once: they are updated again in the second pass instead of being kept in fp32 until then.
template <typename T>
constexpr bool kUpdatedAgain = sizeof(T) < sizeof(Accumulator<T>);

// Updates the rows [begin, end) of `len` columns; top: the maxima, of whole vectors of columns.
template <typename T>
CSG_INLINE void update_rows(const GateStep& p, int64_t begin, int64_t end, int64_t k0, int64_t len,
                            Accumulator<T>* top) {
  for (int64_t j = 0; j < whole_vectors<T>(len); ++j) top[j] = -__builtin_inff();
  for (int64_t c = begin; c < end; ++c)
    for_strips<T>(len, [&](int64_t j, auto access) __attribute__((always_inline)) {
      using S = decltype(access);
      T* const row = static_cast<T*>(p.gate) + c * p.k + k0 + j;
      typename S::Vec v[S::count];
      update_strip<T>(p, c * p.k + k0 + j, access, !kUpdatedAgain<T>, v);
      for (int i = 0; i < S::count; ++i) {
        if (!kUpdatedAgain<T> && p.grad) access.store(row + i * S::lanes, v[i]);
        const auto best = load_bits<typename S::Vec>(top + j + i * S::lanes);
        store_bits(top + j + i * S::lanes, exceeds(v[i], best) ? v[i] : best);
      }
    });
}

// Projects the rows [begin, end) of `len` columns, whose maxima are in panel.top. `has_maximum(j)`: whether the first
// entry that equals a column's maximum is in these rows.
template <typename T, typename F>
CSG_INLINE void project_rows(const GateStep& p, int64_t begin, int64_t end, int64_t k0, int64_t len, Panel<T>& panel,
                             F has_maximum) {
  using V = typename Simd<T>::Vec;
  constexpr int64_t lanes = kLanes<T>;
  const bool scale = p.projection == Projection::Scale;
  for (int64_t j = 0; j < len; j += lanes) {
    const V top = load_bits<V>(panel.top + j);
    const auto enough = (typename Simd<T>::Int)(scale ? top > 0 : top >= 1);
    store_bits(panel.wanted + j, enough ? V{} + __builtin_nanf("") : top);
    panel.wants[j / lanes] = first_lane(~enough) >= 0;
    for (int64_t i = j; panel.wants[j / lanes] && i < min64(len, j + lanes); ++i)
      if (!has_maximum(i)) panel.wanted[i] = __builtin_nanf("");
  }
  for (int64_t c = begin; c < end; ++c)
    for_strips<T>(len, [&](int64_t j, auto access) __attribute__((always_inline)) {
      using S = decltype(access);
      using Vec = typename S::Vec;
      T* const row = static_cast<T*>(p.gate) + c * p.k + k0 + j;
      Vec v[S::count];
      if (kUpdatedAgain<T>) {
        update_strip<T>(p, c * p.k + k0 + j, access, true, v);
      } else {
        for (int i = 0; i < S::count; ++i) v[i] = access.load(row + i * S::lanes);
      }
      for (int i = 0; i < S::count; ++i) {
        const int64_t at = j + i * S::lanes;
        const Vec top = load_bits<Vec>(panel.top + at);
        if (panel.wants[at / lanes]) {
          Vec wanted = load_bits<Vec>(panel.wanted + at);
          v[i] = scale ? project_scale_vector(v[i], top, &wanted) : project_euclidean_vector(v[i], top, &wanted);
          store_bits(panel.wanted + at, wanted);
        } else {
          v[i] = clipped(scale ? Vec(v[i] / top) : v[i]);
        }
        access.store(row + i * S::lanes, v[i]);
      }
    });
}

// Calls f(first column, columns) for the panels of the columns [begin, end).
template <typename T, typename F>
CSG_INLINE void for_panels(int64_t begin, int64_t end, F f) {
  for (int64_t k0 = begin; k0 < end; k0 += Panel<T>::columns) f(k0, min64(Panel<T>::columns, end - k0));
}

// Calls f(first column, columns) for the panels of every thread's share of the columns.
template <typename T, typename F>
CSG_INLINE void for_shared_panels(int64_t c, int64_t k, ParallelFor parallel_for, F f) {
  const int64_t blocks = (k + kColumnBlock - 1) / kColumnBlock;
  const int64_t grain = max64(1, kGrainElements / max64(1, c * min64(k, kColumnBlock)));
  parallel_ranges(parallel_for, blocks, grain, [&](int64_t begin, int64_t end) {
    for_panels<T>(begin * kColumnBlock, min64(k, end * kColumnBlock), f);
  });
}

// The largest power of two that leaves every part enough to do; half types take twice the time for an element.
template <typename T>
CSG_INLINE int64_t parts_of(int64_t c, int64_t k) {
  constexpr int64_t grain = kUpdatedAgain<T> ? kPartElements / 2 : kPartElements;
  int64_t parts = 1;
  while (2 * parts <= min64(kMaxParts, min64(c / kMinRows, c * k / grain))) parts *= 2;
  return parts;
}

// The step in parts of the rows: all are updated before any is projected.
template <typename T>
CSG_INLINE void step_parts(const GateStep& p, int64_t parts, ParallelFor parallel_for) {
  using A = Accumulator<T>;
  using V = typename Simd<T>::Vec;
  using Int = typename Simd<T>::Int;
  using Lane = std::remove_reference_t<decltype(Int{}[0])>;
  const int64_t stride = whole_vectors<T>(p.k);
  const Scratch maxima((parts + 1) * stride * int64_t(sizeof(A))), owners(stride * int64_t(sizeof(Lane)));
  A* const top = static_cast<A*>(maxima.get());
  A* const part_top = top + stride;
  Lane* const owner = static_cast<Lane*>(owners.get());  // the first part that has a column's maximum
  parallel_ranges(parallel_for, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      for_panels<T>(0, p.k, [&](int64_t k0, int64_t len) {
        update_rows<T>(p, p.c * part / parts, p.c * (part + 1) / parts, k0, len, part_top + part * stride + k0);
      });
  });
  for (int64_t j = 0; j < stride; j += kLanes<T>) {
    V best = load_bits<V>(part_top + j);
    Int first{};
    for (int64_t part = 1; part < parts; ++part) {
      const V value = load_bits<V>(part_top + part * stride + j);
      const auto better = exceeds(value, best);
      best = better ? value : best;
      first = better ? Int{} + Lane(part) : first;
    }
    store_bits(top + j, best);
    store_bits(owner + j, first);
  }
  parallel_ranges(parallel_for, parts, 1, [&](int64_t begin, int64_t end) {
    Panel<T> panel;  // NOLINT(cppcoreguidelines-pro-type-member-init): filled as far as it has columns
    for (int64_t part = begin; part < end; ++part)
      for_panels<T>(0, p.k, [&](int64_t k0, int64_t len) {
        __builtin_memcpy(panel.top, top + k0, size_t(whole_vectors<T>(len)) * sizeof(A));
        project_rows<T>(p, p.c * part / parts, p.c * (part + 1) / parts, k0, len, panel,
                        [&](int64_t j) { return owner[k0 + j] == Lane(part); });
      });
  });
}

template <typename T>
CSG_INLINE void gate_step_of(const GateStep& p, ParallelFor parallel_for) {
  const int64_t parts = parts_of<T>(p.c, p.k);
  if (parts > 1) return step_parts<T>(p, parts, parallel_for);
  const auto step = [&](int64_t k0, int64_t len) {
    Panel<T> panel;  // NOLINT(cppcoreguidelines-pro-type-member-init): filled as far as it has columns
    update_rows<T>(p, 0, p.c, k0, len, panel.top);
    project_rows<T>(p, 0, p.c, k0, len, panel, [](int64_t) { return true; });
  };
  if (p.c >= 2 * kMinRows) return for_panels<T>(0, p.k, step);  // too little for parts
  for_shared_panels<T>(p.c, p.k, parallel_for, step);           // too few rows
}

template <typename T>
CSG_INLINE void column_max_panel(const ColumnMax& p, int64_t k0, int64_t len) {
  using Lane = std::remove_reference_t<decltype(typename Simd<T>::Int{}[0])>;
  constexpr int64_t chunk = int64_t(1) << 30;  // rows: their positions fit in 32 bits
  Accumulator<T> top[Panel<T>::columns];
  Lane where[Panel<T>::columns];
  for (int64_t j = 0; j < len; ++j) top[j] = -__builtin_inff(), p.col_arg[k0 + j] = 0;
  for (int64_t first = 0; first < p.c; first += chunk) {
    for (int64_t j = 0; j < len; ++j) where[j] = -1;
    for (int64_t c = first; c < min64(p.c, first + chunk); ++c)
      for_strips<T>(len, [&](int64_t j, auto access) __attribute__((always_inline)) {
        using S = decltype(access);
        using Vec = typename S::Vec;
        using Int = std::conditional_t<S::lanes == 1, Lane, typename Simd<T>::Int>;
        const T* const row = static_cast<const T*>(p.gate) + c * p.k + k0 + j;
        for (int i = 0; i < S::count; ++i) {
          const int64_t at = j + i * S::lanes;
          const Vec v = access.load(row + i * S::lanes), best = load_bits<Vec>(top + at);
          const auto better = exceeds(v, best);
          store_bits(top + at, better ? v : best);
          store_bits(where + at, better ? Int{} + Lane(c - first) : load_bits<Int>(where + at));
        }
      });
    for (int64_t j = 0; j < len; ++j)
      if (where[j] >= 0) p.col_arg[k0 + j] = first + where[j];
  }
  narrow_block(static_cast<T*>(p.col_max) + k0, top, len);
}

template <typename T>
CSG_INLINE void column_max_of(const ColumnMax& p, ParallelFor parallel_for) {
  for_shared_panels<T>(p.c, p.k, parallel_for, [&](int64_t k0, int64_t len) { column_max_panel<T>(p, k0, len); });
}

void gate_step(const GateStep& p, ParallelFor parallel_for) {
  switch (p.type) {
    case ScalarType::Float32:
      return gate_step_of<float>(p, parallel_for);
    case ScalarType::Float64:
      return gate_step_of<double>(p, parallel_for);
    case ScalarType::Float16:
      return gate_step_of<Half>(p, parallel_for);
    case ScalarType::BFloat16:
      return gate_step_of<BFloat16>(p, parallel_for);
  }
}

void column_max(const ColumnMax& p, ParallelFor parallel_for) {
  switch (p.type) {
    case ScalarType::Float32:
      return column_max_of<float>(p, parallel_for);
    case ScalarType::Float64:
      return column_max_of<double>(p, parallel_for);
    case ScalarType::Float16:
      return column_max_of<Half>(p, parallel_for);
    case ScalarType::BFloat16:
      return column_max_of<BFloat16>(p, parallel_for);
  }
}
