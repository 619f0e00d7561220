// Runs every CPU kernel once on fixed inputs, one thread, for tools/instruction_counts.py to count the instructions of.
//   instruction_counts          the names of the cases, in the order in which they run; callgrind counts measured()
//   instruction_counts --build  what else decides the counts: compiler, options, C library
#include <gnu/libc-version.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "array.h"
#include "gate_step/gate_step_cpu.h"
#include "gated_pool/gated_pool_cpu.h"
#include "mutual_info/mutual_info_cpu.h"
#include "mutual_info/standard_normal_cpu.h"

// Callgrind is told to count from here to the return, and to write its counts then.
extern "C" __attribute__((noinline, used)) void measured(const std::function<void()>& kernel) { kernel(); }

namespace {

using namespace csg;

std::mt19937_64 generator(20262);

void one_thread(int64_t total, int64_t, RangeBody body, void* context) { body(0, total, context); }

void run(const std::string& what, const std::function<void()>& kernel) {
  std::printf("%s\n", what.c_str());
  measured(kernel);
}

Array random_array(ScalarType type, int64_t size, double low, double high) {
  Array a(type, size);
  a.fill_random(generator, low, high);
  return a;
}

std::vector<int64_t> random_labels(int64_t n, int64_t classes) {
  std::vector<int64_t> labels(size_t(n), 0);
  for (auto& label : labels) label = int64_t(generator() % uint64_t(classes));
  return labels;
}

// Half-precision maps under an fp32 gate, as in training with autocast.
void gated_pool(ScalarType type, Pool pool, bool channels_last, int64_t n, int64_t k, int64_t side) {
  const int64_t s = side * side, classes = 10;
  const int64_t stride_k = channels_last ? 1 : s, stride_s = channels_last ? k : 1;
  Array x = random_array(type, n * k * s, -1, 1), grad_x(type, n * k * s);
  Array gate = random_array(ScalarType::Float32, classes * k, 0, 1), grad_gate(ScalarType::Float32, classes * k);
  Array out(ScalarType::Float32, n * k), pooled(ScalarType::Float32, n * k),
      grad = random_array(ScalarType::Float32, n * k, -1, 1);
  std::vector<int64_t> labels = random_labels(n, classes), index(size_t(n * k), 0);
  int64_t* positions = pool == Pool::Max ? index.data() : nullptr;
  const GateRows rows{gate.data(), ScalarType::Float32, classes, labels.data(), nullptr, nullptr};
  const std::string what = std::string(" ") + (pool == Pool::Avg ? "avg " : "max ") + name(type) +
                           (channels_last ? " channels-last " : " rows ") + std::to_string(side) + "x" +
                           std::to_string(side);
  const GatedPoolForward forward{x.data(), type,       pool,          n,        k, s, k * s, stride_k, stride_s,
                                 rows,     out.data(), pooled.data(), positions};
  run("gated_pool forward" + what, [&] { gated_pool_forward_cpu(forward, one_thread); });
  const GatedPoolBackward backward{
      grad.data(), nullptr,  pooled.data(), positions,       pool, n, k, s, rows, grad_x.data(), type,
      k * s,       stride_k, stride_s,      grad_gate.data()};
  run("gated_pool backward" + what, [&] { gated_pool_backward_cpu(backward, one_thread); });
  if (pool == Pool::Max || !channels_last) return;
  const GatedPoolBackward shared{
      grad.data(), nullptr, pooled.data(),   nullptr, pool, n, k, s, rows, grad_x.data(), type, k,
      1,           0,       grad_gate.data()};
  run("gated_pool backward, shared values" + what, [&] { gated_pool_backward_cpu(shared, one_thread); });
}

void gate_step(ScalarType type, Projection projection) {
  const int64_t c = 10, k = 512;
  Array gate = random_array(type, c * k, -0.2, 1), grad = random_array(type, c * k, -1, 1);
  Array buffer = random_array(type, c * k, -1, 1), top(type, k);
  std::vector<int64_t> where(size_t(k), 0);
  const GateStep step{gate.data(), grad.data(), buffer.data(), type, c, k, 0.1, 0.9, 0, 1e-4, false, false, projection};
  const char* how = projection == Projection::Scale ? "scale " : "euclidean ";
  run(std::string("gate_step ") + how + name(type), [&] { gate_step_cpu(step, one_thread); });
  if (projection == Projection::Scale)
    run(std::string("column_max ") + name(type),
        [&] { column_max_cpu({gate.data(), type, c, k, top.data(), where.data()}, one_thread); });
}

// ReLU features of ten classes (or two): half of the values tie without noise.
void mutual_info(Ties ties, int64_t classes, int64_t neighbors) {
  const int64_t n = 2000, k = 4;
  Array features = random_array(ScalarType::Float32, n * k, -1, 1), noise(ScalarType::Float64, n * k);
  for (int64_t i = 0; i < n * k; ++i) features.set(i, std::max(0.0, features.get(i)));
  noise.fill_random(generator, -2, 2);
  const std::vector<int64_t> labels = random_labels(n, classes);
  const int bits = 46;
  std::vector<int64_t> psi{0};
  double digamma = -0.5772156649015329;
  for (int64_t i = 1; i <= n; ++i) psi.push_back(std::llround(std::ldexp(digamma, bits))), digamma += 1 / double(i);
  std::vector<double> out(size_t(k * classes), 0);
  const MutualInfo p{features.data(),
                     ScalarType::Float32,
                     n,
                     k,
                     k,
                     1,
                     labels.data(),
                     classes,
                     neighbors,
                     ties,
                     ties == Ties::Noise ? noise.as<double>() : nullptr,
                     1,
                     n,
                     false,
                     psi.data(),
                     bits,
                     out.data()};
  run(std::string("mutual_info ") + (ties == Ties::Noise ? "noise " : "exact ") + std::to_string(classes) +
          " classes, " + std::to_string(neighbors) + " neighbours",
      [&] { mutual_info_cpu(p, one_thread); });
}

void standard_normal() {
  const int64_t n = 1000, k = 16;
  NormalState state{{}, 624, false, 0};
  for (uint32_t& word : state.key) word = uint32_t(generator());
  std::vector<double> out(size_t(n * k), 0);
  run("standard_normal", [&] { standard_normal_cpu(state, n, k, 0, k, out.data(), one_thread); });
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && std::strcmp(arguments[1], "--build") == 0) {
    std::printf("compiler %s\noptions %s\nlibc %s\n", CSG_COMPILER, CSG_OPTIONS, gnu_get_libc_version());
    return 0;
  }
  set_cpu_is_amd(false);  // the same on every machine
  using enum ScalarType;
  const char* levels[] = {"baseline", "avx2", "avx512"};
  std::printf("%s\n", levels[int(cpu_level())]);
  for (const Pool pool : {Pool::Avg, Pool::Max})
    for (const ScalarType type : {Float32, BFloat16, Float16})
      for (const bool channels_last : {false, true}) {
        gated_pool(type, pool, channels_last, 8, 64, 7);
        gated_pool(type, pool, channels_last, 8, 64, 8);
        gated_pool(type, pool, channels_last, 2, 64, 28);
      }
  for (const ScalarType type : {Float32, BFloat16, Float16})
    for (const Projection projection : {Projection::Scale, Projection::Euclidean}) gate_step(type, projection);
  for (const Ties ties : {Ties::Exact, Ties::Noise}) {
    mutual_info(ties, 10, 3);
    mutual_info(ties, 2, 3);
    mutual_info(ties, 10, 5);
  }
  standard_normal();
  return 0;
}
