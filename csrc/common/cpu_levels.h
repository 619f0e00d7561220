// Compiles the file named by CSG_KERNELS once per instruction set, each in a namespace of its own: include last.
//   #define CSG_KERNELS "gated_pool_cpu.inl"
//   #include "../common/cpu_levels.h"
//   ... CSG_CALL_LEVEL(gated_pool_forward, p, parallel_for);
#include <cstddef>
#include <type_traits>
#include <utility>

#if CSG_X86
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"                // vectors never cross a call: everything is inlined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc's own _mm512_undefined_* (GCC bug 105593)
#endif

namespace csg {
namespace baseline {
#define CSG_WIDTH 16
#define CSG_LEVEL 0
#include "simd.inl"
#include CSG_KERNELS
#undef CSG_WIDTH
#undef CSG_LEVEL
}  // namespace baseline

#if CSG_X86
CSG_TARGET_BEGIN(CSG_ISA_AVX2)
namespace avx2 {
#define CSG_WIDTH 32
#define CSG_LEVEL 1
#include "simd.inl"
#include CSG_KERNELS
#undef CSG_WIDTH
#undef CSG_LEVEL
}  // namespace avx2
CSG_TARGET_END

CSG_TARGET_BEGIN(CSG_ISA_AVX512)
namespace avx512 {
#define CSG_WIDTH 64
#define CSG_LEVEL 2
#include "simd.inl"
#include CSG_KERNELS
#undef CSG_WIDTH
#undef CSG_LEVEL
}  // namespace avx512
CSG_TARGET_END
#endif
}  // namespace csg

#if CSG_X86
#define CSG_CALL_LEVEL(f, ...)                                                   \
  (::csg::cpu_level() == ::csg::CpuLevel::Avx512 ? ::csg::avx512::f(__VA_ARGS__) \
   : ::csg::cpu_level() == ::csg::CpuLevel::Avx2 ? ::csg::avx2::f(__VA_ARGS__)   \
                                                 : ::csg::baseline::f(__VA_ARGS__))
#else
#define CSG_CALL_LEVEL(f, ...) ::csg::baseline::f(__VA_ARGS__)
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
