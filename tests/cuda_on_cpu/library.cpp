// The launchers with C names, for tests/stand_in.py (ctypes).
#include "../../csrc/gate_step/gate_step_cuda.h"
#include "../../csrc/gated_pool/gated_pool_cuda.h"
#include "../../csrc/mutual_info/mutual_info_cuda.h"

extern "C" {
int csg_gated_pool_forward(const csg::GatedPoolForward* p) { return csg::gated_pool_forward_cuda(*p, nullptr); }
int csg_gated_pool_backward(const csg::GatedPoolBackward* p) { return csg::gated_pool_backward_cuda(*p, nullptr); }
int csg_gate_step(const csg::GateStep* p) { return csg::gate_step_cuda(*p, nullptr); }
int csg_column_max(const csg::ColumnMax* p) { return csg::column_max_cuda(*p, nullptr); }
int csg_mutual_info_bytes(const csg::MutualInfo* p, int64_t* bytes) { return csg::mutual_info_cuda_bytes(*p, bytes); }
int csg_mutual_info(const csg::MutualInfo* p, void* work, int64_t bytes, csg::LabelOutside* outside) {
  return csg::mutual_info_cuda(*p, work, bytes, outside, nullptr);
}
// Sizes of the structs, so that the mirrors in Python can be compared.
int64_t csg_sizes[] = {sizeof(csg::GatedPoolForward), sizeof(csg::GatedPoolBackward), sizeof(csg::GateStep),
                       sizeof(csg::ColumnMax), sizeof(csg::MutualInfo)};
}
