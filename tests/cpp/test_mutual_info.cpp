// The mutual information's CPU kernel called directly, without torch, on the inputs that are hardest for it: closed
// balls against a loop over all pairs; open balls bit for bit the same at every instruction set, layout and split.
// The sanitizers of .ci/run see every path of it here. The exit status is 1 when a value is off.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/half.h"
#include "direct_mutual_info.h"
#include "mutual_info/mutual_info_cpu.h"
#include "mutual_info/standard_normal_cpu.h"

namespace {

using namespace csg;

std::mt19937_64 generator(20261);
int failures = 0;
long checked = 0;

void expect(bool fine, const std::string& what) {
  ++checked;
  if (!fine && ++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}

void two_threads(int64_t total, int64_t, RangeBody body, void* context) {
  std::thread other(body, total / 2, total, context);
  body(0, total / 2, context);
  other.join();
}
void one_thread(int64_t total, int64_t, RangeBody body, void* context) { body(0, total, context); }

int64_t random_below(int64_t n) { return int64_t(generator() % uint64_t(n)); }

constexpr int kKinds = 9;
double draw(int kind, double normal) {
  switch (kind) {
    case 0:
      return normal;
    case 1:
      return std::max(0.0, normal);  // ReLU
    case 2:
      return std::round(3 * normal);  // integers
    case 3:
      return 4.25;  // constant
    case 4:
      return std::round(50 * normal) / 50;
    case 5:
      return std::exp(6 * normal);  // heavy tail
    case 6:
      return std::abs(normal) < 2 ? 0 : normal;  // mostly zero
    case 7:
      return normal * 0x1p1020;  // the variance overflows
    default:
      return to_float(to_bfloat16(float(normal)));
  }
}

// Labels: 0 uniform, 1 skewed, 2 nearly all of one class, 3 as many classes as half of the samples, 4 sorted, 5 classes
// of some seven samples.
std::vector<int64_t> draw_labels(int kind, int64_t n, int64_t* classes) {
  *classes = kind == 3 ? n / 2 + 1 : kind == 5 ? n / 7 : 2 + random_below(9);
  std::vector<int64_t> labels(size_t(n), 0);
  for (auto& label : labels) {
    label = random_below(*classes);
    if (kind == 1) label = std::min(label, random_below(*classes));
    if (kind == 2) label = random_below(n) < 4 ? label : 0;
  }
  if (kind == 4) std::sort(labels.begin(), labels.end());
  return labels;
}

struct Problem {
  int64_t n, k, classes, neighbors;
  std::vector<int64_t> labels, psi;
  std::vector<double> features, noise;  // [k, n]
  int bits = 0;

  std::vector<double> run(ParallelFor threads, bool with_noise, bool multiclass, bool rows) {
    std::vector<double> out(size_t(multiclass ? k : k * classes), -1);
    std::vector<double> by_row(features.size());
    for (int64_t j = 0; j < k; ++j)
      for (int64_t i = 0; i < n; ++i) by_row[size_t(i * k + j)] = features[size_t(j * n + i)];
    mutual_info_cpu({{rows ? by_row.data() : features.data(), ScalarType::Float64, n, k, rows ? k : 1, rows ? 1 : n,
                      labels.data(), classes},
                     neighbors,
                     with_noise ? Ties::Noise : Ties::Exact,
                     with_noise ? noise.data() : nullptr,
                     1,
                     n,
                     multiclass,
                     psi.data(),
                     bits,
                     out.data()},
                    threads);
    return out;
  }

  std::vector<double> run_binned(ParallelFor threads, int64_t bins, bool rows) {
    std::vector<double> out(size_t(k * classes), -1), by_row(features.size());
    for (int64_t j = 0; j < k; ++j)
      for (int64_t i = 0; i < n; ++i) by_row[size_t(i * k + j)] = features[size_t(j * n + i)];
    binned_mutual_info_cpu({{rows ? by_row.data() : features.data(), ScalarType::Float64, n, k, rows ? k : 1,
                             rows ? 1 : n, labels.data(), classes},
                            bins,
                            out.data()},
                           threads);
    return out;
  }

  // The definition of the approximation: entropies of class, bin and both, each with Miller's and Madow's correction.
  double binned(int64_t column, int64_t c, int64_t bins) const {
    const double* x = features.data() + column * n;
    std::vector<double> sorted(x, x + n);
    std::sort(sorted.begin(), sorted.end());
    std::vector<int64_t> cell(size_t(2 * bins)), bin(static_cast<size_t>(bins)), side(2);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t rank = std::lower_bound(sorted.begin(), sorted.end(), x[i]) - sorted.begin(), b = rank * bins / n;
      const bool is_class = labels[size_t(i)] == c;
      ++cell[size_t(2 * b + is_class)], ++bin[size_t(b)], ++side[is_class];
    }
    const auto entropy = [&](const std::vector<int64_t>& counts) {
      double sum = 0, used = 0;
      for (const int64_t m : counts)
        if (m > 0) sum -= double(m) / double(n) * std::log(double(m) / double(n)), ++used;
      return sum + (used - 1) / double(2 * n);
    };
    return std::max(0.0, entropy(bin) + entropy(side) - entropy(cell));
  }

  double direct(int64_t column, const std::vector<int64_t>& group) const {
    return direct_mutual_info(features.data() + column * n, group, classes, neighbors);
  }
};

void test(int64_t n, int64_t neighbors, int label_kind) {
  Problem p{n, 1 + random_below(7), 0, neighbors, {}, {}, {}, {}};
  p.labels = draw_labels(label_kind, n, &p.classes);
  p.bits = kMostPsiBits;
  for (int64_t i = 0; i <= n; ++i) p.psi.push_back(i == 0 ? 0 : std::llround(std::ldexp(digamma(i), p.bits)));
  std::normal_distribution<double> normal;
  std::string kinds;
  for (int64_t j = 0; j < p.k; ++j) {
    const int kind = int(random_below(kKinds));
    kinds += std::to_string(kind);
    for (int64_t i = 0; i < n; ++i) p.features.push_back(draw(kind, normal(generator)));
  }
  p.noise.resize(p.features.size());
  for (double& z : p.noise) z = normal(generator);

  const std::string what = "n " + std::to_string(n) + " k " + std::to_string(neighbors) + " labels " +
                           std::to_string(label_kind) + " features " + kinds;
  const auto exact = p.run(one_thread, false, false, false), multiclass = p.run(two_threads, false, true, true);
  for (int64_t j = 0; j < p.k; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int64_t c = random_below(p.classes);
      std::vector<int64_t> target;
      target.reserve(p.labels.size());
      for (const int64_t label : p.labels) target.push_back(label == c);
      expect(std::abs(exact[size_t(j * p.classes + c)] - p.direct(j, target)) < 1e-10,
             what + ": feature " + std::to_string(j) + " class " + std::to_string(c));
    }
    expect(std::abs(multiclass[size_t(j)] - p.direct(j, p.labels)) < 1e-10,
           what + ": label, feature " + std::to_string(j));
  }
  expect(exact == p.run(two_threads, false, false, true), what + ": closed balls, threads and layout");
  const CpuLevel level = cpu_level();
  set_cpu_level(CpuLevel::Baseline);
  expect(exact == p.run(one_thread, false, false, true), what + ": closed balls, instruction set");
  set_cpu_level(level);
  for (const int64_t bins : {int64_t(1), 1 + random_below(n), n}) {
    const auto got = p.run_binned(two_threads, bins, true);
    for (int64_t j = 0; j < p.k; ++j)
      for (int64_t c = 0; c < std::min<int64_t>(p.classes, 4); ++c)
        expect(std::abs(got[size_t(j * p.classes + c)] - p.binned(j, c, bins)) < 1e-12,
               what + ": " + std::to_string(bins) + " bins, feature " + std::to_string(j));
    set_cpu_level(CpuLevel::Baseline);
    expect(got == p.run_binned(one_thread, bins, false), what + ": bins, instruction set, threads, layout");
    set_cpu_level(level);
  }
  for (const bool several : {false, true}) {
    const auto noisy = p.run(two_threads, true, several, true);
    set_cpu_level(CpuLevel::Baseline);
    const auto other = p.run(one_thread, true, several, false);
    expect(std::memcmp(noisy.data(), other.data(), noisy.size() * sizeof(double)) == 0,
           what + ": open balls, instruction set, threads, layout");
    for (int64_t j = 0; j < p.k; ++j)
      expect(std::isnan(noisy[size_t(several ? j : j * p.classes)]) == (kinds[size_t(j)] == '7'), what + ": NaN");
    set_cpu_level(level);
  }
}

}  // namespace

int main() {
  for (int labels = 0; labels < 5; ++labels) {
    for (const int64_t neighbors : {1, 2, 3, 4, 5, 7, 8, 12})
      for (const int64_t n : {2, 3, 9, 20, 33, 70, 131}) test(n, neighbors, labels);
    for (const int64_t neighbors : {3, 5, 9}) test(401, neighbors, labels);
  }
  test(2003, 3, 0);
  for (int i = 0; i < 12; ++i) test(600, 3, 5);
  NormalState state{{1, 2, 3}, 624, false, 0};
  std::vector<double> all(21 * 13), some(21 * 4);
  NormalState again = state;
  standard_normal_cpu(state, 21, 13, 0, 13, all.data(), two_threads);
  standard_normal_cpu(again, 21, 13, 5, 9, some.data(), one_thread);
  expect(std::equal(some.begin(), some.end(), all.begin() + 5 * 21), "normal numbers by columns");
  expect(std::equal(state.key, state.key + 624, again.key) && state.position == again.position &&
             state.has_gauss == again.has_gauss && state.gauss == again.gauss,
         "state of the normal numbers");
  std::printf("%ld checks, %d failures\n", checked, failures);
  return failures != 0;
}
