// Sorting on the device behind two functions: CUB's radix sort, or std::stable_sort where tests run the kernels on a
// CPU. The only file that sees CUB is radix_sort_cuda.cu.
#pragma once

#include <cstddef>
#include <cstdint>

namespace csg {

using Word64 = uint64_t;
using Word128 = unsigned __int128;

// Words in device memory, as many in `spare`, which sorting needs.
template <typename Word>
struct SortBuffers {
  Word* words;
  Word* spare;
};

// Bytes of scratch memory that sorting `count` words needs. Returns a cudaError_t, as radix_sort does.
template <typename Word>
int radix_sort_bytes(int64_t count, size_t* bytes);

// Enqueues a stable sort of the words by their bits [begin_bit, end_bit); the two buffers may change places.
template <typename Word>
int radix_sort(SortBuffers<Word>& buffers, int64_t count, int begin_bit, int end_bit, void* scratch,
               size_t scratch_bytes, void* stream);

}  // namespace csg
