// Arrays of more than 2^31 elements: the CPU kernels do the first and the last piece of their work, so that nearly all
// of the arrays is reserved but never touched. Every array that a kernel indexes is that long in one of the cases.
// Values are small integers: results are exact. The exit status is 1 when a value is off.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "array.h"
#include "common/cpu.h"
#include "gate_step/gate_step_cpu.h"
#include "gated_pool/gated_pool_cpu.h"
#include "mutual_info/mutual_info_cpu.h"

namespace {

using namespace csg;

int failures = 0;
long checked = 0;

void expect(double got, double wanted, const std::string& what) {
  ++checked;
  if (got == wanted) return;
  ++failures;
  std::printf("FAILED %s: got %.9g, expected %.9g\n", what.c_str(), got, wanted);
}

// Zeros, of which only the pages that are touched take memory.
template <typename T>
class Reserved {
 public:
  explicit Reserved(int64_t n) : bytes_(size_t(n) * sizeof(T)) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) {
      std::printf("FAILED: %zu bytes cannot be reserved\n", bytes_);
      std::abort();
    }
  }
  ~Reserved() { munmap(memory_, bytes_); }
  Reserved(const Reserved&) = delete;
  Reserved& operator=(const Reserved&) = delete;
  Reserved(Reserved&&) = delete;
  Reserved& operator=(Reserved&&) = delete;
  T* data() const { return static_cast<T*>(memory_); }
  T& operator[](int64_t i) const { return data()[i]; }

 private:
  size_t bytes_;
  void* memory_;
};

void both_ends(int64_t total, int64_t, RangeBody body, void* context) {
  body(0, 1, context);
  body(total - 1, total, context);
}

struct Shape {
  int64_t n, k, s;
};

std::string describe(const Shape& shape, Pool pool, bool channels_last) {
  return std::string(pool == Pool::Avg ? "avg" : "max") + (channels_last ? ", channels last, " : ", rows, ") +
         std::to_string(shape.n) + " x " + std::to_string(shape.k) + " x " + std::to_string(shape.s);
}

// fp16 maps under an fp32 gate; the last sample has values in its last channels, at the first and the last position.
// Those are 32: the last piece of work has no fewer.
void test_forward(const Shape& shape, Pool pool, bool channels_last) {
  const auto [n, k, s] = shape;
  const std::string what = "forward, " + describe(shape, pool, channels_last);
  const int64_t stride_k = channels_last ? 1 : s, stride_s = channels_last ? k : 1, channels = k < 32 ? k : 32;
  const Reserved<Half> x(n * k * s);
  const Reserved<float> out(n * k), pooled(n * k);
  const Reserved<int64_t> index(n * k), labels(n);
  std::vector<float> gate(size_t(2 * k), 0.5F);
  labels[n - 1] = 1;
  for (int64_t j = k - channels; j < k; ++j) {
    Half* const row = x.data() + (n - 1) * k * s + j * stride_k;
    row[0] = to_half(float(j % 7 + 1));
    row[(s - 1) * stride_s] = to_half(float(j % 5 + 8));
    gate[size_t(k + j)] = float(j % 3);
  }
  const GateRows rows{gate.data(), ScalarType::Float32, 2, labels.data(), nullptr, nullptr};
  gated_pool_forward_cpu({x.data(), ScalarType::Float16, pool, n, k, s, k * s, stride_k, stride_s, rows, out.data(),
                          pooled.data(), pool == Pool::Max ? index.data() : nullptr},
                         both_ends);
  for (int64_t j = k - channels; j < k; ++j) {
    const int64_t at = (n - 1) * k + j;
    const auto sum = float((s > 1 ? j % 7 + 1 : 0) + j % 5 + 8);
    const float want = pool == Pool::Max ? float(j % 5 + 8) : sum / float(s);
    expect(pooled[at], want, what + ": pooled");
    expect(out[at], want * float(j % 3), what + ": out");
    if (pool == Pool::Max) expect(double(index[at]), double(s - 1), what + ": index");
  }
}

