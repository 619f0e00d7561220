// mutual_info: what its CPU and CUDA kernels take. Plain pointers, sizes and strides: no torch, no CUDA.
//
// The k-nearest-neighbour estimate of Ross (2014, doi:10.1371/journal.pone.0087357) of the mutual information between
// a continuous feature and a class, for every feature and every class against the rest, from one sort per feature:
//
//   MI[f, c] = max(0, psi(N) - (n_c psi(n_c) + (N - n_c) psi(N - n_c)) / N + sum_i (psi(k_i) - psi(m_i)) / N)
//
// Sample i's ball reaches to its k-th nearest neighbour on its own side (class c, or the rest); k_i counts the samples
// of its side in the ball, m_i all samples. Sums are integers of 128 bits: psi is given in fixed point, so the order of
// additions, the threads and the device do not matter, and rounding comes last.
#pragma once

#include <cstdint>

#include "../common/types.h"

namespace csg {

constexpr int kMostPsiBits = 53;  // sums of 32 values below 32 take 63 bits

enum class Ties : int8_t {
  Noise,  // scikit-learn's values: features scaled by their standard deviation, noise added, open balls, k_i = k
  Exact,  // the features as they are, closed balls: equal values and equal distances are counted on both sides
};

struct LabelledFeatures {
  const void* features;  // [N, K]
  ScalarType type;
  int64_t n, k, stride_n, stride_k;  // strides in elements
  const int64_t* labels;             // [N] in [0, classes)
  int64_t classes;
};

struct MutualInfo : LabelledFeatures {
  int64_t neighbors;  // at least 1
  Ties ties;
  const double* noise;  // [N, K], standard normal; nullptr with Ties::Exact
  int64_t noise_stride_n, noise_stride_k;
  bool multiclass;     // MI(feature; label) instead of one class against the rest: out is [K]
  const int64_t* psi;  // [N + 1] round((digamma(i) + any constant) * 2^psi_bits), below 32 * 2^psi_bits; 0 at i = 0
  int psi_bits;        // at most kMostPsiBits
  double* out;         // [K, classes] contiguous; a feature with NaN, inf or (Ties::Noise) an infinite variance: NaN
};

// The approximation from equal-frequency bins. Bin b holds the samples of ranks ceil(b N / bins) to ceil((b + 1) N /
// bins) - 1; equal values go where the first of them does. Plug-in estimate less its bias (Miller and Madow):
//
//   MI[f, c] = max(0, sum_b (e(n_bc) + e(n_b - n_bc) - e(n_b)) - e(n_c) - e(N - n_c) + e(N)) / N
//
// with e(n) = n log n - 1/2 for n > 0 and e(0) = 0.
struct BinnedMutualInfo : LabelledFeatures {
  int64_t bins;  // in [1, N]
  double* out;   // [K, classes] contiguous; a feature with NaN or inf: NaN
};

}  // namespace csg
