// The CPU kernels called directly, without torch, against naive loops in double: every type, layout and pool.
// Prints one line for each group of checks; the exit status is 1 when a value is off.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "array.h"
#include "common/cpu.h"
#include "gate_step/gate_step_cpu.h"
#include "gated_pool/gated_pool_cpu.h"

namespace {

using namespace csg;

std::mt19937_64 generator(20260);
int failures = 0;
long checked = 0;

// Unit roundoff of a type: the error of one rounding.
double roundoff(ScalarType type) {
  switch (type) {
    case ScalarType::Float32:
      return 0x1p-24;
    case ScalarType::Float64:
      return 0x1p-53;
    case ScalarType::Float16:
      return 0x1p-11;
    case ScalarType::BFloat16:
      return 0x1p-8;
  }
  return 0;
}

// Relative error that an accumulator's sums of a few thousand terms of one size may have.
double accumulation(ScalarType type) { return type == ScalarType::Float64 ? 1e-13 : 2e-6; }

void expect(double got, double wanted, double tolerance, const std::string& what, int64_t at) {
  ++checked;
  const bool fine = std::isnan(wanted) ? std::isnan(got) : std::abs(got - wanted) <= tolerance;
  if (fine) return;
  if (++failures <= 20) {
    std::printf("FAILED %s [%lld]: got %.9g, expected %.9g +- %.2g\n", what.c_str(), static_cast<long long>(at), got,
                wanted, tolerance);
  }
}

// Two threads, each with its half: what a pool of threads does to a kernel.
void two_threads(int64_t total, int64_t, RangeBody body, void* context) {
  std::thread other(body, total / 2, total, context);
  body(0, total / 2, context);
  other.join();
}

struct Case {
  ScalarType x_type, type;
  Pool pool;
  bool channels_last, labelled, project;
  int64_t n, k, s, rows;
};

std::string describe(const Case& c) {
  return std::string("x ") + name(c.x_type) + ", gate " + name(c.type) + (c.pool == Pool::Avg ? ", avg" : ", max") +
         (c.channels_last ? ", channels last" : ", rows") + (c.labelled ? ", labels" : ", weights") +
         (c.project ? ", project" : "") + ", n " + std::to_string(c.n) + " k " + std::to_string(c.k) + " s " +
         std::to_string(c.s);
}

double projected(double g, double top, bool is_top) { return top > 0 ? std::clamp(g / top, 0.0, 1.0) : double(is_top); }

void test_gated_pool(const Case& c) {
  const std::string what = describe(c);
  set_cpu_is_amd(generator() % 2);  // either's way of fetching ahead
  const int64_t stride_k = c.channels_last ? 1 : c.s, stride_s = c.channels_last ? c.k : 1, stride_n = c.k * c.s;
  const auto at = [&](int64_t n, int64_t k, int64_t s) { return n * stride_n + k * stride_k + s * stride_s; };

  Array x(c.x_type, c.n * c.k * c.s), gate(c.type, c.rows * c.k), out(c.type, c.n * c.k), pooled(c.type, c.n * c.k);
  x.fill_random(generator, 0, 2);  // one sign: the tolerances below are relative to the terms' size
  gate.fill_random(generator, -0.5, 1.5);
  std::vector<int64_t> labels(c.n), index(c.n * c.k, -1), col_arg(c.k);
  for (auto& label : labels) label = int64_t(generator() % c.rows);
  if (c.labelled && c.n > 2) labels[1] = c.rows;  // outside: NaN for that sample
  if (c.project && c.k > 1)
    for (int64_t r = 0; r < c.rows; ++r) gate.set(r * c.k + 1, -1 - double(r));  // a column without a positive entry
  Array col_max(c.type, c.k);
  const ColumnMax columns{gate.data(), c.type, c.rows, c.k, col_max.data(), col_arg.data()};
  column_max_cpu(columns, two_threads);
  for (int64_t k = 0; k < c.k; ++k) {
    int64_t best = 0;
    for (int64_t r = 1; r < c.rows; ++r)
      if (gate.get(r * c.k + k) > gate.get(best * c.k + k)) best = r;
    expect(double(col_arg[k]), double(best), 0, what + ": col_arg", k);
    expect(col_max.get(k), gate.get(best * c.k + k), 0, what + ": col_max", k);
  }

  const GateRows rows{gate.data(),
                      c.type,
                      c.rows,
                      c.labelled ? labels.data() : nullptr,
                      c.project ? col_max.data() : nullptr,
                      c.project ? col_arg.data() : nullptr};
  gated_pool_forward_cpu({x.data(), c.x_type, c.pool, c.n, c.k, c.s, stride_n, stride_k, stride_s, rows, out.data(),
                          pooled.data(), c.pool == Pool::Max ? index.data() : nullptr},
                         two_threads);

  const auto row_of = [&](int64_t n) { return c.labelled ? labels[n] : n; };
  const auto row_value = [&](int64_t n, int64_t k) {
    const int64_t r = row_of(n);
    if (r < 0 || r >= c.rows) return std::numeric_limits<double>::quiet_NaN();
    const double g = gate.get(r * c.k + k);
    return c.project ? projected(g, col_max.get(k), col_arg[k] == r) : g;
  };
  const double unit = roundoff(c.type), sums = accumulation(c.type);
  for (int64_t n = 0; n < c.n; ++n) {
    for (int64_t k = 0; k < c.k; ++k) {
      double want = c.pool == Pool::Avg ? 0 : x.get(at(n, k, 0));
      int64_t where = 0;
      for (int64_t s = 0; s < c.s; ++s) {
        const double v = x.get(at(n, k, s));
        if (c.pool == Pool::Avg) want += v / double(c.s);
        if (c.pool == Pool::Max && v > want) want = v, where = s;
      }
      const double row = row_value(n, k);
      expect(pooled.get(n * c.k + k), want, unit * want + sums * want, what + ": pooled", n * c.k + k);
      const double subnormal = c.type == ScalarType::Float16 ? 0x1p-25 : 1e-30;  // they are rounded to 2^-24
      expect(out.get(n * c.k + k), row * want, 2 * (unit + sums) * std::abs(row * want) + subnormal, what + ": out",
             n * c.k + k);
      if (c.pool == Pool::Max) expect(double(index[n * c.k + k]), double(where), 0, what + ": index", n * c.k + k);
    }
  }

  if (c.labelled && c.n > 2) labels[1] = 0;  // the gradient of a sample that is NaN is of no interest
  Array grad_out(c.type, c.n * c.k), grad_pooled(c.type, c.n * c.k), grad_x(c.x_type, x.size);
  Array grad_gate(c.type, c.rows * c.k);
  grad_out.fill_random(generator, 0.5, 1.5);
  grad_pooled.fill_random(generator, 0.5, 1.5);
  gated_pool_backward_cpu(
      {grad_out.data(), grad_pooled.data(), pooled.data(), c.pool == Pool::Max ? index.data() : nullptr, c.pool, c.n,
       c.k, c.s, rows, grad_x.data(), c.x_type, stride_n, stride_k, stride_s, grad_gate.data()},
      two_threads);

  Array shared(c.x_type, c.n * c.k);  // one value for all positions
  if (c.pool == Pool::Avg)
    gated_pool_backward_cpu({grad_out.data(), grad_pooled.data(), pooled.data(), nullptr, c.pool, c.n, c.k, c.s, rows,
                             shared.data(), c.x_type, c.k, 1, 0, nullptr},
                            two_threads);

  for (int64_t n = 0; n < c.n; ++n) {
    for (int64_t k = 0; k < c.k; ++k) {
      const double d = row_value(n, k) * grad_out.get(n * c.k + k) + grad_pooled.get(n * c.k + k);
      for (int64_t s = 0; s < c.s; ++s) {
        const double want = c.pool == Pool::Avg ? d / double(c.s) : s == index[n * c.k + k] ? d : 0;
        const double scale = (std::abs(d) + 2) / (c.pool == Pool::Avg ? double(c.s) : 1.0);
        const double tiny = c.x_type == ScalarType::Float16 ? 0x1p-25 : 0;  // subnormal halves round to 2^-24
        expect(grad_x.get(at(n, k, s)), want, (2 * roundoff(c.x_type) + sums) * scale + tiny, what + ": grad_x",
               at(n, k, s));
        if (c.pool == Pool::Avg)
          expect(shared.get(n * c.k + k), grad_x.get(at(n, k, s)), 0, what + ": shared grad_x", at(n, k, s));
      }
    }
  }
  for (int64_t k = 0; k < c.k; ++k) {
    // d loss / d (row of the gate), then through the projection: each entry is g / top where that lies in [0, 1].
    std::vector<double> grad(c.rows, 0.0), size(c.rows, 0.0);
    for (int64_t n = 0; n < c.n; ++n) {
      const double term = grad_out.get(n * c.k + k) * pooled.get(n * c.k + k);
      grad[row_of(n)] += term;
      size[row_of(n)] += std::abs(term);
    }
    double total = 0;
    for (const double v : size) total += v;
    if (c.project) {
      const double top = col_max.get(k);
      double to_top = 0;
      for (int64_t r = 0; r < c.rows; ++r) {
        const double g = gate.get(r * c.k + k);
        if (!(top > 0) || g < 0) {
          grad[r] = 0;
          continue;
        }
        to_top -= grad[r] * g / (top * top);
        grad[r] /= top;
      }
      if (top > 0) grad[col_arg[k]] += to_top, total /= top;
    }
    for (int64_t r = 0; r < c.rows; ++r)
      expect(grad_gate.get(r * c.k + k), grad[r], unit * std::abs(grad[r]) + 2 * sums * total + 1e-30,
             what + ": grad_gate", r * c.k + k);
  }
}

void test_gate_step(ScalarType type, Projection projection, bool nesterov, bool first_step, int64_t c, int64_t k) {
  const std::string what = std::string("gate_step ") + name(type) +
                           (projection == Projection::Scale ? ", scale" : ", euclidean") +
                           (nesterov ? ", nesterov" : "") + (first_step ? ", first step" : "");
  Array gate(type, c * k), grad(type, c * k), buffer(type, c * k);
  gate.fill_random(generator, -0.2, 1);
  grad.fill_random(generator, -1, 1);
  buffer.fill_random(generator, -1, 1);
  const double lr = 0.125, momentum = 0.75, dampening = 0.25, decay = 0.0625;  // exact in every type
  std::vector<double> stepped(c * k), velocity(c * k);
  for (int64_t i = 0; i < c * k; ++i) {
    const double d = grad.get(i) + decay * gate.get(i);
    velocity[i] = first_step ? d : momentum * buffer.get(i) + (1 - dampening) * d;
    stepped[i] = gate.get(i) - lr * (nesterov ? d + momentum * velocity[i] : velocity[i]);
  }
  gate_step_cpu({gate.data(), grad.data(), buffer.data(), type, c, k, lr, momentum, dampening, decay, nesterov,
                 first_step, projection},
                two_threads);
  // The maximum is taken in the accumulator, half types in fp32; equal entries: the first one wins.
  std::vector<double> exact(stepped);
  if (type != ScalarType::Float64)
    for (double& v : exact) v = double(float(v));
  const double unit = roundoff(type), tolerance = 4 * unit;
  for (int64_t j = 0; j < k; ++j) {
    int64_t best = 0;
    for (int64_t i = 1; i < c; ++i)
      if (exact[i * k + j] > exact[best * k + j]) best = i;
    const double top = exact[best * k + j];
    for (int64_t i = 0; i < c; ++i) {
      const int64_t at = i * k + j;
      const double want = projection == Projection::Scale ? projected(stepped[at], top, i == best)
                          : i == best                     ? 1
                                                          : std::clamp(stepped[at], 0.0, 1.0);
      expect(buffer.get(at), velocity[at], 4 * unit, what + ": buffer", at);
      const double conditioning = projection == Projection::Scale && top > 0 ? std::max(1.0, 2 / top) : 1;
      expect(gate.get(at), want, tolerance * conditioning, what + ": gate", at);
    }
  }
}

}  // namespace

