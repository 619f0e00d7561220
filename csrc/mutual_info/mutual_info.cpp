// mutual_info for torch: checks, allocation and registration. Compiled twice: for the CPU, and with CSG_CUDA for CUDA.
#include "mutual_info.h"

#include <algorithm>
#include <tuple>

#include "../common/binding.h"
#ifdef CSG_CUDA
#include "mutual_info_cuda.h"
#else
#include "mutual_info_cpu.h"
#include "standard_normal_cpu.h"
#endif

namespace csg {
namespace {

constexpr const char* kOp = "class_mutual_info";

// Checks what every estimate takes and fills it in; labels becomes contiguous.
void set_features(LabelledFeatures& p, const char* op, const Tensor& features, Tensor& labels, int64_t num_classes) {
  check(features.dim() == 2, op, ": features must have the shape (N, K), got ", shape_of(features));
  p.type = floating_type(features, op, "features");
  p.n = features.size(0), p.k = features.size(1);
  p.stride_n = features.stride(0), p.stride_k = features.stride(1);
  check(labels.dim() == 1 && labels.size(0) == p.n && labels.scalar_type() == TorchType::Long, op,
        ": labels must be int64 of the shape (N,) = (", p.n, ",), got ", name_of(labels.scalar_type()), " of ",
        shape_of(labels));
  check_same_device(labels, features, op, "labels");
  check(num_classes >= 1 && num_classes < (int64_t(1) << 26), op, ": num_classes must be in [1, 2^26), got ",
        num_classes);
  check(p.n < (int64_t(1) << 30), op, ": features must have fewer than 2^30 samples, got ", p.n);
  check(p.n >= 1 || p.k == 0, op, ": features must have at least one sample, got ", shape_of(features));
  labels = dense(labels);
  p.features = features.data_ptr();
  p.labels = static_cast<const int64_t*>(labels.data_ptr());
  p.classes = num_classes;
}

void check_label(const LabelledFeatures& p, const char* op, int64_t row, int64_t label) {
  check(label >= 0 && label < p.classes, op, ": labels[", row, "] = ", label, " is outside [0, ", p.classes, ")");
}

void compute(const MutualInfo& p, const Tensor& features) {
#ifdef CSG_CUDA
  const CudaScope scope(features);
  int64_t bytes = 0;
  check_launch(mutual_info_cuda_bytes(p, &bytes), kOp);
  Tensor work = empty_vector((bytes + 7) / 8, TorchType::Long, features);
  LabelOutside outside{};
  check_launch(mutual_info_cuda(p, work.data_ptr(), bytes, &outside, scope.stream()), kOp);
  if (outside.row >= 0) check_label(p, kOp, outside.row, outside.label);
#else
  (void)features;
  for (int64_t i = 0; i < p.n; ++i) check_label(p, kOp, i, p.labels[i]);
  mutual_info_cpu(p, torch_threads);
#endif
}

Tensor class_mutual_info(Tensor features, Tensor labels, int64_t num_classes, int64_t n_neighbors,
                         std::optional<Tensor> noise, bool multiclass, Tensor psi, int64_t psi_bits) {
  MutualInfo p{};
  set_features(p, kOp, features, labels, num_classes);
  check(n_neighbors >= 1, kOp, ": n_neighbors must be at least 1, got ", n_neighbors);
  check(psi.scalar_type() == TorchType::Long && psi.is_contiguous() && psi.dim() == 1 && psi.size(0) == p.n + 1, kOp,
        ": psi must be int64 of the shape (N + 1,)");
  check_same_device(psi, features, kOp, "psi");
  check(psi_bits >= 0 && psi_bits <= kMostPsiBits, kOp, ": psi_bits must be in [0, ", kMostPsiBits, "], got ",
        psi_bits);
  if (noise) {
    check(noise->scalar_type() == TorchType::Double && noise->dim() == 2 && noise->size(0) == p.n &&
              noise->size(1) == p.k,
          kOp, ": noise must be float64 of the shape of features");
    check_same_device(*noise, features, kOp, "noise");
    p.noise = data<double>(noise);
    p.noise_stride_n = noise->stride(0), p.noise_stride_k = noise->stride(1);
  }
  p.ties = noise ? Ties::Noise : Ties::Exact;
  p.neighbors = n_neighbors, p.multiclass = multiclass;
  p.psi = static_cast<const int64_t*>(psi.data_ptr()), p.psi_bits = int(psi_bits);
  Tensor out = empty_matrix(p.k, multiclass ? 1 : num_classes, TorchType::Double, features);
  if (p.k == 0) return out;
  p.out = static_cast<double*>(out.data_ptr());
  compute(p, features);
  return out;
}

#ifndef CSG_CUDA
Tensor binned_class_mutual_info(Tensor features, Tensor labels, int64_t num_classes, int64_t bins) {
  constexpr const char* op = "binned_class_mutual_info";
  BinnedMutualInfo p{};
  set_features(p, op, features, labels, num_classes);
  check(bins >= 1, op, ": bins must be at least 1, got ", bins);
  p.bins = std::min(bins, p.n);  // one for each rank says the same as more
  Tensor out = empty_matrix(p.k, num_classes, TorchType::Double, features);
  if (p.k == 0) return out;
  for (int64_t i = 0; i < p.n; ++i) check_label(p, op, i, p.labels[i]);
  p.out = static_cast<double*>(out.data_ptr());
  binned_mutual_info_cpu(p, torch_threads);
  return out;
}

std::tuple<Tensor, Tensor, int64_t, bool, double> standard_normal(Tensor key, int64_t position, bool has_gauss,
                                                                  double gauss, int64_t n, int64_t k, int64_t begin,
                                                                  int64_t end) {
  check(key.dim() == 1 && key.size(0) == 624 && key.scalar_type() == TorchType::Long && key.is_contiguous() &&
            position >= 0 && position <= 624,
        "standard_normal: key and position must be those of RandomState.get_state()");
  check(n >= 0 && 0 <= begin && begin <= end && end <= k, "standard_normal: columns must lie in [0, ", k, "), got [",
        begin, ", ", end, ")");
  NormalState state{{}, int(position), has_gauss, gauss};
  const int64_t* words = static_cast<const int64_t*>(key.data_ptr());
  for (int i = 0; i < 624; ++i) state.key[i] = uint32_t(words[i]);
  Tensor noise = empty_matrix(end - begin, n, TorchType::Double, key);
  standard_normal_cpu(state, n, k, begin, end, static_cast<double*>(noise.data_ptr()), torch_threads);
  Tensor moved = empty_vector(624, TorchType::Long, key);
  std::copy(state.key, state.key + 624, static_cast<int64_t*>(moved.data_ptr()));
  return {noise, moved, state.position, state.has_gauss, state.gauss};
}
#endif

}  // namespace
}  // namespace csg

#ifdef CSG_CUDA
STABLE_TORCH_LIBRARY_IMPL(csg_ext, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(csg_ext, CPU, m) {
  m.impl("_standard_normal", TORCH_BOX(&csg::standard_normal));
  m.impl("binned_class_mutual_info", TORCH_BOX(&csg::binned_class_mutual_info));
#endif
  m.impl("class_mutual_info", TORCH_BOX(&csg::class_mutual_info));
}
