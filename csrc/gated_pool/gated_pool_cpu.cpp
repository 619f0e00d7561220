// gated_pool on the CPU: the kernels of gated_pool_cpu.inl compiled for three instruction sets, chosen at run time.
#include "gated_pool_cpu.h"

#include "../common/half.h"
#include "../common/projection.h"

#define CSG_KERNELS "../gated_pool/gated_pool_cpu.inl"
#include "../common/cpu_levels.h"

namespace csg {

void gated_pool_forward_cpu(const GatedPoolForward& p, ParallelFor parallel_for) {
#if CSG_X86
  // Rows begin anywhere: a 64-byte load crosses a cache line nearly every time, a 32-byte one every other time. Short
  // rows are summed up to 20 % faster so; longer ones, and bf16 (two values to a lane), are not.
  const bool narrow = p.x_type != ScalarType::BFloat16;
  const bool short_rows = p.pool == Pool::Avg && p.stride_k != 1 && p.s < 256 && narrow;
  if (short_rows && cpu_level() == CpuLevel::Avx512) return avx2::gated_pool_forward(p, parallel_for);
#endif
  CSG_CALL_LEVEL(gated_pool_forward, p, parallel_for);
}
void gated_pool_backward_cpu(const GatedPoolBackward& p, ParallelFor parallel_for) {
  CSG_CALL_LEVEL(gated_pool_backward, p, parallel_for);
}

}  // namespace csg
