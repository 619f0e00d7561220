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

#if CSG_LEVEL > 0
// v in a register: gcc repeats a load for every use that can take its operand from memory.
template <typename V>
CSG_INLINE V loaded_once(V v) {
  __asm__("" : "+v"(v));
  return v;
}

// Hides where v came from: clang turns comparisons of widened halves into comparisons of halves, one at a time.
CSG_INLINE VecF opaque(VecF v) {
#if defined(__clang__)
  return loaded_once(v);
#else
  return v;
#endif
}
#endif

template <>
struct Simd<Half> {
  using Vec = VecF;
  using Int = VecI32;
#if CSG_LEVEL == 2
  CSG_INLINE Vec load(const Half* p) { return opaque((Vec)_mm512_cvtph_ps(load_bits<__m256i>(p))); }
  CSG_INLINE void store(Half* p, Vec v) { store_bits(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT)); }
#elif CSG_LEVEL == 1
  CSG_INLINE Vec load(const Half* p) { return opaque((Vec)_mm256_cvtph_ps(load_bits<__m128i>(p))); }
  CSG_INLINE void store(Half* p, Vec v) { store_bits(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
#else
  // to_float and to_half of half.h, lane by lane.
  CSG_INLINE Vec load(const Half* p) {
    const VecI32 bits = __builtin_convertvector(load_bits<VecU16Half>(p), VecI32), magnitude = bits & 0x7fff;
    const VecI32 subnormal = (VecI32)(__builtin_convertvector(magnitude, VecF) * 0x1p-24f);
    const VecI32 inf_or_nan = magnitude >= 0x7c00, normal = (magnitude << 13) + 0x38000000 + (inf_or_nan & 0x38000000);
    return (Vec)((bits & 0x8000) << 16 | (magnitude < 0x0400 ? subnormal : normal));
  }
  CSG_INLINE void store(Half* p, Vec v) {
    const VecI32 bits = (VecI32)v, magnitude = bits & 0x7fffffff;
    const VecI32 subnormal = (VecI32)((VecF)magnitude + 0.5f) - 0x3f000000;
    const VecI32 normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    VecI32 half = magnitude < 0x38800000 ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? VecI32{} + 0x7c00 : half;
    half = magnitude > 0x7f800000 ? VecI32{} + 0x7e00 : half;
    store_bits(p, __builtin_convertvector((VecU32)(half | (bits >> 16 & 0x8000)), VecU16Half));
  }
#endif
};

// sum + v, a vector of T widened. Of halves as v * 1 + sum, which rounds the same: Zen 4 has the shifts and conversions
// that widen them in the units that add, not in those that multiply.
template <typename T>
CSG_INLINE typename Simd<T>::Vec add_widened(typename Simd<T>::Vec sum, typename Simd<T>::Vec v) {
#if CSG_LEVEL == 2
  if constexpr (sizeof(T) == 2) return (VecF)_mm512_fmadd_ps((__m512)v, (__m512)opaque(VecF{} + 1), (__m512)sum);
#elif CSG_LEVEL == 1
  if constexpr (sizeof(T) == 2) return (VecF)_mm256_fmadd_ps((__m256)v, (__m256)opaque(VecF{} + 1), (__m256)sum);
#endif
  return sum + v;
}

// One element, with the same instructions as a vector of them.
template <typename T>
CSG_INLINE Accumulator<T> widen_element(T v) {
  return widen(v);
}
template <typename T>
CSG_INLINE T narrow_element(Accumulator<T> v) {
  return narrow<T>(v);
}
#if CSG_LEVEL > 0
template <>
CSG_MEMBER float widen_element(Half v) {
  return _cvtsh_ss(v.bits);
}
template <>
CSG_MEMBER Half narrow_element(float v) {
  return {_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT)};
}
#endif

template <typename T>
constexpr int kLanes = CSG_WIDTH / int(sizeof(Accumulator<T>));

