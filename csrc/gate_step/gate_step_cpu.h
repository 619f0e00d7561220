// gate_step on the CPU: entry points of the kernels, without torch.
#pragma once

#include "../common/cpu.h"
#include "gate_step.h"

namespace csg {

void gate_step_cpu(const GateStep& p, ParallelFor parallel_for);
void column_max_cpu(const ColumnMax& p, ParallelFor parallel_for);

}  // namespace csg
