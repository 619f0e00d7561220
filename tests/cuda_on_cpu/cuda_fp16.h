// Stands in for cuda_fp16.h: storage and the two conversions that the kernels use, rounding to nearest even.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  const float magnitude = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return std::copysign(magnitude, h.bits >> 15 != 0 ? -1.0f : 1.0f);
}

inline __half __float2half_rn(float f) {
  const auto sign = static_cast<uint16_t>(std::signbit(f) ? 0x8000 : 0);
  const float a = std::fabs(f);
  if (std::isnan(f)) return {0x7fff};
  if (a >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (a < 0x1p-14f) return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(a * 0x1p24f)))};
  int exponent;
  const float fraction = std::frexp(a, &exponent);  // in [0.5, 1)
  // Rounding up to 2048 carries into the exponent, as it should.
  const auto rounded = static_cast<int>(std::nearbyint(fraction * 2048.0f));
  return {static_cast<uint16_t>(sign | (((exponent + 13) << 10) + rounded))};
}
