// The four launchers with C names, for tests/test_cuda_on_cpu.py (ctypes).
#include "../../csrc/gate_step/gate_step_cuda.h"
#include "../../csrc/gated_pool/gated_pool_cuda.h"

extern "C" {
int csg_gated_pool_forward(const csg::GatedPoolForward* p) { return csg::gated_pool_forward_cuda(*p, nullptr); }
int csg_gated_pool_backward(const csg::GatedPoolBackward* p) { return csg::gated_pool_backward_cuda(*p, nullptr); }
int csg_gate_step(const csg::GateStep* p) { return csg::gate_step_cuda(*p, nullptr); }
int csg_column_max(const csg::ColumnMax* p) { return csg::column_max_cuda(*p, nullptr); }
// Sizes of the structs, so that the mirrors in Python can be compared.
int64_t csg_sizes[] = {sizeof(csg::GatedPoolForward), sizeof(csg::GatedPoolBackward), sizeof(csg::GateStep),
                       sizeof(csg::ColumnMax)};
}
