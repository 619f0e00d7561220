// fp16 and bf16 as the CPU kernels see them: 16 bits, converted to and from float with rounding to nearest even.
// Own code because _Float16 needs gcc 12 on x86 and the torch headers stay out of the kernels.
#pragma once

#include <cstdint>
#include <cstring>

namespace csg {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float to_float(BFloat16 h) { return bits_to_float(uint32_t(h.bits) << 16); }

inline float to_float(Half h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16;
  const uint32_t magnitude = h.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, NaN
  if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));         // normal
  const float subnormal = float(magnitude) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

inline BFloat16 to_bfloat16(float f) {
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t(u >> 16 | 0x40u)};  // a NaN stays one
  return {uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}

inline Half to_half(float f) {
  const uint32_t u = float_to_bits(f);
  const uint32_t sign = u >> 16 & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to 65536 or more: inf
  if (magnitude < 0x38800000u) {
    // Adding 0.5 aligns the last bit of the sum with the last bit of a subnormal half: the FPU rounds.
    const float aligned = bits_to_float(magnitude) + 0.5f;
    return {uint16_t(sign | (float_to_bits(aligned) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13))};
}

// The type in which T is accumulated.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(Half v) { return to_float(v); }
inline float widen(BFloat16 v) { return to_float(v); }

template <typename T>
T narrow(Accumulator<T> v);
template <>
inline float narrow<float>(float v) {
  return v;
}
template <>
inline double narrow<double>(double v) {
  return v;
}
template <>
inline Half narrow<Half>(float v) {
  return to_half(v);
}
template <>
inline BFloat16 narrow<BFloat16>(float v) {
  return to_bfloat16(v);
}

}  // namespace csg