void test_backward_x(const Shape& shape, Pool pool, bool channels_last) {
  const auto [n, k, s] = shape;
  const std::string what = "backward, " + describe(shape, pool, channels_last);
  const int64_t stride_k = channels_last ? 1 : s, stride_s = channels_last ? k : 1;
  const Reserved<float> grad_out(n * k), pooled(n * k);
  const Reserved<int64_t> index(n * k), labels(n);
  const Reserved<Half> grad_x(n * k * s);
  std::vector<float> gate(size_t(2 * k), 0.5F);
  labels[n - 1] = 1;
  const int64_t at = n * k - 1;
  grad_out[at] = 6, gate[size_t(2 * k - 1)] = 4, index[at] = s - 1;
  const GateRows rows{gate.data(), ScalarType::Float32, 2, labels.data(), nullptr, nullptr};
  gated_pool_backward_cpu({grad_out.data(), nullptr, pooled.data(), pool == Pool::Max ? index.data() : nullptr, pool, n,
                           k, s, rows, grad_x.data(), ScalarType::Float16, k * s, stride_k, stride_s, nullptr},
                          both_ends);
  const Half* const row = grad_x.data() + (n - 1) * k * s + (k - 1) * stride_k;
  const double want = pool == Pool::Max ? 24 : to_float(to_half(24 / float(s)));
  expect(to_float(row[(s - 1) * stride_s]), want, what + ": at the end");
  if (s > 1) expect(to_float(row[0]), pool == Pool::Max ? 0 : want, what + ": at the first position");
}

// As many classes as samples: [N, K] and [C, K] arrays are both that long.
void test_gate_gradient(bool project) {
  const int64_t n = (1 << 11) + 1, k = 1 << 20, last = n * k - 1;
  const std::string what = std::string("gradient of the gate") + (project ? ", projected" : "");
  const Reserved<float> grad_out(n * k), pooled(n * k), gate(n * k), grad_gate(n * k), col_max(k);
  const Reserved<int64_t> labels(n), col_arg(k);
  labels[n - 1] = n - 1;
  grad_out[last] = 3, pooled[last] = 2, gate[k - 1] = 2, gate[last] = 1;
  col_max[k - 1] = 2;
  const GateRows rows{gate.data(),
                      ScalarType::Float32,
                      n,
                      labels.data(),
                      project ? col_max.data() : nullptr,
                      project ? col_arg.data() : nullptr};
  gated_pool_backward_cpu({grad_out.data(), nullptr, pooled.data(), nullptr, Pool::Avg, n, k, 1, rows, nullptr,
                           ScalarType::Float32, k, 1, 1, grad_gate.data()},
                          both_ends);
  expect(grad_gate[last], project ? 3 : 6, what);
  expect(grad_gate[k - 1], project ? -1.5 : 0, what + ": at the maximum");
}

void test_gate_step() {
  const int64_t c = (1 << 11) + 1, k = 1 << 20, last = c * k - 1;
  const Reserved<float> gate(c * k), grad(c * k), buffer(c * k), col_max(k);
  const Reserved<int64_t> col_arg(k);
  gate[k - 1] = 1, gate[last] = 0.5F, grad[last] = 0.25F, buffer[last] = 0.125F;
  gate_step_cpu({gate.data(), grad.data(), buffer.data(), ScalarType::Float32, c, k, 0.5, 1, 0, 0, false, false,
                 Projection::Scale},
                both_ends);
  expect(buffer[last], 0.375, "gate_step: momentum");
  expect(gate[last], 0.5 - 0.5 * 0.375, "gate_step: gate");
  expect(gate[k - 1], 1, "gate_step: the maximum");
  gate[last] = 2;
  column_max_cpu({gate.data(), ScalarType::Float32, c, k, col_max.data(), col_arg.data()}, both_ends);
  expect(col_max[k - 1], 2, "column_max");
  expect(double(col_arg[k - 1]), double(c - 1), "column_max: row");
}

