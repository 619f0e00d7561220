// The instruction-set level of the CPU kernels: detected once, lowered by CSG_EXT_CPU_LEVEL or set_cpu_level.
#include "cpu.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace csg {
namespace {

CpuLevel detect() {
#if CSG_X86
  __builtin_cpu_init();
  // Every processor with AVX2 has F16C; clang does not know the name here.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return CpuLevel::Avx512;
  if (avx2) return CpuLevel::Avx2;
#endif
  return CpuLevel::Baseline;
}

CpuLevel initial() {
  const CpuLevel best = cpu_level_available();
  const char* wish = std::getenv("CSG_EXT_CPU_LEVEL");  // NOLINT(concurrency-mt-unsafe): read once, set by nothing here
  if (wish == nullptr) return best;
  CpuLevel level = best;
  if (std::strcmp(wish, "baseline") == 0) level = CpuLevel::Baseline;
  if (std::strcmp(wish, "avx2") == 0) level = CpuLevel::Avx2;
  return level < best ? level : best;
}

std::atomic<int>& current() {
  static std::atomic<int> level{int(initial())};
  return level;
}

std::atomic<bool>& amd() {
#if CSG_X86
  __builtin_cpu_init();
  static std::atomic<bool> value{__builtin_cpu_is("amd") != 0};
#else
  static std::atomic<bool> value{false};
#endif
  return value;
}

}  // namespace

bool cpu_is_amd() { return amd().load(std::memory_order_relaxed); }

void set_cpu_is_amd(bool value) { amd().store(value, std::memory_order_relaxed); }

CpuLevel cpu_level_available() {
  static const CpuLevel best = detect();
  return best;
}

CpuLevel cpu_level() { return CpuLevel(current().load(std::memory_order_relaxed)); }

void set_cpu_level(CpuLevel level) {
  const CpuLevel best = cpu_level_available();
  current().store(int(level < best ? level : best), std::memory_order_relaxed);
}

}  // namespace csg
