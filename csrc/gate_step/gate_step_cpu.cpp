// gate_step on the CPU: the kernels of gate_step_cpu.inl compiled for three instruction sets, chosen at run time.
#include "gate_step_cpu.h"

#include "../common/half.h"

#define CSG_KERNELS "../gate_step/gate_step_cpu.inl"
#include "../common/cpu_levels.h"

namespace csg {

void gate_step_cpu(const GateStep& p, ParallelFor parallel_for) { CSG_CALL_LEVEL(gate_step, p, parallel_for); }
void column_max_cpu(const ColumnMax& p, ParallelFor parallel_for) { CSG_CALL_LEVEL(column_max, p, parallel_for); }

}  // namespace csg
