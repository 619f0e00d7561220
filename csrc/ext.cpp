// Every operator of csg_ext on one page: schemas only. Kernels are registered by csrc/<op>/<op>.cpp.
#include <torch/csrc/stable/library.h>

#include "common/cpu.h"

namespace {

// Chooses the instruction set of the CPU kernels (0 baseline, 1 AVX2, 2 AVX-512); -1 only asks. Returns what is in use.
int64_t cpu_level(int64_t level) {
  if (level >= 0) csg::set_cpu_level(level >= 2 ? csg::CpuLevel::Avx512 : csg::CpuLevel(int(level)));
  return int64_t(csg::cpu_level());
}

}  // namespace

STABLE_TORCH_LIBRARY(csg_ext, m) {
  // labels: int64 (N,), or absent: the gate has a row for each sample. col_max, col_arg: what column_max(gate) returns,
  // given where the row is to be projected. pool: 0 avg, 1 max; index is empty for avg.
  // gated_pool is differentiable (csg_ext/ops/gated_pool.py); _gated_pool is the same kernel below autograd.
  m.def(
      "gated_pool(Tensor x, Tensor gate, Tensor? labels, Tensor? col_max, Tensor? col_arg, int pool)"
      " -> (Tensor out, Tensor pooled, Tensor index)");
  m.def(
      "_gated_pool(Tensor x, Tensor gate, Tensor? labels, Tensor? col_max, Tensor? col_arg, int pool)"
      " -> (Tensor out, Tensor pooled, Tensor index)");
  // layout of grad_x: 0 contiguous, 1 channels last, 2 (avg) (N, K) values that all positions share (strides 0).
  m.def(
      "gated_pool_backward(Tensor? grad_out, Tensor? grad_pooled, Tensor pooled, Tensor index, Tensor gate,"
      " Tensor? labels, Tensor? col_max, Tensor? col_arg, SymInt[] spatial, int layout, ScalarType x_type,"
      " int pool, bool need_x, bool need_gate) -> (Tensor grad_x, Tensor grad_gate)");

  m.def("column_max(Tensor gate) -> (Tensor col_max, Tensor col_arg)");
  m.def(
      "gate_step_(Tensor(a!) gate, Tensor? grad, Tensor(b!)? momentum_buffer, float lr, float momentum,"
      " float dampening, float weight_decay, bool nesterov, bool first_step, bool euclidean) -> ()");

  // psi: round(digamma(i) * 2^psi_bits), i in [0, N]. noise: standard normal (N, K), added as scikit-learn does;
  // absent: ties are counted exactly. multiclass: MI with the label itself, (K, 1), instead of (K, C).
  m.def(
      "class_mutual_info(Tensor features, Tensor labels, int num_classes, int n_neighbors, Tensor? noise,"
      " bool multiclass, Tensor psi, int psi_bits) -> Tensor");

  // The approximation from at most `bins` equal-frequency bins (CPU).
  m.def("binned_class_mutual_info(Tensor features, Tensor labels, int num_classes, int bins) -> Tensor");

  // RandomState's normal numbers and its state: columns [begin, end) of standard_normal((n, k)), column by column.
  m.def(
      "_standard_normal(Tensor key, int position, bool has_gauss, float gauss, int n, int k, int begin, int end)"
      " -> (Tensor noise, Tensor key, int position, bool has_gauss, float gauss)");

  m.def("_cpu_level(int level) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(csg_ext, CompositeExplicitAutograd, m) { m.impl("_cpu_level", TORCH_BOX(&cpu_level)); }
