// Vectors of one width, for one instruction set. Included once per level, inside that level's namespace and between
// CSG_TARGET_BEGIN and CSG_TARGET_END, with CSG_WIDTH (bytes of a vector) and CSG_LEVEL (0, 1, 2) defined.
// No include guard on purpose; nothing from the standard library is instantiated here, so that no code for a newer
// processor can be merged with code of the same name for an older one.

CSG_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
CSG_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

typedef float VecF __attribute__((vector_size(CSG_WIDTH)));
typedef double VecD __attribute__((vector_size(CSG_WIDTH)));
typedef int32_t VecI32 __attribute__((vector_size(CSG_WIDTH)));
typedef uint32_t VecU32 __attribute__((vector_size(CSG_WIDTH)));
typedef int64_t VecI64 __attribute__((vector_size(CSG_WIDTH)));
typedef uint16_t VecU16Half __attribute__((vector_size(CSG_WIDTH / 2)));

template <typename V, typename T>
CSG_INLINE V load_bits(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V, typename T>
CSG_INLINE void store_bits(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// Simd<T>: loads of T widened to its accumulator's vector, and rounded stores.
template <typename T>
struct Simd;

template <>
struct Simd<float> {
  using Vec = VecF;
  using Int = VecI32;
  CSG_INLINE Vec load(const float* p) { return load_bits<Vec>(p); }
  CSG_INLINE void store(float* p, Vec v) { store_bits(p, v); }
};

template <>
struct Simd<double> {
  using Vec = VecD;
  using Int = VecI64;
  CSG_INLINE Vec load(const double* p) { return load_bits<Vec>(p); }
  CSG_INLINE void store(double* p, Vec v) { store_bits(p, v); }
};

template <>
struct Simd<BFloat16> {
  using Vec = VecF;
  using Int = VecI32;
  CSG_INLINE Vec load(const BFloat16* p) {
    return (Vec)(__builtin_convertvector(load_bits<VecU16Half>(p), VecU32) << 16);
  }
  CSG_INLINE void store(BFloat16* p, Vec v) {
    const VecU32 u = (VecU32)v;
    const VecU32 rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
    const VecU32 nan = u >> 16 | 0x40u;
    const VecU32 is_nan = (VecU32)(v != v);
    store_bits(p, __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), VecU16Half));
  }
};

template <>
struct Simd<Half> {
  using Vec = VecF;
  using Int = VecI32;
#if CSG_LEVEL == 2
  CSG_INLINE Vec load(const Half* p) { return (Vec)_mm512_cvtph_ps(load_bits<__m256i>(p)); }
  CSG_INLINE void store(Half* p, Vec v) { store_bits(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT)); }
#elif CSG_LEVEL == 1
  CSG_INLINE Vec load(const Half* p) { return (Vec)_mm256_cvtph_ps(load_bits<__m128i>(p)); }
  CSG_INLINE void store(Half* p, Vec v) { store_bits(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
#else
  CSG_INLINE Vec load(const Half* p) {
    Vec v;
    for (int i = 0; i < CSG_WIDTH / 4; ++i) v[i] = to_float(p[i]);
    return v;
  }
  CSG_INLINE void store(Half* p, Vec v) {
    for (int i = 0; i < CSG_WIDTH / 4; ++i) p[i] = to_half(v[i]);
  }
#endif
};

template <typename T>
constexpr int kLanes = CSG_WIDTH / int(sizeof(Accumulator<T>));

// Sum of the lanes.
CSG_INLINE float lane_sum(VecF v) {
#if CSG_LEVEL == 2
  return _mm512_reduce_add_ps((__m512)v);
#elif CSG_LEVEL == 1
  __m128 q = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
#else
  float sum = 0;
  for (int i = 0; i < CSG_WIDTH / 4; ++i) sum += v[i];
  return sum;
#endif
}
CSG_INLINE double lane_sum(VecD v) {
#if CSG_LEVEL == 2
  return _mm512_reduce_add_pd((__m512d)v);
#else
  double sum = 0;
  for (int i = 0; i < CSG_WIDTH / 8; ++i) sum += v[i];
  return sum;
#endif
}

// All ones in the last `count` lanes, zero elsewhere: keeps what an overlapping load has not seen yet.
template <typename Int>
CSG_INLINE Int last_lanes(int count) {
  constexpr int lanes = CSG_WIDTH / int(sizeof(Int{}[0]));
  Int lane;
  for (int i = 0; i < lanes; ++i) lane[i] = i;
  return lane >= lanes - count;
}

// n values of T widened into, or rounded from, their accumulator's type.
template <typename T>
CSG_INLINE void widen_block(Accumulator<T>* to, const T* from, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store_bits(to + i, Simd<T>::load(from + i));
  for (; i < n; ++i) to[i] = widen(from[i]);
}
template <typename T>
CSG_INLINE void narrow_block(T* to, const Accumulator<T>* from, int64_t n) {
  using Vec = typename Simd<T>::Vec;
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) Simd<T>::store(to + i, load_bits<Vec>(from + i));
  for (; i < n; ++i) to[i] = narrow<T>(from[i]);
}
