// Launches the CUDA kernels of mutual_info, which the files included below hold, one for each stage. Features are taken
// in chunks; work memory holds, per sample and feature of a chunk:
//   words, spare   8 bytes each (fp64 and Ties::Noise: 16): what is sorted; afterwards the lists of the classes, and
//                  the list of samples that the fast paths leave over
//   value, label   4 (8) and 4 bytes: the feature sorted
//
// Bytes that must move per sample and feature, for fp32 with Ties::Exact, f bits of features in a chunk (at most 8) and
// c bits of classes:
//   transpose          4 read, 8 written: [feature | key | class], the key's order that of the values
//   radix_sort         8 + 16 ceil((32 + f) / 8): by feature and value
//   unpack             8 read, 16 written: value, label, [feature | class | position]
//   radix_sort         8 + 16 ceil((c + f) / 8): stable by feature and class: every class's positions, ascending
//   among_own_class    8 read; ten to twenty values of the sorted feature looked up, which L1 or L2 holds
//   among_all          8 read, at most k atomic additions
//   one_sample         as many of the samples as have ties or crowded classes around them
// (50,000 samples, 1000 classes: 196 bytes.) Share of the memory bandwidth reached: not measured on a GPU.
//
// Sums are 128-bit integers, so that the order of the atomic additions changes no bit. Products that are added to
// something are rounded first (__dmul_rn): fused, they would not be the CPU's.
#include "mutual_info_cuda.h"

#include <algorithm>
#include <type_traits>

#include "../common/cuda_device.cuh"
#include "../common/cuda_launch.cuh"
#include "../common/radix_sort_cuda.h"
#include "mutual_info_all_samples.cuh"
#include "mutual_info_chunk.cuh"
#include "mutual_info_labels.cuh"
#include "mutual_info_load.cuh"
#include "mutual_info_own_class.cuh"
#include "mutual_info_result.cuh"
#include "mutual_info_small_groups.cuh"

namespace csg {
namespace {

constexpr int kMaxFeatureBits = 8;       // of a chunk: with a 32-bit key five passes of eight bits
constexpr int64_t kWorkBytes = 1 << 30;  // of a chunk of several features

int bits_of(int64_t count) {  // that tell `count` values apart
  int bits = 0;
  while (int64_t(1) << bits < count) ++bits;
  return bits;
}

bool is_wide(const MutualInfo& p) { return p.ties == Ties::Noise || p.type == ScalarType::Float64; }

// Where everything lies in the work memory when `features` are taken at a time.
struct Layout {
  int64_t features, bytes = 0;
  Fields fields;
  size_t scratch_bytes = 0;
  // Of all chunks.
  int64_t class_size, class_begin, row, summary, found;
  // Of one.
  int64_t words, spare, value, label, scale, scratch, sums, sums_end, own, without, generic, generics, rest, count;

  int make(const MutualInfo& p, int64_t features_at_once) {
    const int64_t width = p.multiclass ? 1 : p.classes, word = is_wide(p) ? 16 : 8;
    fields.key = is_wide(p) ? 64 : 32;
    fields.dropped = p.type == ScalarType::BFloat16 ? 16 : p.type == ScalarType::Float16 ? 13 : 0;
    if (!is_wide(p)) fields.key -= fields.dropped;
    fields.classes = bits_of(p.classes);
    fields.position = bits_of(p.n);
    const int room = 64 - fields.classes - std::max(is_wide(p) ? 0 : fields.key, fields.position);
    features = std::min(features_at_once, int64_t(1) << std::min(room, kMaxFeatureBits));
    const int64_t items = features * p.n;
    int status = is_wide(p) ? radix_sort_bytes<Word128>(items, &scratch_bytes) : cudaSuccess;
    size_t narrow = 0;
    if (status == cudaSuccess) status = radix_sort_bytes<Word64>(items, &narrow);
    scratch_bytes = std::max(scratch_bytes, narrow);
    bytes = 0;
    const auto take = [&](int64_t* at, int64_t size) { *at = bytes, bytes += ceil_div(size, 256) * 256; };
    take(&class_size, 4 * p.classes);
    take(&class_begin, 4 * p.classes);
    take(&row, p.multiclass ? 4 * p.n : 0);
    take(&summary, sizeof(Summary));
    take(&found, 4);
    take(&words, word * items);
    take(&spare, word * items);
    take(&value, word / 2 * items);
    take(&label, p.multiclass ? 0 : 4 * items);
    take(&scale, static_cast<int64_t>(sizeof(Scale)) * features);
    take(&scratch, static_cast<int64_t>(scratch_bytes));
    sums = bytes;
    constexpr int64_t total = sizeof(Total);
    take(&own, total * features * width);
    take(&without, p.multiclass ? 0 : total * features * width);
    take(&generic, p.multiclass || p.ties == Ties::Exact ? 0 : total * features * width);
    take(&generics, total * features);
    take(&rest, total * features);
    take(&count, 8);
    sums_end = bytes;
    return status;
  }

