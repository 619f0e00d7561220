// mutual_info on the CPU: the kernel of mutual_info_cpu.inl compiled for three instruction sets, chosen at run time.
#include "mutual_info_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "../common/half.h"
#include "mutual_info_sample.h"

namespace csg {
namespace {

constexpr int64_t kColumns = 4;   // features loaded together: a row's cache line is read once for them
constexpr int kSample = 64;       // values that tell where the bulk of a feature lies
constexpr int32_t kCrowded = 48;  // values in a bucket that deserve buckets of their own
constexpr int64_t kShared = 8;    // values in a bucket, on average, where only the edges of bins are put in order
constexpr int kPasses = 3;        // over neighbours that may stand in the wrong order
constexpr int kRanks = 16;        // neighbours of a sample that are looked at side by side, at most
constexpr int kMostLanes = 8;     // doubles in a vector, at most
constexpr int kBatch = 32;        // samples whose memory accesses travel together
constexpr int64_t kMany = 64;     // classes, so that the neighbours of most samples are of different ones
constexpr int64_t kPadding = 32;  // values beyond both ends that vectors may read

// Linear buckets; `starts` is where their first indices stand in Workspace::starts.
struct Buckets {
  double low, scale, last;
  int64_t starts;
};

// What all features share.
struct Classes {
  int64_t n;                     // samples that take part
  int64_t large;                 // size of the classes whose samples are worked on side by side
  std::vector<int64_t> kept_at;  // their rows, where some do not
  std::vector<int32_t> labels;
  std::vector<int64_t> begins, sizes;
  std::vector<PsiSum> constants;  // what sizes add to N MI
  int64_t padded = 0;             // length of class_value
  int64_t dominant = -1;
  PsiSum weighted = 0;  // N psi(N) less the sum of n_c psi(n_c)
  bool few, three;      // few samples; three classes, all large

  const int64_t* kept = nullptr;
  const int32_t* label;
  const int64_t* begin;
  const int64_t* size;
  const PsiSum* constant;

  explicit Classes(const MutualInfo& p) : sizes(size_t(p.classes)) {
    const int64_t k = p.neighbors;
    for (int64_t i = 0; i < p.n; ++i) ++sizes[size_t(p.labels[i])];
    n = p.n;
    if (p.multiclass) {
      for (const int64_t s : sizes) n -= s == 1;
      if (n < p.n) {
        for (int64_t i = 0; i < p.n; ++i)
          if (sizes[size_t(p.labels[i])] > 1) kept_at.push_back(i);
        for (int64_t& s : sizes) s = s == 1 ? 0 : s;
        kept = kept_at.data();
      }
    }
    few = n < 4 * k + 8;
    large = p.ties == Ties::Exact ? k + 1 : 2 * k + 2;  // scikit-learn goes about smaller ones in its own way
    weighted = PsiSum(n) * p.psi[n];
    padded = 0;
    for (int64_t c = 0; c < p.classes; ++c) {
      const int64_t s = sizes[size_t(c)], rest = n - s, padding = s >= large ? k + 1 : 1;
      padded += padding;
      begins.push_back(padded);
      padded += s + padding;
      weighted -= PsiSum(s) * p.psi[s];
      constants.push_back(of_sizes(p.psi, n, s));
      if (rest >= 1 && rest <= 2 * k + 1) dominant = c;
    }
    padded += kPadding;
    labels.reserve(size_t(n));
    three = p.classes == 3 && !p.multiclass && !few && *std::min_element(sizes.begin(), sizes.end()) >= large;
    for (int64_t i = 0; i < n; ++i) {
      const auto c = int32_t(p.labels[kept ? kept[i] : i]);
      labels.push_back(c == dominant || sizes[size_t(c)] == 1 ? ~c : c);
    }
    label = labels.data(), begin = begins.data(), size = sizes.data(), constant = constants.data();
  }

  void set_sentinels(double* class_value) const {
    const double inf = std::numeric_limits<double>::infinity();
    int64_t at = 0;
    for (size_t c = 0; c < sizes.size(); ++c) {
      const int64_t padding = begins[c] - at, end = begins[c] + sizes[c];
      std::fill(class_value + at, class_value + begins[c], -inf);
      std::fill(class_value + end, class_value + end + padding, inf);
      at = end + padding;
    }
  }
};

// The work arrays of one thread, each an allocation of its own: the address sanitizer sees where one ends.
template <typename T>
T* make(std::vector<T>& memory, int64_t size, T value = T{}) {
  memory.assign(static_cast<size_t>(size), value);
  return memory.data();
}

// What sorting the n samples of a feature takes.
struct SortWorkspace {
  std::vector<double> columns_, value_;
  std::vector<int32_t> label_, bucket_, starts_, spare_label_;
  std::vector<Buckets> sub_;

  double *columns, *value;
  int32_t *label, *bucket, *starts, *spare_label;
  Buckets* sub;
  Buckets top{};
  int32_t sub_count = 0;

