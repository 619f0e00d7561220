// A self-check without Python: every launcher against naive loops in double. Returns 0 when all agree. Compile with
//   g++ -std=c++20 -O1 -fno-strict-aliasing -fsanitize=undefined -fno-sanitize-recover=all -Wno-unknown-pragmas
//     -I tests/cuda_on_cpu -x c++ csrc/*/*.cu tests/cuda_on_cpu/cuda_on_cpu.cpp tests/cuda_on_cpu/driver.cpp
//     -o cuda_on_cpu_driver
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/gate_step/gate_step_cuda.h"
#include "../../csrc/gated_pool/gated_pool_cuda.h"
#include "../../csrc/mutual_info/mutual_info_cuda.h"

extern "C" const char* cuda_on_cpu_error();

namespace {

std::mt19937 random_engine(20);
int failures = 0;

std::vector<float> normal(int64_t count, float mean = 0.0f) {
  std::normal_distribution<float> distribution(mean, 1.0f);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = distribution(random_engine);
  return values;
}

void launched(int status) {
  if (status == 0) return;
  std::printf("launch failed with %d: %s\n", status, cuda_on_cpu_error());
  ++failures;
}

void compare(const char* what, int64_t at, double got, double expected) {
  if (std::abs(got - expected) <= 1e-5 * std::max(1.0, std::abs(expected))) return;  // false for a NaN
  if (++failures < 20) std::printf("%s[%ld]: got %.9g, expected %.9g\n", what, static_cast<long>(at), got, expected);
}

// P(gate)[c, k], as the definition says.
double projected(const std::vector<float>& gate, int64_t classes, int64_t k_count, int64_t c, int64_t k) {
  int64_t arg = 0;
  for (int64_t r = 1; r < classes; ++r) {
    if (gate[r * k_count + k] > gate[arg * k_count + k]) arg = r;
  }
  const double top = gate[arg * k_count + k];
  if (!(top > 0)) return c == arg ? 1.0 : 0.0;
  return std::min(1.0, std::max(0.0, gate[c * k_count + k] / top));
}

void check_pool(int64_t n, int64_t k, int64_t s, bool channels_last, csg::Pool pool) {
  constexpr int64_t kClasses = 3;
  const auto x = normal(n * k * s), gate = normal(kClasses * k, 0.3f), grad_out = normal(n * k),
             grad_pooled = normal(n * k);
  std::vector<int64_t> labels(static_cast<size_t>(n));
  for (int64_t& label : labels) label = static_cast<int64_t>(random_engine() % kClasses);
  std::vector<float> col_max(static_cast<size_t>(k));
  std::vector<int64_t> col_arg(col_max.size());
  launched(csg::column_max_cuda({gate.data(), csg::ScalarType::Float32, kClasses, k, col_max.data(), col_arg.data()},
                                nullptr));

  const int64_t stride_k = channels_last ? 1 : s, stride_s = channels_last ? k : 1;
  const csg::GateRows rows{gate.data(),   csg::ScalarType::Float32, kClasses,
                           labels.data(), col_max.data(),           col_arg.data()};
  std::vector<float> out(static_cast<size_t>(n * k), NAN), pooled(out), grad_x(x.size(), NAN),
      grad_gate(gate.size(), NAN);
  std::vector<int64_t> index(out.size(), -1);
  launched(csg::gated_pool_forward_cuda({x.data(), csg::ScalarType::Float32, pool, n, k, s, k * s, stride_k, stride_s,
                                         rows, out.data(), pooled.data(), index.data()},
                                        nullptr));
  launched(csg::gated_pool_backward_cuda(
      {grad_out.data(), grad_pooled.data(), pooled.data(), index.data(), pool, n, k, s, rows, grad_x.data(),
       csg::ScalarType::Float32, k * s, stride_k, stride_s, grad_gate.data()},
      nullptr));

  std::vector<double> sums(gate.size(), 0.0), along(col_max.size(), 0.0);
  for (int64_t i = 0; i < n * k; ++i) {
    const int64_t sample = i / k, channel = i % k, c = labels[sample];
    const auto at = [&](int64_t position) { return sample * k * s + channel * stride_k + position * stride_s; };
    double mean = 0;
    int64_t top = 0;
    for (int64_t position = 0; position < s; ++position) {
      mean += x[at(position)];
      if (x[at(position)] > x[at(top)]) top = position;
    }
    const double value = pool == csg::Pool::Avg ? mean / static_cast<double>(s) : x[at(top)];
    const double row = projected(gate, kClasses, k, c, channel);
    compare("pooled", i, pooled[i], value);
    compare("out", i, out[i], row * value);
    if (pool == csg::Pool::Max) compare("index", i, static_cast<double>(index[i]), static_cast<double>(top));
    const double grad = grad_out[i] * row + grad_pooled[i];
    for (int64_t position = 0; position < s; ++position) {
      const double share = pool == csg::Pool::Avg ? 1.0 / static_cast<double>(s) : position == top;
      compare("grad_x", at(position), grad_x[at(position)], grad * share);
    }
    sums[c * k + channel] += grad_out[i] * value;
    along[channel] += grad_out[i] * value * row;
  }
  for (int64_t i = 0; i < kClasses * k; ++i) {
    const int64_t c = i / k, channel = i % k;
    const double sum = (gate[i] >= 0 ? sums[i] : 0.0) - (c == col_arg[channel] ? along[channel] : 0.0);
    compare("grad_gate", i, grad_gate[i] * std::max(1e-3f, col_max[channel]),
            col_max[channel] > 0 ? sum / col_max[channel] * std::max(1e-3f, col_max[channel]) : 0.0);
  }
}

void check_step(int64_t classes, int64_t k, csg::Projection projection) {
  const auto before = normal(classes * k, 0.5f), grad = normal(classes * k);
  auto gate = before, buffer = normal(classes * k);
  const auto old = buffer;
  launched(csg::gate_step_cuda({gate.data(), grad.data(), buffer.data(), csg::ScalarType::Float32, classes, k, 0.1, 0.9,
                                0.2, 0.01, true, false, projection},
                               nullptr));
  for (int64_t channel = 0; channel < k; ++channel) {
    std::vector<double> updated;
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t i = c * k + channel;
      const double d = grad[i] + 0.01 * before[i], b = 0.9 * old[i] + 0.8 * d;
      compare("buffer", i, buffer[i], b);
      updated.push_back(before[i] - 0.1 * (d + 0.9 * b));
    }
    const auto arg = std::max_element(updated.begin(), updated.end()) - updated.begin();
    const double top = updated[arg];
    for (int64_t c = 0; c < classes; ++c) {
      const double clipped = std::min(1.0, std::max(0.0, updated[c]));
      const double scaled = top > 0 ? std::min(1.0, std::max(0.0, updated[c] / top)) : 0.0;
      const double value = projection == csg::Projection::Scale ? scaled : clipped;
      compare("gate", c * k + channel, gate[c * k + channel] * std::max(1e-2, top),
              (c == arg ? 1.0 : value) * std::max(1e-2, top));
    }
  }
}

