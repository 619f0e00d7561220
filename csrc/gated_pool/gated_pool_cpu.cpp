// gated_pool on the CPU: the kernels of gated_pool_cpu.inl compiled for three instruction sets, chosen at run time.
#include "gated_pool_cpu.h"

#include "../common/half.h"
#include "../common/projection.h"

#define CSG_KERNELS "../gated_pool/gated_pool_cpu.inl"
#include "../common/cpu_levels.h"

namespace csg {

void gated_pool_forward_cpu(const GatedPoolForward& p, ParallelFor parallel_for) {
  CSG_CALL_LEVEL(gated_pool_forward, p, parallel_for);
}
void gated_pool_backward_cpu(const GatedPoolBackward& p, ParallelFor parallel_for) {
  CSG_CALL_LEVEL(gated_pool_backward, p, parallel_for);
}

}  // namespace csg