  // The most features at once that fit; one at least.
  int fit(const MutualInfo& p, int64_t most_bytes) {
    int status = make(p, p.k);
    while (status == cudaSuccess && bytes > most_bytes && features > 1) {
      const double share = static_cast<double>(most_bytes) / static_cast<double>(bytes);
      const auto fewer = static_cast<int64_t>(static_cast<double>(features) * share);
      status = make(p, std::max<int64_t>(1, std::min(features - 1, fewer)));
    }
    // Chunks of one size.
    if (status == cudaSuccess) status = make(p, ceil_div(p.k, ceil_div(p.k, features)));
    return status;
  }
};

// Launches until one fails.
class Launcher {
 public:
  explicit Launcher(void* stream) : stream_(stream) {}
  int status() const { return status_; }

  template <typename... Params>
  void blocks(void (*kernel)(Params...), int64_t tiles, int threads, std::type_identity_t<Params>... params) {
    then([&] { return launch(kernel, std::max<int64_t>(tiles, 1), threads, 0, stream_, params...); });
  }
  // A thread for each item, up to a number of threads that fills a GPU.
  template <typename... Params>
  void items(void (*kernel)(Params...), int64_t count, std::type_identity_t<Params>... params) {
    blocks(kernel, std::min(ceil_div(count, kThreads), 16 * kFillBlocks), kThreads, params...);
  }
  void clear(void* p, int value, int64_t bytes) {
    then([&] {
      return bytes == 0 ? cudaSuccess
                        : cudaMemsetAsync(p, value, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream_));
    });
  }
  template <typename T>
  T read(const T* p) {
    T value{};
    const auto stream = static_cast<cudaStream_t>(stream_);
    then([&] { return cudaMemcpyAsync(&value, p, sizeof(T), cudaMemcpyDeviceToHost, stream); });
    then([&] { return cudaStreamSynchronize(stream); });
    return value;
  }
  template <typename Word>
  void sort(SortBuffers<Word>& buffers, int64_t count, int begin_bit, int end_bit, void* scratch, size_t bytes) {
    if (begin_bit == end_bit) return;
    then([&] { return radix_sort(buffers, count, begin_bit, end_bit, scratch, bytes, stream_); });
  }

 private:
  template <typename Call>
  void then(Call call) {
    if (status_ == cudaSuccess) status_ = static_cast<int>(call());
  }

  void* stream_;
  int status_ = cudaSuccess;
};

// One call: its parameters, its memory, its launches.
struct Run {
  const MutualInfo& p;
  const Layout& layout;
  unsigned char* work;
  Launcher& gpu;
  Summary summary{};
  Chunk c{};

  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(work + offset);
  }