// [N, K] features and noise, [K, C] results; the last features beside the same ones alone.
void test_mutual_info(bool noise) {
  const int64_t n = 1030, k = 1 << 21, classes = 1030, few = 3, neighbors = 3;
  const std::string what = noise ? "mutual_info, noise" : "mutual_info";
  const Reserved<BFloat16> features(n * k);
  const Reserved<double> drawn(n * k), out(k * classes);
  std::vector<BFloat16> alone(size_t(n * few));
  std::vector<double> drawn_alone(size_t(n * few)), want(size_t(few * classes)), binned(size_t(few * classes));
  std::vector<int64_t> labels(size_t(n), 0), psi(size_t(n + 1), 0);
  double digamma = -0.5772156649015329;
  for (int64_t i = 1; i <= n; ++i) psi[size_t(i)] = int64_t(digamma * 0x1p40), digamma += 1 / double(i);
  std::mt19937_64 generator(20262);
  for (int64_t i = 0; i < n; ++i) {
    labels[size_t(i)] = int64_t(generator() % 5);
    if (i >= n - 9) labels[size_t(i)] = classes - 1;
    for (int64_t j = 0; j < few; ++j) {
      const auto value = to_bfloat16(float(generator() % 64 + uint64_t(labels[size_t(i)] % 16) * uint64_t(j + 1)));
      features[i * k + k - few + j] = alone[size_t(i * few + j)] = value;
      drawn[i * k + k - few + j] = drawn_alone[size_t(i * few + j)] = double(generator() % 4096) / 1024 - 2;
    }
  }
  const auto run = [&](const BFloat16* x, const double* z, int64_t width, double* to) {
    mutual_info_cpu({{x, ScalarType::BFloat16, n, width, width, 1, labels.data(), classes},
                     neighbors,
                     noise ? Ties::Noise : Ties::Exact,
                     noise ? z : nullptr,
                     noise ? width : 0,
                     noise ? 1 : 0,
                     false,
                     psi.data(),
                     40,
                     to},
                    width == few
                        ? +[](int64_t total, int64_t, RangeBody body, void* context) { body(0, total, context); }
                        : both_ends);
  };
  run(features.data(), drawn.data(), k, out.data());
  run(alone.data(), drawn_alone.data(), few, want.data());
  double most = 0;
  for (int64_t i = 0; i < few * classes; ++i) {
    expect(out[(k - few) * classes + i], want[size_t(i)], what);
    most = want[size_t(i)] > most ? want[size_t(i)] : most;
  }
  expect(double(most > 0.01), 1, what + ": not all zero");
  if (noise) return;
  binned_mutual_info_cpu({{features.data(), ScalarType::BFloat16, n, k, k, 1, labels.data(), classes}, 16, out.data()},
                         both_ends);
  binned_mutual_info_cpu(
      {{alone.data(), ScalarType::BFloat16, n, few, few, 1, labels.data(), classes}, 16, binned.data()},
      [](int64_t total, int64_t, RangeBody body, void* context) { body(0, total, context); });
  for (int64_t i = 0; i < few * classes; ++i)
    expect(out[(k - few) * classes + i], binned[size_t(i)], "binned_mutual_info");
}

}  // namespace

int main() {
  const Shape many_samples{(1 << 20) + 1, 64, 49}, many_rows{(1 << 15) + 1, 1 << 16, 2},
      many_pooled{(1 << 15) + 1, 1 << 16, 1}, long_sample{2, 1 << 16, (1 << 15) + 1};
  for (const Pool pool : {Pool::Avg, Pool::Max})
    for (const bool channels_last : {false, true}) {
      for (const Shape& shape : {many_samples, many_rows, many_pooled, long_sample})
        for (const bool amd : {false, true}) {
          set_cpu_is_amd(amd);
          test_forward(shape, pool, channels_last);
        }
      for (const Shape& shape : {many_samples, many_rows, many_pooled}) test_backward_x(shape, pool, channels_last);
    }
  for (const Pool pool : {Pool::Avg, Pool::Max}) test_backward_x(long_sample, pool, false);
  for (const bool project : {false, true}) test_gate_gradient(project);
  test_gate_step();
  for (const bool noise : {false, true}) test_mutual_info(noise);
  std::printf("%ld values checked, %d wrong\n", checked, failures);
  return failures == 0 ? 0 : 1;
}
