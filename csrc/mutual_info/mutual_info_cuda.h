// Launcher of the CUDA kernels of mutual_info: plain types, so that a caller needs no CUDA header.
#pragma once

#include "mutual_info.h"

namespace csg {

// Bytes of work memory that let mutual_info_cuda take a good number of features at a time. Returns a cudaError_t.
int mutual_info_cuda_bytes(const MutualInfo& p, int64_t* bytes);

// The first row whose label is outside [0, classes).
struct LabelOutside {
  int64_t row, label;  // row: -1 where there is none
};

// Enqueues everything on `stream` (a cudaStream_t) of the current device and returns a cudaError_t (0: launched). Waits
// once for the stream: what is launched depends on the sizes of the classes. With less work memory than
// mutual_info_cuda_bytes says it takes fewer features at a time, with the same results. Computes nothing if a label is
// outside.
int mutual_info_cuda(const MutualInfo& p, void* work, int64_t bytes, LabelOutside* outside, void* stream);

}  // namespace csg
