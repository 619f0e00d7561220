// The mutual information of the CPU kernel's closed balls by a loop over all pairs of samples.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace csg {

inline double digamma(int64_t n) {
  static const std::vector<double> table = [] {
    std::vector<double> values{0};
    long double sum = -0.577215664901532860606512090082402431L;
    for (int64_t i = 1; i < 6000; ++i) values.push_back(double(sum)), sum += 1.0L / static_cast<long double>(i);
    return values;
  }();
  return table[size_t(n)];
}

// MI of the values x with groups in [0, classes): ties counted exactly, groups of one sample left out. Of very large
// values a quarter is what is compared, as in the kernel: the difference of no two of them overflows.
inline double direct_mutual_info(const double* x, const std::vector<int64_t>& group, int64_t classes,
                                 int64_t neighbors) {
  const auto n = int64_t(group.size());
  std::vector<int64_t> size(size_t(std::max<int64_t>(classes, 2)));
  for (const int64_t g : group) ++size[size_t(g)];
  double top = 0, sum = 0;
  for (int64_t i = 0; i < n; ++i) top = std::max(top, std::abs(x[i]));
  const double scale = top > 0x1p1021 ? 0.25 : 1;
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t q = size[size_t(group[size_t(i)])];
    if (q < 2) continue;
    ++total;
    std::vector<double> distance;
    const auto apart = [&](int64_t j) { return std::abs(x[i] * scale - x[j] * scale); };
    for (int64_t j = 0; j < n; ++j)
      if (j != i && group[size_t(j)] == group[size_t(i)]) distance.push_back(apart(j));
    std::sort(distance.begin(), distance.end());
    const double r = distance[size_t(std::min(neighbors, q - 1) - 1)];
    int64_t own = 0, all = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (j == i || size[size_t(group[size_t(j)])] < 2 || apart(j) > r) continue;
      ++all;
      own += group[size_t(j)] == group[size_t(i)];
    }
    sum += digamma(own) - digamma(all) - digamma(q);
  }
  return total == 0 ? 0 : std::max(0.0, digamma(total) + sum / double(total));
}

}  // namespace csg
