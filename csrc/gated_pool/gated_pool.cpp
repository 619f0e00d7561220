// gated_pool for torch: checks, allocation and registration. Compiled twice: for the CPU, and with CSG_CUDA for CUDA.
#include "gated_pool.h"

#include <tuple>
#include <vector>

#include "../common/binding.h"
#ifdef CSG_CUDA
#include "gated_pool_cuda.h"
#else
#include "gated_pool_cpu.h"
#endif

namespace csg {
namespace {

constexpr const char* kOp = "gated_pool";
enum Layout : int64_t { kRows, kChannelsLast, kShared };  // of the gradient of x

// x as [N, K, S] with one stride for the flattened positions; false where no such stride exists.
struct Map {
  int64_t n, k, s, stride_n, stride_k, stride_s;
};
bool flatten(const Tensor& x, Map* m) {
  const auto size = x.sizes(), stride = x.strides();
  *m = {size[0], size[1], 1, stride[0], stride[1], 1};
  bool flat = true;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (size[d] == 1) continue;
    if (m->s == 1) {
      m->stride_s = stride[d];
    } else {
      flat = flat && stride[d] == m->s * m->stride_s;
    }
    m->s *= size[d];
  }
  if (m->s == 1) m->stride_s = 1;
  if (m->k == 1) m->stride_k = m->stride_s == 1 ? m->s : 1;
  return flat && (m->stride_s == 1 || m->stride_k == 1);
}

Pool pool_of(int64_t pool) {
  check(pool == 0 || pool == 1, kOp, ": pool must be 0 (avg) or 1 (max), got ", pool);
  return Pool(int8_t(pool));
}

// The gate's part of the parameters, checked; the tensors must outlive it.
GateRows gate_rows(const Tensor& gate, const std::optional<Tensor>& labels, const std::optional<Tensor>& col_max,
                   const std::optional<Tensor>& col_arg, const Tensor& x, int64_t n, int64_t k) {
  check_same_device(gate, x, kOp, "gate");
  check(gate.dim() == 2, kOp, ": gate must have the shape (C, K), got ", shape_of(gate));
  check(gate.size(1) == k, kOp, ": gate must have a column for each of the K = ", k, " channels, got the shape ",
        shape_of(gate));
  GateRows g{gate.data_ptr(), floating_type(gate, kOp, "gate"), gate.size(0), nullptr, nullptr, nullptr};
  if (labels) {
    check_same_device(*labels, x, kOp, "labels");
    check(labels->scalar_type() == TorchType::Long, kOp, ": labels must be int64 class indices (or floating-point ",
          "weights), got ", name_of(labels->scalar_type()));
    check(labels->dim() == 1 && labels->size(0) == n, kOp, ": labels must have the shape (N,) = (", n,
          ",), or be floating-point rows (N, C), got int64 of ", shape_of(*labels));
    g.labels = static_cast<const int64_t*>(labels->data_ptr());
#ifndef CSG_CUDA
    for (int64_t i = 0; i < n; ++i)
      check(g.labels[i] >= 0 && g.labels[i] < g.rows, kOp, ": labels[", i, "] = ", g.labels[i], " is outside [0, ",
            g.rows, ")");
#endif
  } else {
    check(gate.size(0) == n, kOp, ": without labels gate must have a row for each sample, got ", shape_of(gate),
          " for N = ", n);
  }
  check(col_max.has_value() == col_arg.has_value(), kOp, ": col_max and col_arg come together");
  if (col_max && col_arg) {
    check(col_max->dim() == 1 && col_max->size(0) == k && col_max->scalar_type() == gate.scalar_type() &&
              col_max->is_contiguous() && col_arg->dim() == 1 && col_arg->size(0) == k &&
              col_arg->scalar_type() == TorchType::Long && col_arg->is_contiguous(),
          kOp, ": col_max and col_arg must be what column_max(gate) returns");
    check_same_device(*col_max, x, kOp, "col_max");
    check_same_device(*col_arg, x, kOp, "col_arg");
    g.col_max = col_max->data_ptr();
    g.col_arg = static_cast<const int64_t*>(col_arg->data_ptr());
  }
  return g;
}

void check_types(ScalarType x, const Tensor& gate) {
  const ScalarType g = floating_type(gate, kOp, "gate");
  const bool half = x == ScalarType::Float16 || x == ScalarType::BFloat16;
  check(g == x || (half && g == ScalarType::Float32), kOp, ": gate must have the dtype of x, or be float32 with half x",
        ", got ", name_of(gate.scalar_type()));
}

std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(csg::dense(*t)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor> gated_pool(Tensor x, Tensor gate, std::optional<Tensor> labels,
                                              std::optional<Tensor> col_max, std::optional<Tensor> col_arg,
                                              int64_t pool) {
  check(x.dim() >= 2, kOp, ": x must have the shape (N, K, *spatial), got ", shape_of(x));
  GatedPoolForward p{};
  p.x_type = floating_type(x, kOp, "x");
  p.pool = pool_of(pool);
  check_types(p.x_type, gate);
  Map m{};
  if (!flatten(x, &m)) {
    x = csg::dense(x);
    flatten(x, &m);
  }
  check(m.s > 0, kOp, ": x must have at least one spatial position to pool, got the shape ", shape_of(x));
  gate = csg::dense(gate);
  labels = dense(labels);
  p.n = m.n, p.k = m.k, p.s = m.s;
  p.stride_n = m.stride_n, p.stride_k = m.stride_k, p.stride_s = m.stride_s;
  p.rows = gate_rows(gate, labels, col_max, col_arg, x, m.n, m.k);
#ifdef CSG_CUDA
  const CudaScope scope(x);
#endif
  const TorchType type = gate.scalar_type();
  Tensor out = empty_matrix(m.n, m.k, type, x), pooled = empty_matrix(m.n, m.k, type, x);
  Tensor index = p.pool == Pool::Max ? empty_matrix(m.n, m.k, TorchType::Long, x) : empty_vector(0, TorchType::Long, x);
  if (m.n > 0 && m.k > 0) {
    p.x = x.data_ptr();
    p.out = out.data_ptr();
    p.pooled = pooled.data_ptr();
    p.index = p.pool == Pool::Max ? static_cast<int64_t*>(index.data_ptr()) : nullptr;
#ifdef CSG_CUDA
    check_launch(gated_pool_forward_cuda(p, scope.stream()), kOp);
#else
    gated_pool_forward_cpu(p, torch_threads);
#endif
  }
  return {out, pooled, index};
}

#ifndef CSG_CUDA
void check_index(const Tensor& index, int64_t positions) {
  const auto* at = static_cast<const int64_t*>(index.data_ptr());
  bool inside = true;
  for (int64_t i = 0; i < index.numel(); ++i) inside &= uint64_t(at[i]) < uint64_t(positions);
  check(inside, kOp, ": index must hold positions in [0, ", positions, "), got one outside");
}
#endif

std::tuple<Tensor, Tensor> gated_pool_backward(std::optional<Tensor> grad_out, std::optional<Tensor> grad_pooled,
                                               Tensor pooled, Tensor index, Tensor gate, std::optional<Tensor> labels,
                                               std::optional<Tensor> col_max, std::optional<Tensor> col_arg,
                                               std::vector<int64_t> spatial, int64_t layout, TorchType x_type,
                                               int64_t pool, bool need_x, bool need_gate) {
  check(pooled.dim() == 2, kOp, ": pooled must have the shape (N, K), got ", shape_of(pooled));
  GatedPoolBackward p{};
  p.pool = pool_of(pool);
  p.x_type = floating_type(x_type, kOp, "x");
  check_types(p.x_type, gate);
  p.n = pooled.size(0), p.k = pooled.size(1), p.s = 1;
  for (const int64_t size : spatial) p.s *= size;
  check(p.s > 0, kOp, ": x must have at least one spatial position to pool");
  gate = csg::dense(gate);
  labels = dense(labels);
  grad_out = dense(grad_out);
  grad_pooled = dense(grad_pooled);
  pooled = csg::dense(pooled);
  index = csg::dense(index);
  p.rows = gate_rows(gate, labels, col_max, col_arg, pooled, p.n, p.k);
  const auto is_matrix = [&](const Tensor& t, TorchType type) {
    return t.dim() == 2 && t.size(0) == p.n && t.size(1) == p.k && t.scalar_type() == type;
  };
  const TorchType type = gate.scalar_type();
  check(is_matrix(pooled, type) && (!grad_out || is_matrix(*grad_out, type)) &&
            (!grad_pooled || is_matrix(*grad_pooled, type)) &&
            (p.pool == Pool::Avg || is_matrix(index, TorchType::Long)),
        kOp, ": gradients, pooled and index must have the shape (N, K) and the dtypes of the forward pass");
  if (grad_out) check_same_device(*grad_out, pooled, kOp, "grad_out");
  if (grad_pooled) check_same_device(*grad_pooled, pooled, kOp, "grad_pooled");
  check_same_device(index, pooled, kOp, "index");
#ifdef CSG_CUDA
  const CudaScope scope(pooled);
#endif
  Tensor grad_x, grad_gate;
  if (need_x) {
    const bool shared = layout == kShared;
    check(layout >= kRows && layout <= (p.pool == Pool::Avg ? kShared : kChannelsLast), kOp,
          ": layout must be 0 (contiguous), 1 (channels last) or for avg 2 (shared by all positions), got ", layout);
    std::vector<int64_t> size{p.n, p.k}, stride{shared ? p.k : p.s * p.k, layout == kRows ? p.s : 1};
    size.insert(size.end(), spatial.begin(), spatial.end());
    stride.resize(size.size());
    int64_t step = shared ? 0 : layout == kRows ? 1 : p.k;
    for (size_t d = size.size() - 1; d >= 2; --d) stride[d] = step, step *= size[d];
    grad_x = empty_strided(size.data(), stride.data(), int64_t(size.size()), x_type, pooled);
    p.grad_x = grad_x.data_ptr();
    p.stride_n = stride[0], p.stride_k = stride[1], p.stride_s = shared ? 0 : layout == kRows ? 1 : p.k;
#ifndef CSG_CUDA
    if (p.pool == Pool::Max) check_index(index, p.s);  // the kernel writes there
#endif
  } else {
    grad_x = empty_vector(0, x_type, pooled);
    p.x_type = p.rows.type;
  }
  if (need_gate) {
    grad_gate = empty_matrix(p.rows.rows, p.k, type, pooled);
    p.grad_gate = grad_gate.data_ptr();
  } else {
    grad_gate = empty_vector(0, type, pooled);
  }
  p.grad_out = data(grad_out);
  p.grad_pooled = data(grad_pooled);
  p.pooled = pooled.data_ptr();
  p.index = p.pool == Pool::Max ? static_cast<const int64_t*>(index.data_ptr()) : nullptr;
  if (p.k > 0) {
#ifdef CSG_CUDA
    check_launch(gated_pool_backward_cuda(p, scope.stream()), kOp);
#else
    gated_pool_backward_cpu(p, torch_threads);
#endif
  }
  return {grad_x, grad_gate};
}

}  // namespace
}  // namespace csg

#ifdef CSG_CUDA
STABLE_TORCH_LIBRARY_IMPL(csg_ext, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(csg_ext, CPU, m) {
#endif
  m.impl("gated_pool", TORCH_BOX(&csg::gated_pool));
  m.impl("_gated_pool", TORCH_BOX(&csg::gated_pool));
  m.impl("gated_pool_backward", TORCH_BOX(&csg::gated_pool_backward));
}