  template <typename X, typename Store>
  void transpose_tiles(const void* from, int64_t stride_n, int64_t stride_k, int64_t n, const int32_t* row,
                       Store store) {
    const auto sample_tiles = static_cast<unsigned>(ceil_div(n, kTile));
    const auto tiles = sample_tiles * static_cast<unsigned>(ceil_div(c.features, kTile));
    const Matrix m{n, c.features, stride_n, stride_k, sample_tiles, tiles, row};
    const X* first = static_cast<const X*>(from) + c.first * stride_k;
    gpu.blocks(transpose<X, Store>, m.tiles, kThreads, first, m, store);
  }

  // The features as doubles, ready to be compared; in the spare words.
  double* load_columns() {
    auto* const columns = at<double>(layout.spare);
    dispatch(p.type, [&](auto x) {
      transpose_tiles<decltype(x)>(p.features, p.stride_n, p.stride_k, p.n, nullptr, StoreColumn{columns, p.n});
      return cudaSuccess;
    });
    const bool noise = p.ties == Ties::Noise;
    if (!noise && p.type != ScalarType::Float64) return columns;
    auto* const scale = noise ? at<Scale>(layout.scale) : nullptr;
    gpu.blocks(scale_columns, c.features, kThreads, columns, p.n, c.features, tree_levels(p.n),
               columns + c.features * p.n, scale);
    if (noise)
      transpose_tiles<double>(p.noise, p.noise_stride_n, p.noise_stride_k, p.n, nullptr, AddNoise{columns, scale, p.n});
    return columns;
  }

  template <typename Word>
  SortBuffers<Word> buffers() const {
    return {at<Word>(layout.words), at<Word>(layout.spare)};
  }

  void load(SortBuffers<Word128>& to) {
    const double* columns = load_columns();
    gpu.items(pack_columns, c.features * c.samples, columns, p.n, p.labels, c, to.words);
  }
  void load(SortBuffers<Word64>& to) {
    dispatch(p.type, [&](auto x) {
      using X = decltype(x);
      if constexpr (!std::is_same_v<X, double>) {
        const StoreWord store{to.words, p.labels, c.row, c.samples, c.fields};
        transpose_tiles<X>(p.features, p.stride_n, p.stride_k, c.samples, c.row, store);
      }
      return cudaSuccess;
    });
  }

  template <typename V, bool Closed, int T>
  void all_samples(const V* value) {
    const auto feature_tiles = static_cast<unsigned>(ceil_div(c.samples, kThreads));
    const unsigned tiles = static_cast<unsigned>(c.features) * feature_tiles;
    gpu.blocks(among_all<V, Closed, T>, tiles, kThreads, c, value, feature_tiles, tiles);
  }

  template <typename Word, typename V, bool Closed>
  void chunk() {
    const int64_t items = c.features * c.samples;
    const int feature_bits = bits_of(c.features), class_end = c.fields.position + c.fields.classes;
    void* const scratch = at<void>(layout.scratch);
    auto* const value = at<V>(layout.value);
    gpu.clear(at<void>(layout.sums), 0, layout.sums_end - layout.sums);
    auto words = buffers<Word>();
    load(words);
    gpu.sort(words, items, c.fields.classes, c.fields.classes + c.fields.key + feature_bits, scratch,
             layout.scratch_bytes);
    SortBuffers<Word64> lists{reinterpret_cast<Word64*>(words.spare), reinterpret_cast<Word64*>(words.words)};
    gpu.items(unpack<Word, V>, items, words.words, c, value, lists.words);
    gpu.sort(lists, items, c.fields.position, class_end + feature_bits, scratch, layout.scratch_bytes);
    c.list = lists.words, c.left_over = lists.spare;
    // Parts that fill the GPU, each long enough for its block to look values up again and again.
    const int64_t parts = std::clamp<int64_t>(kFillBlocks / c.features, 1, ceil_div(c.samples, 4 * kWideThreads));
    gpu.blocks(among_own_class<V, Closed>, c.features * parts, kWideThreads, c, value, parts, c.features * parts);
    if (!p.multiclass) {
      if (c.neighbors <= 3) {
        all_samples<V, Closed, 8>(value);
      } else if (c.neighbors <= 7) {
        all_samples<V, Closed, 16>(value);
      } else if (c.neighbors <= 15) {
        all_samples<V, Closed, 32>(value);
      } else {
        all_samples<V, Closed, 0>(value);
      }
      gpu.items(one_sample<V, Closed>, items, c, value);
      if (c.dominant >= 0) gpu.items(beside_dominant<V, Closed>, c.features * (2 * c.neighbors + 1), c, value);
    }
    gpu.items(finish<Closed>, c.features * c.width, p, c, summary);
  }

