// What CPU kernels share: the instruction-set levels they are compiled for and the choice made at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace csg {

enum class CpuLevel : int { Baseline = 0, Avx2 = 1, Avx512 = 2 };

CpuLevel cpu_level_available();      // the best that this processor runs
CpuLevel cpu_level();                // the one in use: available, unless CSG_EXT_CPU_LEVEL or set_cpu_level lowered it
void set_cpu_level(CpuLevel level);  // at most the available one

bool cpu_is_amd();                // whose processors want other data fetched ahead; it changes no result
void set_cpu_is_amd(bool value);  // for tests

// How a kernel runs its ranges: body(begin, end, context) over [0, total) in parts of at least `grain`.
// The binding passes torch's own thread pool; tests pass a plain loop or threads.
using RangeBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t total, int64_t grain, RangeBody body, void* context);

template <typename F>
void parallel_ranges(ParallelFor parallel_for, int64_t total, int64_t grain, F&& body) {
  if (total <= 0) return;
  if (total <= grain) return body(int64_t(0), total);
  parallel_for(
      total, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); }, &body);
}

// Memory for sums in fp32 beside a half-type result. Here, not in the kernels: no library template is instantiated
// there.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(new char[size_t(bytes)]) {}
  void* get() const { return bytes_.get(); }

 private:
  std::unique_ptr<char[]> bytes_;
};

}  // namespace csg

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define CSG_X86 1
#else
#define CSG_X86 0
#endif

// Functions defined between CSG_TARGET_BEGIN(...) and CSG_TARGET_END may use these instructions.
#define CSG_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define CSG_TARGET_BEGIN(isa) CSG_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define CSG_TARGET_END CSG_PRAGMA(clang attribute pop)
#else
#define CSG_TARGET_BEGIN(isa) CSG_PRAGMA(GCC push_options) CSG_PRAGMA(GCC target(isa))
#define CSG_TARGET_END CSG_PRAGMA(GCC pop_options)
#endif
#define CSG_ISA_AVX2 "avx,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt"
#define CSG_ISA_AVX512 "avx,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512dq,avx512vl"
#define CSG_INLINE static inline __attribute__((always_inline))
#define CSG_MEMBER inline __attribute__((always_inline))
