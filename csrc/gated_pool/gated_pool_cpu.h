// gated_pool on the CPU: entry points of the kernels, without torch.
#pragma once

#include "../common/cpu.h"
#include "gated_pool.h"

namespace csg {

void gated_pool_forward_cpu(const GatedPoolForward& p, ParallelFor parallel_for);
void gated_pool_backward_cpu(const GatedPoolBackward& p, ParallelFor parallel_for);

}  // namespace csg
