// What the C++ tests and the instruction counts share: names of types, and an array of any of them.
#pragma once

#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "common/half.h"
#include "common/types.h"

namespace csg {

inline const char* name(ScalarType type) {
  switch (type) {
    case ScalarType::Float32:
      return "fp32";
    case ScalarType::Float64:
      return "fp64";
    case ScalarType::Float16:
      return "fp16";
    case ScalarType::BFloat16:
      return "bf16";
  }
  return "?";
}

inline int64_t bytes_of(ScalarType type) {
  return type == ScalarType::Float64 ? 8 : type == ScalarType::Float32 ? 4 : 2;
}

// An array of any of the types, filled with NaN so that what a kernel leaves out shows. An allocation of just its size:
// the address sanitizer sees where it ends.
struct Array {
  ScalarType type;
  std::vector<char> bytes;  // from operator new: aligned for every type
  int64_t size;

  Array(ScalarType t, int64_t n) : type(t), bytes(size_t(n * bytes_of(t))), size(n) {
    for (int64_t i = 0; i < n; ++i) set(i, std::numeric_limits<double>::quiet_NaN());
  }
  void* data() { return bytes.data(); }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(bytes.data());
  }
  void set(int64_t i, double v) {
    if (type == ScalarType::Float64) as<double>()[i] = v;
    if (type == ScalarType::Float32) as<float>()[i] = float(v);
    if (type == ScalarType::Float16) as<Half>()[i] = to_half(float(v));
    if (type == ScalarType::BFloat16) as<BFloat16>()[i] = to_bfloat16(float(v));
  }
  double get(int64_t i) {
    if (type == ScalarType::Float64) return as<double>()[i];
    if (type == ScalarType::Float32) return as<float>()[i];
    if (type == ScalarType::Float16) return to_float(as<Half>()[i]);
    return to_float(as<BFloat16>()[i]);
  }
  void fill_random(std::mt19937_64& generator, double low, double high) {
    std::uniform_real_distribution<double> draw(low, high);
    for (int64_t i = 0; i < size; ++i) set(i, draw(generator));
  }
};

}  // namespace csg
