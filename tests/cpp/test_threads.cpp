// The CPU kernels run by several threads at once, each call split over threads of its own, on inputs that all share:
// every call must write the bits that it writes alone. Built with the thread sanitizer, it reports what they race for.
// `test_threads planted-race` gives two threads the same part of the work: the sanitizer must report that.
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "array.h"
#include "gate_step/gate_step_cpu.h"
#include "gated_pool/gated_pool_cpu.h"
#include "mutual_info/mutual_info_cpu.h"
#include "mutual_info/standard_normal_cpu.h"

namespace {

using namespace csg;

constexpr int kCallers = 4, kRounds = 3;
std::mt19937_64 generator(20262);

// Three parts, as threads of a pool take them.
void three_threads(int64_t total, int64_t, RangeBody body, void* context) {
  std::thread first(body, 0, total / 3, context), second(body, total / 3, 2 * total / 3, context);
  body(2 * total / 3, total, context);
  first.join();
  second.join();
}
void same_part_twice(int64_t total, int64_t, RangeBody body, void* context) {
  std::thread other(body, 0, total, context);
  body(0, total, context);
  other.join();
}

using Bytes = std::vector<char>;
struct Call {
  std::string name;
  std::function<Bytes(ParallelFor)> run;  // allocates what it writes and returns it
};

template <typename T>
void append(Bytes& all, const std::vector<T>& values) {
  const char* bytes = reinterpret_cast<const char*>(values.data());
  all.insert(all.end(), bytes, bytes + values.size() * sizeof(T));
}

Array random_array(ScalarType type, int64_t size, double low, double high) {
  Array array(type, size);
  array.fill_random(generator, low, high);
  return array;
}

std::vector<int64_t> random_labels(int64_t n, int64_t classes) {
  std::vector<int64_t> labels(static_cast<size_t>(n));
  for (auto& label : labels) label = int64_t(generator() % uint64_t(classes));
  return labels;
}

Call gated_pool(ScalarType type, Pool pool, bool channels_last) {
  const int64_t n = 12, k = 192, s = 49, classes = 5;
  const int64_t stride_k = channels_last ? 1 : s, stride_s = channels_last ? k : 1;
  const auto run = [=, x = random_array(type, n * k * s, -1, 1), gate = random_array(type, classes * k, -0.5, 1),
                    grad = random_array(type, n * k, -1, 1),
                    labels = random_labels(n, classes)](ParallelFor parallel_for) mutable {
    Array col_max(type, k), out(type, n * k), pooled(type, n * k), grad_x(type, n * k * s),
        grad_gate(type, classes * k);
    std::vector<int64_t> col_arg(k), index(n * k);
    column_max_cpu({gate.data(), type, classes, k, col_max.data(), col_arg.data()}, parallel_for);
    const GateRows rows{gate.data(), type, classes, labels.data(), col_max.data(), col_arg.data()};
    gated_pool_forward_cpu(
        {x.data(), type, pool, n, k, s, k * s, stride_k, stride_s, rows, out.data(), pooled.data(), index.data()},
        parallel_for);
    gated_pool_backward_cpu({grad.data(), grad.data(), pooled.data(), index.data(), pool, n, k, s, rows, grad_x.data(),
                             type, k * s, stride_k, stride_s, grad_gate.data()},
                            parallel_for);
    Bytes all;
    for (const Array* array : {&col_max, &out, &pooled, &grad_x, &grad_gate}) append(all, array->bytes);
    append(all, col_arg);
    append(all, index);
    return all;
  };
  return {std::string("gated_pool ") + name(type) + (pool == Pool::Avg ? " avg" : " max") +
              (channels_last ? " channels last" : " rows"),
          run};
}

Call gate_step(ScalarType type, Projection projection) {
  const int64_t c = 50, k = 3000;
  const auto run = [=, start = random_array(type, c * k, -0.2, 1), grad = random_array(type, c * k, -1, 1),
                    velocity = random_array(type, c * k, -1, 1)](ParallelFor parallel_for) mutable {
    Array gate = start, buffer = velocity;
    gate_step_cpu({gate.data(), grad.data(), buffer.data(), type, c, k, 0.1, 0.9, 0, 1e-4, true, false, projection},
                  parallel_for);
    Bytes all = gate.bytes;
    append(all, buffer.bytes);
    return all;
  };
  return {std::string("gate_step ") + name(type) + (projection == Projection::Scale ? " scale" : " euclidean"), run};
}

Call mutual_info(Ties ties, bool multiclass) {
  const int64_t n = 150, k = 25, classes = 4;
  std::vector<int64_t> psi(size_t(n + 1));
  for (int64_t i = 1; i <= n; ++i) psi[size_t(i)] = int64_t(double(i) * 0x1p20);  // any numbers do
  const auto run = [=, x = random_array(ScalarType::Float32, n * k, 0, 1),
                    noise = random_array(ScalarType::Float64, n * k, -1, 1),
                    labels = random_labels(n, classes)](ParallelFor parallel_for) mutable {
    std::vector<double> out(size_t(k * classes));
    const LabelledFeatures features{x.data(), ScalarType::Float32, n, k, k, 1, labels.data(), classes};
    mutual_info_cpu({features, 3, ties, ties == Ties::Noise ? noise.as<double>() : nullptr, k, 1, multiclass,
                     psi.data(), 20, out.data()},
                    parallel_for);
    Bytes all;
    append(all, out);
    binned_mutual_info_cpu({features, 16, out.data()}, parallel_for);
    append(all, out);
    return all;
  };
  return {std::string("mutual_info ") + (ties == Ties::Noise ? "noise" : "exact") + (multiclass ? " multiclass" : ""),
          run};
}

Call standard_normal() {
  return {"standard_normal", [](ParallelFor parallel_for) {
            NormalState state{{1, 2, 3}, 624, false, 0};
            std::vector<double> out(size_t(2000) * 7);
            standard_normal_cpu(state, 2000, 9, 1, 8, out.data(), parallel_for);
            Bytes all;
            append(all, out);
            append(all, std::vector<uint32_t>(state.key, state.key + 624));
            return all;
          }};
}

std::vector<Call> make_calls() {
  std::vector<Call> calls;
  for (const ScalarType type : {ScalarType::Float32, ScalarType::Float64, ScalarType::Float16, ScalarType::BFloat16}) {
    for (const Pool pool : {Pool::Avg, Pool::Max})
      for (const bool channels_last : {false, true}) calls.push_back(gated_pool(type, pool, channels_last));
    for (const Projection projection : {Projection::Scale, Projection::Euclidean})
      calls.push_back(gate_step(type, projection));
  }
  for (const Ties ties : {Ties::Noise, Ties::Exact})
    for (const bool multiclass : {false, true}) calls.push_back(mutual_info(ties, multiclass));
  calls.push_back(standard_normal());
  return calls;
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::string_view(arguments[1]) == "planted-race") {
    gated_pool(ScalarType::Float32, Pool::Avg, false).run(same_part_twice);
    return 0;
  }
  const std::vector<Call> calls = make_calls();
  std::vector<Bytes> alone;
  alone.reserve(calls.size());
  for (const Call& call : calls)
    alone.push_back(call.run([](int64_t total, int64_t, RangeBody body, void* context) { body(0, total, context); }));

  // Each caller begins elsewhere, so that different operators and the same one on the same inputs meet.
  std::vector<int> wrong(kCallers);
  std::vector<std::thread> callers;
  callers.reserve(kCallers);
  for (int caller = 0; caller < kCallers; ++caller)
    callers.emplace_back([&, caller] {
      for (size_t i = 0; i < kRounds * calls.size(); ++i) {
        const size_t at = (i + size_t(caller) * calls.size() / kCallers) % calls.size();
        if (calls[at].run(three_threads) == alone[at]) continue;
        if (++wrong[size_t(caller)] <= 5) std::printf("FAILED %s: other bits than alone\n", calls[at].name.c_str());
      }
    });
  int failures = 0;
  for (int caller = 0; caller < kCallers; ++caller) {
    callers[size_t(caller)].join();
    failures += wrong[size_t(caller)];
  }
  std::printf("%zu calls by each of %d threads, %d wrong\n", kRounds * calls.size(), kCallers, failures);
  return failures != 0;
}
