// The state of the current GPU, for messages. Host interface without CUDA types.
#pragma once

namespace csg {

// The error (a cudaError_t) that earlier work left the current device in, or 0.
int cuda_status();

}  // namespace csg
