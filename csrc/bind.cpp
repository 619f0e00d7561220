// The Python module csg_ext._bind (pybind11, no torch): what was built, and what this processor can do.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "build_facts.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace py = pybind11;

namespace {

constexpr std::pair<const char*, const char*> kBuildFacts[] = {CSG_BUILD_FACTS};

py::dict build_info() {
  py::dict facts;
  for (const auto& [key, value] : kBuildFacts) facts[key] = value;
  return facts;
}

#if defined(__x86_64__)

enum Register { Eax, Ebx, Ecx, Edx };

struct Feature {
  const char* name;
  uint32_t leaf, subleaf;
  Register reg;
  int bit;
  uint64_t state;  // what the operating system must save on a context switch (bits of XCR0)
};

constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;

constexpr Feature kFeatures[] = {
    {"avx", 1, 0, Ecx, 28, kYmm},         {"f16c", 1, 0, Ecx, 29, kYmm},       {"fma", 1, 0, Ecx, 12, kYmm},
    {"avx2", 7, 0, Ebx, 5, kYmm},         {"bmi2", 7, 0, Ebx, 8, 0},           {"avx512f", 7, 0, Ebx, 16, kZmm},
    {"avx512dq", 7, 0, Ebx, 17, kZmm},    {"avx512bw", 7, 0, Ebx, 30, kZmm},   {"avx512vl", 7, 0, Ebx, 31, kZmm},
    {"avx512_vnni", 7, 0, Ecx, 11, kZmm}, {"avx512_bf16", 7, 1, Eax, 5, kZmm}, {"avx512_fp16", 7, 0, Edx, 23, kZmm},
    {"amx_tile", 7, 0, Edx, 24, kTiles},  {"amx_int8", 7, 0, Edx, 25, kTiles}, {"amx_bf16", 7, 0, Edx, 22, kTiles},
};

uint64_t saved_state() {
  uint32_t regs[4] = {};
  if (!__get_cpuid(1, &regs[Eax], &regs[Ebx], &regs[Ecx], &regs[Edx])) return 0;
  if (!(regs[Ecx] >> 27 & 1)) return 0;  // OSXSAVE: xgetbv exists
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

py::dict cpu_features() {
  py::dict found;
  const uint64_t saved = saved_state();
  for (const Feature& f : kFeatures) {
    uint32_t regs[4] = {};
    const bool known = __get_cpuid_count(f.leaf, f.subleaf, &regs[Eax], &regs[Ebx], &regs[Ecx], &regs[Edx]);
    found[f.name] = known && (regs[f.reg] >> f.bit & 1) && (saved & f.state) == f.state;
  }
  return found;
}

#elif defined(__aarch64__) && defined(__linux__)

py::dict cpu_features() {
  const unsigned long hwcap = getauxval(AT_HWCAP), hwcap2 = getauxval(AT_HWCAP2);
  py::dict found;
  found["neon"] = bool(hwcap >> 1 & 1);    // HWCAP_ASIMD
  found["sve"] = bool(hwcap >> 22 & 1);    // HWCAP_SVE
  found["bf16"] = bool(hwcap2 >> 14 & 1);  // HWCAP2_BF16
  return found;
}

#else

py::dict cpu_features() { return {}; }

#endif

}  // namespace

PYBIND11_MODULE(_bind, m) {
  m.doc() = "Build facts and processor features of csg_ext.";
  m.def("build_info", &build_info, "Versions, architectures, compiler and flags of this build: dict[str, str].");
  m.def("cpu_features", &cpu_features, "Instruction-set extensions usable on this machine: dict[str, bool].");
}
