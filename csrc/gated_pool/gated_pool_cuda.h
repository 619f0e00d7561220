// Launchers of the CUDA kernels of gated_pool: plain types, so that a caller needs no CUDA header.
#pragma once

#include "gated_pool.h"

namespace csg {

// Both enqueue on `stream` (a cudaStream_t) of the current device and return a cudaError_t (0: launched).
int gated_pool_forward_cuda(const GatedPoolForward& p, void* stream);
int gated_pool_backward_cuda(const GatedPoolBackward& p, void* stream);

}  // namespace csg
