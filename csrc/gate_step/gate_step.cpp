// gate_step for torch: checks, allocation and registration. Compiled twice: for the CPU, and with CSG_CUDA for CUDA.
#include "gate_step.h"

#include <tuple>

#include "../common/binding.h"
#ifdef CSG_CUDA
#include "gate_step_cuda.h"
#else
#include "gate_step_cpu.h"
#endif

namespace csg {
namespace {

void check_gate(const Tensor& gate, const char* op) {
  check(gate.dim() == 2, op, ": gate must have the shape (C, K), got ", shape_of(gate));
}

void check_like(const Tensor& t, const Tensor& gate, const char* argument) {
  check_same_device(t, gate, "gate_step_", argument);
  check(t.scalar_type() == gate.scalar_type(), "gate_step_: ", argument, " must have the dtype of gate, ",
        name_of(gate.scalar_type()), ", got ", name_of(t.scalar_type()));
  check(t.dim() == 2 && t.size(0) == gate.size(0) && t.size(1) == gate.size(1), "gate_step_: ", argument,
        " must have the shape of gate, ", shape_of(gate), ", got ", shape_of(t));
}

void gate_step_(Tensor gate, std::optional<Tensor> grad, std::optional<Tensor> momentum_buffer, double lr,
                double momentum, double dampening, double weight_decay, bool nesterov, bool first_step,
                bool euclidean) {
  check_gate(gate, "gate_step_");
  GateStep p{};
  p.type = floating_type(gate, "gate_step_", "gate");
  check(gate.is_contiguous(), "gate_step_: gate must be contiguous, got other strides");
  if (grad) {
    check_like(*grad, gate, "grad");
    grad = dense(*grad);
    p.grad = grad->data_ptr();
  }
  if (momentum_buffer) {
    check_like(*momentum_buffer, gate, "momentum_buffer");
    check(momentum_buffer->is_contiguous(), "gate_step_: momentum_buffer must be contiguous, got other strides");
    p.buffer = momentum_buffer->data_ptr();
  }
  p.gate = gate.data_ptr();
  p.c = gate.size(0), p.k = gate.size(1);
  p.lr = lr, p.momentum = momentum, p.dampening = dampening, p.weight_decay = weight_decay;
  p.nesterov = nesterov, p.first_step = first_step;
  p.projection = euclidean ? Projection::Euclidean : Projection::Scale;
  if (p.c == 0 || p.k == 0) return;
#ifdef CSG_CUDA
  const CudaScope scope(gate);
  check_launch(gate_step_cuda(p, scope.stream()), "gate_step_");
#else
  gate_step_cpu(p, torch_threads);
#endif
}

std::tuple<Tensor, Tensor> column_max(Tensor gate) {
  check_gate(gate, "column_max");
  check(gate.size(0) > 0, "column_max: gate must have at least one row, got ", shape_of(gate));
  const ScalarType type = floating_type(gate, "column_max", "gate");
  gate = dense(gate);
#ifdef CSG_CUDA
  const CudaScope scope(gate);
#endif
  Tensor top = empty_vector(gate.size(1), gate.scalar_type(), gate);
  Tensor where = empty_vector(gate.size(1), TorchType::Long, gate);
  const ColumnMax p{gate.data_ptr(), type,           gate.size(0),
                    gate.size(1),    top.data_ptr(), static_cast<int64_t*>(where.data_ptr())};
  if (p.k > 0) {
#ifdef CSG_CUDA
    check_launch(column_max_cuda(p, scope.stream()), "column_max");
#else
    column_max_cpu(p, torch_threads);
#endif
  }
  return {top, where};
}

}  // namespace
}  // namespace csg

#ifdef CSG_CUDA
STABLE_TORCH_LIBRARY_IMPL(csg_ext, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(csg_ext, CPU, m) {
#endif
  m.impl("gate_step_", TORCH_BOX(&csg::gate_step_));
  m.impl("column_max", TORCH_BOX(&csg::column_max));
}
