// A libFuzzer target: bytes become a problem for the CPU kernels of the mutual information, whose values must be those
// of a loop over all pairs of samples, the same at every instruction set, with any strides, and finite.
//
//   cmake -S . -B build/cmake-fuzz -G Ninja -DCSG_FUZZ=ON -DCMAKE_CXX_COMPILER=clang++
//   cmake --build build/cmake-fuzz && build/cmake-fuzz/tests/fuzz_mutual_info -max_len=1024 -len_control=0
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "array.h"
#include "direct_mutual_info.h"
#include "mutual_info/mutual_info_cpu.h"

namespace {

using namespace csg;

constexpr int64_t kMost = 60;   // samples
constexpr int64_t kDirect = 3;  // classes whose values the loop over all pairs gives, too

struct Bytes {
  const uint8_t* data = nullptr;
  size_t left = 0;

  uint64_t state = 1;  // of the numbers that follow the last byte

  uint8_t next() {
    state = state * 6364136223846793005U + 1442695040888963407U;
    if (left == 0) return uint8_t(state >> 56);
    state ^= *data;
    return --left, *data++;
  }
  int64_t below(int64_t n) { return next() % n; }
  template <typename T>
  T number() {
    uint8_t bytes[sizeof(T)];
    for (uint8_t& b : bytes) b = next();
    T value;
    std::memcpy(&value, bytes, sizeof(T));
    return value;
  }
};

// A finite value: one of the bits of its type, a small integer (ties), or one beside the value before (near ties).
double draw(Bytes& in, int kind, double before) {
  double value = 0;
  switch (kind) {
    case 0:
      value = in.number<double>();
      break;
    case 1:
      value = double(in.number<float>());
      break;
    case 2:
      value = double(int8_t(in.next()) % 5);
      break;
    case 3:
      value = double(in.number<int16_t>()) / 256;
      break;
    default:
      value = in.below(3) == 0 ? double(int8_t(in.next())) : std::nextafter(before, in.below(2) == 0 ? -1e300 : 1e300);
  }
  return std::isfinite(value) ? value : 0;
}

void one_thread(int64_t total, int64_t, RangeBody body, void* context) { body(0, total, context); }
void two_parts(int64_t total, int64_t, RangeBody body, void* context) {
  body(total / 2, total, context);
  body(0, total / 2, context);
}

struct Problem {
  int64_t n, k, classes, neighbors;
  ScalarType type;
  std::vector<int64_t> labels, psi;
  std::vector<double> noise;  // [n, k]
  int bits;

