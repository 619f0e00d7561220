#include "cuda_status.h"

#include "cuda_launch.cuh"

namespace csg {

int cuda_status() {
  size_t available = 0, total = 0;
  return forget_last_error(cudaMemGetInfo(&available, &total));  // allowed while a graph is captured
}

}  // namespace csg
