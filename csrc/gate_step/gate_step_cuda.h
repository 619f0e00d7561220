// Launchers of the CUDA kernels of gate_step: plain types, so that a caller needs no CUDA header.
#pragma once

#include "gate_step.h"

namespace csg {

// Both enqueue one launch on `stream` (a cudaStream_t) of the current device and return a cudaError_t (0: launched).
int gate_step_cuda(const GateStep& p, void* stream);
int column_max_cuda(const ColumnMax& p, void* stream);

}  // namespace csg