  std::vector<double> run(Array& x, int64_t stride_n, int64_t stride_k, bool noisy, bool multiclass,
                          ParallelFor threads) const {
    std::vector<double> out(size_t(multiclass ? k : k * classes), -1);
    mutual_info_cpu({{x.data(), type, n, k, stride_n, stride_k, labels.data(), classes},
                     neighbors,
                     noisy ? Ties::Noise : Ties::Exact,
                     noisy ? noise.data() : nullptr,
                     k,
                     1,
                     multiclass,
                     psi.data(),
                     bits,
                     out.data()},
                    threads);
    return out;
  }
};

void expect(bool fine, const char* what, const Problem& p, int64_t column) {
  if (fine) return;
  std::fprintf(stderr, "WRONG %s: n %ld k %ld classes %ld neighbors %ld %s, column %ld\n", what, long(p.n), long(p.k),
               long(p.classes), long(p.neighbors), name(p.type), long(column));
  std::abort();
}

bool same_bits(const std::vector<double>& a, const std::vector<double>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in{data, size};
  Problem p{};
  p.n = 2 + in.below(kMost - 1), p.k = 1 + in.below(3), p.classes = 1 + in.below(p.n), p.neighbors = 1 + in.below(12);
  p.type = ScalarType(in.below(4));
  const int64_t gap = 1 + in.below(3);
  const bool by_row = in.below(2) == 0;
  p.neighbors = std::min(p.neighbors, p.n - 1);
  p.bits = kMostPsiBits;
  for (int64_t i = 0; i <= p.n; ++i) p.psi.push_back(i == 0 ? 0 : std::llround(std::ldexp(digamma(i), p.bits)));
  for (int64_t i = 0; i < p.n; ++i) p.labels.push_back(in.below(p.classes));

  // The same values by column without gaps, and in a layout of the input's own.
  Array columns(p.type, p.n * p.k), strided(p.type, p.n * p.k * gap);
  const int64_t stride_n = gap * (by_row ? p.k : 1), stride_k = gap * (by_row ? 1 : p.n);
  std::vector<std::vector<double>> value(static_cast<size_t>(p.k));
  for (int64_t j = 0; j < p.k; ++j) {
    const int kind = int(in.below(5));
    double before = 0;
    for (int64_t i = 0; i < p.n; ++i) {
      const int64_t at = j * p.n + i;
      columns.set(at, before = draw(in, kind, before));
      if (!std::isfinite(columns.get(at))) columns.set(at, before = 1);
      strided.set(i * stride_n + j * stride_k, before);
      value[size_t(j)].push_back(columns.get(at));
    }
  }
  // Standard normal in the package; any finite numbers do here.
  for (int64_t i = 0; i < p.n * p.k; ++i) p.noise.push_back(double(in.number<int16_t>()) / 8192);

  const CpuLevel best = cpu_level();
  const auto exact = p.run(columns, 1, p.n, false, false, one_thread);
  const auto several = p.run(columns, 1, p.n, false, true, one_thread);
  const auto noisy = p.run(columns, 1, p.n, true, false, one_thread);
  const auto noisy_several = p.run(columns, 1, p.n, true, true, two_parts);
  for (int64_t j = 0; j < p.k; ++j) {
    const auto& x = value[size_t(j)];
    for (int64_t c = 0; c < p.classes; ++c) {
      const double other = noisy[size_t(j * p.classes + c)];
      expect(std::isnan(other) || (std::isfinite(other) && other >= 0), "open balls", p, j);
      if (c >= kDirect) continue;
      std::vector<int64_t> target;
      target.reserve(p.labels.size());
      for (const int64_t label : p.labels) target.push_back(label == c);
      const double got = exact[size_t(j * p.classes + c)];
      expect(std::abs(got - direct_mutual_info(x.data(), target, 2, p.neighbors)) < 1e-10, "closed balls", p, j);
    }
    expect(std::abs(several[size_t(j)] - direct_mutual_info(x.data(), p.labels, p.classes, p.neighbors)) < 1e-10,
           "label", p, j);
  }
  std::vector<std::vector<double>> bins;
  const int64_t counts[] = {1, 1 + in.below(p.n), p.n};
  const auto run_bins = [&](Array& x, int64_t by_n, int64_t by_k, int64_t count, ParallelFor threads) {
    std::vector<double> out(size_t(p.k * p.classes), -1);
    binned_mutual_info_cpu({{x.data(), p.type, p.n, p.k, by_n, by_k, p.labels.data(), p.classes}, count, out.data()},
                           threads);
    for (const double mi : out) expect(std::isfinite(mi) && mi >= 0, "bins", p, 0);
    return out;
  };
  for (const int64_t count : counts) bins.push_back(run_bins(columns, 1, p.n, count, one_thread));
  const CpuLevel levels[] = {CpuLevel::Baseline, CpuLevel::Avx2, best};
  set_cpu_level(std::min(best, levels[in.below(3)]));
  expect(same_bits(exact, p.run(strided, stride_n, stride_k, false, false, two_parts)), "layout, level", p, -1);
  expect(same_bits(several, p.run(strided, stride_n, stride_k, false, true, two_parts)), "layout, level", p, -2);
  expect(same_bits(noisy, p.run(strided, stride_n, stride_k, true, false, two_parts)), "layout, level", p, -3);
  expect(same_bits(noisy_several, p.run(strided, stride_n, stride_k, true, true, one_thread)), "layout, level", p, -4);
  for (size_t i = 0; i < bins.size(); ++i)
    expect(same_bits(bins[i], run_bins(strided, stride_n, stride_k, counts[i], two_parts)), "layout, level", p, -5);
  set_cpu_level(best);
  return 0;
}