// Sum and maximum of the lanes (no NaN among them for the maximum), and the first lane whose mask is set, or -1.
#if CSG_LEVEL == 2
CSG_INLINE float lane_sum(VecF v) { return _mm512_reduce_add_ps((__m512)v); }
CSG_INLINE double lane_sum(VecD v) { return _mm512_reduce_add_pd((__m512d)v); }
CSG_INLINE float lane_max(VecF v) { return _mm512_reduce_max_ps((__m512)v); }
CSG_INLINE double lane_max(VecD v) { return _mm512_reduce_max_pd((__m512d)v); }
CSG_INLINE int first_lane(VecI32 mask) {
  const unsigned bits = _mm512_movepi32_mask((__m512i)mask);
  return bits ? __builtin_ctz(bits) : -1;
}
CSG_INLINE int first_lane(VecI64 mask) {
  const unsigned bits = _mm512_movepi64_mask((__m512i)mask);
  return bits ? __builtin_ctz(bits) : -1;
}
#else
template <typename V>
CSG_INLINE auto lane_sum(V v) {
  auto sum = v[0];
  for (int i = 1; i < int(sizeof(V) / sizeof(v[0])); ++i) sum += v[i];
  return sum;
}
template <typename V>
CSG_INLINE auto lane_max(V v) {
  auto best = v[0];
  for (int i = 1; i < int(sizeof(V) / sizeof(v[0])); ++i) best = v[i] > best ? v[i] : best;
  return best;
}
#if CSG_LEVEL == 1
CSG_INLINE int first_lane(VecI32 mask) {
  const int bits = _mm256_movemask_ps((__m256)mask);
  return bits ? __builtin_ctz(unsigned(bits)) : -1;
}
CSG_INLINE int first_lane(VecI64 mask) {
  const int bits = _mm256_movemask_pd((__m256d)mask);
  return bits ? __builtin_ctz(unsigned(bits)) : -1;
}
#else
template <typename V>
CSG_INLINE int first_lane(V mask) {
  for (int i = 0; i < int(sizeof(V) / sizeof(mask[0])); ++i)
    if (mask[i]) return i;
  return -1;
}
#endif
#endif

// One step of adding vectors while transposing them: the sums of neighbouring lanes of a, beside those of b. The lane
// orders are those of single instructions: unpack within 128 bits (Group elements at a time), then whole 128-bit parts.
// Lane i of the result is the sum of two of the lanes of (a, b), numbered as one vector.
template <int Group, int lanes, int part>
constexpr int merged_lane(int i, bool second) {
  if (Group < part) {
    const int group = i % part / Group;
    return group % 2 * lanes + i / part * part + group / 2 * Group + i % Group + (second ? part / 2 : 0);
  }
  return (i / part * 2 + (second ? 1 : 0)) * part + i % part;
}
#if defined(__clang__)
template <int Group, bool second, typename V, size_t... I>
CSG_INLINE V pick_lanes(V a, V b, std::index_sequence<I...>) {
  constexpr int lanes = CSG_WIDTH / int(sizeof(V{}[0])), part = 16 / int(sizeof(V{}[0]));
  return __builtin_shufflevector(a, b, merged_lane<Group, lanes, part>(int(I), second)...);
}
template <int Group, typename V>
CSG_INLINE V merge_lanes(V a, V b) {
  constexpr std::make_index_sequence<CSG_WIDTH / sizeof(V{}[0])> all;
  return pick_lanes<Group, false>(a, b, all) + pick_lanes<Group, true>(a, b, all);
}
#else
template <int Group, typename V>
CSG_INLINE V merge_lanes(V a, V b) {
  constexpr int lanes = CSG_WIDTH / int(sizeof(V{}[0])), part = 16 / int(sizeof(V{}[0]));
  decltype(V{} < V{}) first, second;
  for (int i = 0; i < lanes; ++i) {
    first[i] = merged_lane<Group, lanes, part>(i, false);
    second[i] = merged_lane<Group, lanes, part>(i, true);
  }
  return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
}
#endif
// The sums of as many vectors as there are lanes: that of v[i] in lane i. About three instructions a vector.
template <int Group, typename V>
CSG_INLINE V transposed_sum(const V* v) {
  constexpr int lanes = CSG_WIDTH / int(sizeof(V{}[0]));
  if constexpr (Group == lanes) {
    return *v;
  } else {
    V half[lanes / Group / 2];
    for (int i = 0; i < lanes / Group / 2; ++i) half[i] = merge_lanes<Group>(v[2 * i], v[2 * i + 1]);
    return transposed_sum<2 * Group>(half);
  }
}

// even[0], odd[0], even[1], odd[1], ...: unpacked within 128 bits, then the parts in order.
#if CSG_LEVEL == 2
CSG_INLINE void store_interleaved(float* to, VecF even, VecF odd) {
  const __m512 a = (__m512)even, b = (__m512)odd;
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  store_bits(to, _mm512_permutex2var_ps(a, first, b));
  store_bits(to + 16, _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b));
}
#else
CSG_INLINE void store_interleaved(float* to, VecF even, VecF odd) {
  for (int i = 0; i < CSG_WIDTH / 4; ++i) to[2 * i] = even[i], to[2 * i + 1] = odd[i];
}
#endif

// All ones in the last `count` lanes, zero elsewhere: keeps what an overlapping load has not seen yet.
template <typename Int>
CSG_INLINE Int last_lanes(int count) {
  constexpr int lanes = CSG_WIDTH / int(sizeof(Int{}[0]));
  using Lane = std::remove_reference_t<decltype(Int{}[0])>;
  Int lane;
  for (int i = 0; i < lanes; ++i) lane[i] = Lane(i);
  return (Int)(lane >= Lane(lanes - count));
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