// Closed balls; the classes of `labels` have at least two samples each.
void check_mutual_info(int64_t n, int64_t classes, int64_t neighbors) {
  constexpr int kBits = 40;
  auto x = normal(n);
  for (size_t i = 0; i < x.size(); i += 2) x[i] = std::max(0.0f, x[i]);
  std::vector<int64_t> labels(x.size()), psi{0};
  std::vector<double> digamma{0.0}, out(static_cast<size_t>(classes), NAN);
  for (size_t i = 0; i < labels.size(); ++i) labels[i] = static_cast<int64_t>(i) % classes;
  for (int64_t i = 1; i <= n; ++i) {
    digamma.push_back(i == 1 ? -0.57721566490153286 : digamma.back() + 1.0 / static_cast<double>(i - 1));
    psi.push_back(std::llround(std::ldexp(digamma.back(), kBits)));
  }
  csg::MutualInfo p{};
  p.features = x.data(), p.type = csg::ScalarType::Float32, p.n = n, p.k = 1, p.stride_n = p.stride_k = 1;
  p.labels = labels.data(), p.classes = classes, p.neighbors = neighbors, p.ties = csg::Ties::Exact;
  p.psi = psi.data(), p.psi_bits = kBits, p.out = out.data();
  int64_t bytes = 0;
  launched(csg::mutual_info_cuda_bytes(p, &bytes));
  std::vector<unsigned char> work(static_cast<size_t>(bytes));
  csg::LabelOutside outside{};
  launched(csg::mutual_info_cuda(p, work.data(), bytes, &outside, nullptr));
  for (int64_t c = 0; c < classes; ++c) {
    double sum = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      std::vector<double> distances;  // to the samples of its side
      const auto distance = [&](size_t j) { return std::abs(static_cast<double>(x[i]) - static_cast<double>(x[j])); };
      for (size_t j = 0; j < x.size(); ++j)
        if (j != i && (labels[j] == c) == (labels[i] == c)) distances.push_back(distance(j));
      std::sort(distances.begin(), distances.end());
      const size_t k = std::min(static_cast<size_t>(neighbors), distances.size());
      size_t own = 0, all = 0;
      for (const double d : distances) own += d <= distances[k - 1];
      for (size_t j = 0; j < x.size(); ++j) all += j != i && distance(j) <= distances[k - 1];
      sum += digamma[own] - digamma[all] - digamma[distances.size() + 1];
    }
    const double expected = std::max(0.0, digamma.back() + sum / static_cast<double>(n));
    compare("mutual information", c, out[static_cast<size_t>(c)], expected);
  }
}

}  // namespace

int main() {
  for (const csg::Pool pool : {csg::Pool::Avg, csg::Pool::Max}) {
    for (const bool channels_last : {false, true}) {
      for (const int64_t s : {1, 6, 49, 65, 12544})
        check_pool(s > 1000 ? 1 : 5, s > 1000 ? 3 : 12, s, channels_last, pool);
    }
  }
  for (const csg::Projection projection : {csg::Projection::Scale, csg::Projection::Euclidean}) {
    for (const int64_t classes : {1, 10, 700, 2100}) check_step(classes, 9, projection);
  }
  for (const int64_t n : {12, 150, 600})
    for (const int64_t classes : {2, 5}) check_mutual_info(n, classes, 3);
  std::printf(failures == 0 ? "cuda_on_cpu: all right\n" : "cuda_on_cpu: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