  template <bool Closed>
  void few() {
    gpu.items(few_samples<Closed>, c.features * c.width, p, c, load_columns());
    gpu.items(finish<Closed>, c.features * c.width, p, c, summary);
  }

  // Counts the labels. Returns the first row whose label is outside, or -1.
  int64_t prepare() {
    c.classes = p.classes, c.width = p.multiclass ? 1 : p.classes, c.multiclass = p.multiclass;
    c.neighbors = std::min(p.neighbors, p.n);
    c.psi = p.psi;
    c.fields = layout.fields;
    c.class_size = at<int32_t>(layout.class_size), c.class_begin = at<int32_t>(layout.class_begin);
    c.summary = at<Summary>(layout.summary);
    c.scale = p.ties == Ties::Noise ? at<Scale>(layout.scale) : nullptr;
    c.label = at<int32_t>(layout.label);
    c.own = at<Total>(layout.own), c.without = at<Total>(layout.without), c.generic = at<Total>(layout.generic);
    c.generics = at<Total>(layout.generics), c.rest = at<Total>(layout.rest);
    c.count = at<unsigned long long>(layout.count);
    gpu.clear(c.class_size, 0, 4 * p.classes);
    gpu.clear(c.summary, 0xff, sizeof(Summary));
    gpu.items(count_classes, p.n, p, c);
    gpu.blocks(summarise, 1, kThreads, p, c);
    summary = gpu.read(c.summary);
    const auto bad_row = static_cast<int64_t>(summary.bad_row);
    if (gpu.status() != cudaSuccess || bad_row >= 0) return bad_row;
    c.samples = summary.samples, c.dominant = summary.dominant;
    if (c.samples < p.n) {
      c.row = at<int32_t>(layout.row);
      auto* const found = at<unsigned>(layout.found);
      gpu.clear(found, 0, 4);
      gpu.items(find_rows, p.n, p, c, found);
    }
    return -1;
  }

  void features() {
    const bool closed = p.ties == Ties::Exact;
    c.few = c.samples < 4 * c.neighbors + 8;
    for (c.first = 0; c.first < p.k; c.first += layout.features) {
      c.features = std::min(layout.features, p.k - c.first);
      if (c.few) {
        closed ? few<true>() : few<false>();
      } else if (!closed) {
        chunk<Word128, double, false>();
      } else if (is_wide(p)) {
        chunk<Word128, double, true>();
      } else {
        chunk<Word64, float, true>();
      }
    }
  }
};

}  // namespace

int mutual_info_cuda_bytes(const MutualInfo& p, int64_t* bytes) {
  Layout layout{};
  const int status = layout.fit(p, kWorkBytes);
  *bytes = layout.bytes;
  return forget_last_error(status);
}

int mutual_info_cuda(const MutualInfo& p, void* work, int64_t bytes, LabelOutside* outside, void* stream) {
  *outside = {-1, 0};
  Layout layout{};
  const int status = layout.fit(p, bytes);
  if (status != cudaSuccess) return forget_last_error(status);
  if (layout.bytes > bytes) return cudaErrorInvalidValue;
  Launcher gpu(stream);
  Run run{p, layout, static_cast<unsigned char*>(work), gpu};
  const int64_t bad_row = run.prepare();
  if (gpu.status() == cudaSuccess && bad_row >= 0) *outside = {bad_row, gpu.read(p.labels + bad_row)};
  if (gpu.status() == cudaSuccess && bad_row < 0) run.features();
  return forget_last_error(gpu.status());
}

}  // namespace csg
