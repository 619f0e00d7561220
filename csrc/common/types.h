// Types shared by every kernel, host and device: no torch, no CUDA.
#pragma once

#include <cstdint>

namespace csg {

enum class ScalarType : int8_t { Float32, Float64, Float16, BFloat16 };

}  // namespace csg