  SortWorkspace(const LabelledFeatures& p, int64_t n, int64_t before_columns = 0) {
    constexpr double inf = std::numeric_limits<double>::infinity();
    const int64_t crowds = n / kCrowded + 1;
    columns = make(columns_, before_columns + p.n * std::min(kColumns, p.k)) + before_columns;
    value = make(value_, n + 2 * kPadding, inf) + kPadding;
    std::fill(value - kPadding, value, -inf);
    label = make(label_, n + 2 * kPadding) + kPadding;
    bucket = make(bucket_, n);
    starts = make(starts_, (n + 3) + (n / 2 + 3 * crowds));
    spare_label = make(spare_label_, n);
    sub = make(sub_, crowds);
  }
};

struct Workspace : SortWorkspace {
  const Classes* classes;
  std::vector<double> nearest_, members_;
  std::vector<int32_t> counts_, group_;
  std::vector<PsiSum> own_, without_, generic_;
  std::vector<int64_t> cursor_;

  double* class_value = nullptr;  // where the column lay that was sorted
  double *nearest, *members;
  int32_t *counts, *group;
  PsiSum *own, *without, *generic;
  int64_t* cursor;

  Workspace(const MutualInfo& p, const Classes& c) : SortWorkspace(p, c.n, before_columns(p, c)), classes(&c) {
    nearest = make(nearest_, p.neighbors * kMostLanes);
    members = make(members_, c.three ? c.n + 2 * (p.neighbors + 1) + kPadding : c.few ? p.n : 2 * p.neighbors + 1);
    counts = make(counts_, p.classes * kRanks);
    group = make(group_, c.few ? p.n : 0);
    own = make(own_, p.classes);
    without = make(without_, p.classes);
    generic = make(generic_, p.classes);
    cursor = make(cursor_, p.classes);
  }

  // The padded classes take the place of a sorted column, and what they need more lies before it.
  static int64_t before_columns(const MutualInfo& p, const Classes& c) { return std::max<int64_t>(0, c.padded - p.n); }
};

// What all features share that are counted in bins: labels in 32 bits, the table of e, and what a class's size adds.
struct BinnedClasses {
  std::vector<int32_t> labels;
  std::vector<double> terms, constants;

  explicit BinnedClasses(const BinnedMutualInfo& p) : labels(p.labels, p.labels + p.n) {
    std::vector<int64_t> sizes(static_cast<size_t>(p.classes));
    for (const int32_t label : labels) ++sizes[size_t(label)];
    terms.reserve(size_t(p.n) + 1);
    terms.push_back(0);
    for (int64_t i = 1; i <= p.n; ++i) terms.push_back(double(i) * std::log(double(i)) - 0.5);
    // Differences of large numbers: rounded once, from extended precision.
    const auto term = [](int64_t i) {
      const auto v = static_cast<long double>(i);
      return i == 0 ? v : v * std::log(v) - 0.5L;
    };
    for (const int64_t s : sizes) constants.push_back(double(term(p.n) - (term(s) + term(p.n - s))));
  }
};

struct BinnedWorkspace : SortWorkspace {
  std::vector<int32_t> counts_;
  const int32_t* labels;
  const double *terms, *constants;
  int32_t* counts;  // zero between bins

  BinnedWorkspace(const BinnedMutualInfo& p, const BinnedClasses& c)
      : SortWorkspace(p, p.n), labels(c.labels.data()), terms(c.terms.data()), constants(c.constants.data()) {
    counts = make(counts_, p.classes);
  }
};

// Sorts values, labels with them: crowds of values that buckets did not part.
void sort_pairs(double* value, int32_t* label, int64_t n) {
  if (std::is_sorted(value, value + n)) return;
  std::vector<std::pair<double, int32_t>> pairs(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) pairs[size_t(i)] = {value[i], label[i]};
  std::sort(pairs.begin(), pairs.end());
  for (int64_t i = 0; i < n; ++i) value[i] = pairs[size_t(i)].first, label[i] = pairs[size_t(i)].second;
}

}  // namespace
}  // namespace csg

#define CSG_KERNELS "../mutual_info/mutual_info_cpu.inl"
#include "../common/cpu_levels.h"

namespace csg {

void mutual_info_cpu(const MutualInfo& p, ParallelFor parallel_for) {
  const Classes classes(p);
  const int64_t blocks = (p.k + kColumns - 1) / kColumns;
  parallel_ranges(parallel_for, blocks, 1, [&](int64_t begin, int64_t end) {
    Workspace w(p, classes);
    CSG_CALL_LEVEL(mutual_info_features, p, w, begin * kColumns, std::min(end * kColumns, p.k));
  });
}

void binned_mutual_info_cpu(const BinnedMutualInfo& p, ParallelFor parallel_for) {
  const BinnedClasses classes(p);
  const int64_t blocks = (p.k + kColumns - 1) / kColumns;
  parallel_ranges(parallel_for, blocks, 1, [&](int64_t begin, int64_t end) {
    BinnedWorkspace w(p, classes);
    CSG_CALL_LEVEL(binned_mutual_info_features, p, w, begin * kColumns, std::min(end * kColumns, p.k));
  });
}

}  // namespace csg