int main() {
  using enum ScalarType;
  const std::pair<ScalarType, ScalarType> types[] = {{Float32, Float32},   {Float64, Float64}, {Float16, Float16},
                                                     {BFloat16, BFloat16}, {Float16, Float32}, {BFloat16, Float32}};
  struct Size {
    int64_t n, k, s;
  };
  const Size sizes[] = {{1, 1, 1},    {3, 5, 1},     {4, 70, 49},   {3, 72, 64},
                        {2, 300, 65}, {1, 2100, 35}, {5, 3, 12544}, {7, 33, 169}};
  for (const auto& [x_type, type] : types)
    for (const Size& size : sizes)
      for (const Pool pool : {Pool::Avg, Pool::Max})
        for (int flags = 0; flags < 8; ++flags) {
          const bool channels_last = flags & 1, labelled = flags & 2, project = flags & 4;
          if (!labelled && project) continue;  // weights come projected already
          test_gated_pool(
              {x_type, type, pool, channels_last, labelled, project, size.n, size.k, size.s, labelled ? 4 : size.n});
        }
  std::printf("gated_pool: %ld values checked, %d wrong\n", checked, failures);
  checked = 0;
  const int before = failures;
  for (const ScalarType type : {Float32, Float64, Float16, BFloat16})
    for (const Projection projection : {Projection::Scale, Projection::Euclidean})
      for (int flags = 0; flags < 4; ++flags) {
        test_gate_step(type, projection, flags & 1, flags & 2, 10, 135);
        test_gate_step(type, projection, flags & 1, flags & 2, 300, 331);  // in parts of the rows
      }
  std::printf("gate_step: %ld values checked, %d wrong\n", checked, failures - before);
  const char* levels[] = {"baseline", "AVX2", "AVX-512"};
  std::printf("instruction set: %s\n", levels[int(cpu_level())]);
  return failures == 0 ? 0 : 1;
}
