// Sorting on the device with CUB, or with std::stable_sort in tests/cuda_on_cpu.
// Bytes that must move: a word read for the histograms, then a word read and written for every 8 bits sorted by.
// Share of the memory bandwidth reached: not measured on a GPU.
#include "radix_sort_cuda.h"

#ifdef __CUDACC__
#include <cub/device/device_radix_sort.cuh>
#else  // tests/cuda_on_cpu
#include <cuda_runtime.h>

#include <algorithm>
#endif

namespace csg {

#ifdef __CUDACC__

namespace {

template <typename Word>
cudaError_t sort_keys(SortBuffers<Word>& buffers, int64_t count, int begin_bit, int end_bit, void* scratch,
                      size_t& scratch_bytes, void* stream) {
  cub::DoubleBuffer<Word> both(buffers.words, buffers.spare);
  const cudaError_t status = cub::DeviceRadixSort::SortKeys(scratch, scratch_bytes, both, static_cast<uint32_t>(count),
                                                            begin_bit, end_bit, static_cast<cudaStream_t>(stream));
  buffers = {both.Current(), both.Alternate()};
  return status;
}

}  // namespace

template <typename Word>
int radix_sort_bytes(int64_t count, size_t* bytes) {
  SortBuffers<Word> none{};
  return sort_keys(none, count, 0, static_cast<int>(8 * sizeof(Word)), nullptr, *bytes, nullptr);
}

template <typename Word>
int radix_sort(SortBuffers<Word>& buffers, int64_t count, int begin_bit, int end_bit, void* scratch,
               size_t scratch_bytes, void* stream) {
  return sort_keys(buffers, count, begin_bit, end_bit, scratch, scratch_bytes, stream);
}

#else

template <typename Word>
int radix_sort_bytes(int64_t, size_t* bytes) {
  *bytes = 1;
  return cudaSuccess;
}

template <typename Word>
int radix_sort(SortBuffers<Word>& buffers, int64_t count, int begin_bit, int end_bit, void* scratch,
               size_t scratch_bytes, void*) {
  if (scratch == nullptr || scratch_bytes < 1) return cudaErrorInvalidValue;
  const int above = static_cast<int>(8 * sizeof(Word)) - end_bit;
  const auto digits = [=](Word w) { return static_cast<Word>(w << above) >> (above + begin_bit); };
  std::copy(buffers.words, buffers.words + count, buffers.spare);  // the buffers change places, as CUB's may
  std::swap(buffers.words, buffers.spare);
  std::stable_sort(buffers.words, buffers.words + count, [=](Word a, Word b) { return digits(a) < digits(b); });
  return cudaSuccess;
}

#endif

template int radix_sort_bytes<Word64>(int64_t, size_t*);
template int radix_sort_bytes<Word128>(int64_t, size_t*);
template int radix_sort(SortBuffers<Word64>&, int64_t, int, int, void*, size_t, void*);
template int radix_sort(SortBuffers<Word128>&, int64_t, int, int, void*, size_t, void*);

}  // namespace csg
