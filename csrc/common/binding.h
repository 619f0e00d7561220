// What the bindings share: checks, allocation and types over torch's stable ABI. Only <op>.cpp files include it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#ifdef CSG_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cpu.h"
#ifdef CSG_CUDA
#include "cuda_status.h"
#endif
#include "types.h"

namespace csg {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::Tensor;
using TorchType = torch::headeronly::ScalarType;

// Throws one sentence. Not STD_TORCH_CHECK: that puts a file and a line in front of it.
template <typename... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (condition) [[likely]]
    return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// Parts of a sentence, written only where a check fails: every call makes some twenty of them.
struct ShapeOf {
  const Tensor& t;
};
inline std::ostream& operator<<(std::ostream& text, ShapeOf shape) {
  const Tensor& t = shape.t;
  text << "(";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  return text << (t.dim() == 1 ? ",)" : ")");
}
inline ShapeOf shape_of(const Tensor& t) { return {t}; }

inline const char* name_of(TorchType type) {
  switch (type) {
    case TorchType::Float:
      return "float32";
    case TorchType::Double:
      return "float64";
    case TorchType::Half:
      return "float16";
    case TorchType::BFloat16:
      return "bfloat16";
    case TorchType::Long:
      return "int64";
    case TorchType::Int:
      return "int32";
    case TorchType::Short:
      return "int16";
    case TorchType::Char:
      return "int8";
    case TorchType::Byte:
      return "uint8";
    case TorchType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

inline ScalarType floating_type(TorchType type, const char* op, const char* argument) {
  switch (type) {
    case TorchType::Float:
      return ScalarType::Float32;
    case TorchType::Double:
      return ScalarType::Float64;
    case TorchType::Half:
      return ScalarType::Float16;
    case TorchType::BFloat16:
      return ScalarType::BFloat16;
    default:
      check(false, op, ": ", argument, " must be float32, float64, float16 or bfloat16, got ", name_of(type));
      return ScalarType::Float32;
  }
}
inline ScalarType floating_type(const Tensor& t, const char* op, const char* argument) {
  return floating_type(t.scalar_type(), op, argument);
}

struct DeviceOf {
  const Tensor& t;
};
inline std::ostream& operator<<(std::ostream& text, DeviceOf device) {
  if (device.t.is_cpu()) return text << "cpu";
  return device.t.is_cuda() ? text << "cuda:" << device.t.get_device_index() : text << "another device";
}

inline void check_same_device(const Tensor& t, const Tensor& x, const char* op, const char* argument) {
  const bool same = t.is_cuda() == x.is_cuda() && t.is_cpu() == x.is_cpu() &&
                    (!t.is_cuda() || t.get_device_index() == x.get_device_index());
  check(same, op, ": ", argument, " must be on the device of the other tensors, ", DeviceOf{x}, ", got ", DeviceOf{t});
}

// torch's own text stays on its side of the ABI.
inline void check_memory(bool allocated, const int64_t* sizes, int64_t dim, TorchType type, const Tensor& like) {
  if (allocated) [[likely]]
    return;
#ifdef CSG_CUDA
  // A kernel that failed is often noticed by the next allocation.
  const int status = cuda_status();
  check(status == 0, "the GPU reports an error of earlier work (cudaError ", status, ")");
#endif
  std::ostringstream shape;
  for (int64_t i = 0; i < dim; ++i) shape << (i ? " x " : "") << sizes[i];
  check(false, "out of memory: a tensor of ", shape.str(), " values of ", name_of(type), " cannot be allocated on ",
        DeviceOf{like});
}

inline Tensor dense(const Tensor& t) {
  if (t.is_contiguous()) return t;
  try {
    return torch::stable::contiguous(t);
  } catch (const std::exception&) {
    check_memory(false, t.sizes().data(), t.dim(), t.scalar_type(), t);
    throw;
  }
}

inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, TorchType type,
                            const Tensor& like) {
  int32_t device_type = 0, device_index = 0, dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  switch (type) {
    case TorchType::Float:
      dtype = aoti_torch_dtype_float32();
      break;
    case TorchType::Double:
      dtype = aoti_torch_dtype_float64();
      break;
    case TorchType::Half:
      dtype = aoti_torch_dtype_float16();
      break;
    case TorchType::BFloat16:
      dtype = aoti_torch_dtype_bfloat16();
      break;
    case TorchType::Long:
      dtype = aoti_torch_dtype_int64();
      break;
    default:
      check(false, "csg_ext: a new tensor must be of a floating dtype or int64, got ", name_of(type));
  }
  AtenTensorHandle handle = nullptr;
  const auto code = aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, &handle);
  check_memory(code == AOTI_TORCH_SUCCESS, sizes, dim, type, like);
  return Tensor(handle);
}

inline Tensor empty_matrix(int64_t rows, int64_t columns, TorchType type, const Tensor& like) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {columns > 1 ? columns : 1, 1};
  return empty_strided(sizes, strides, 2, type, like);
}

inline Tensor empty_vector(int64_t size, TorchType type, const Tensor& like) {
  const int64_t sizes[1] = {size}, strides[1] = {1};
  return empty_strided(sizes, strides, 1, type, like);
}

template <typename T = void>
const T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

#ifdef CSG_CUDA
// Makes the tensor's device current for the scope and gives its current stream.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline void check_launch(int error, const char* op) {
  check(error == 0, op, ": the CUDA kernel could not be launched (cudaError ", error, ")");
}
#else
inline void torch_threads(int64_t total, int64_t grain, RangeBody body, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, total, grain, body, context));
}
#endif

}  // namespace csg
