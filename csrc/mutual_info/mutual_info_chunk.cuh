// What the CUDA kernels of mutual_info share: a chunk of features and its work memory. Part of mutual_info_cuda.cu.
#pragma once

#include <cstdint>

#include "../common/cuda_device.cuh"
#include "../common/radix_sort_cuda.h"
#include "mutual_info.h"
#include "mutual_info_sample.h"

namespace csg {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;  // of a multiprocessor: registers enough to spill none

// What depends on the labels alone.
struct Summary {
  unsigned long long bad_row;
  int64_t samples;   // that take part
  int64_t dominant;  // as in SortedFeature
  PsiSum weighted;   // N psi(N) less the sum of n_c psi(n_c)
};

// A sum that threads add to.
struct Total {
  unsigned long long low, high;  // together the 128 bits of a PsiSum

  __device__ explicit Total(PsiSum sum)
      : low(static_cast<unsigned long long>(sum)), high(static_cast<unsigned long long>(sum >> 64)) {}
  __device__ PsiSum value() const { return static_cast<PsiSum>(static_cast<Word128>(high) << 64 | low); }
};

struct Scale {
  double deviation, noise;
};

// Where the fields of a word stand, from its low end: [feature | key | class] and [feature | class | position].
struct Fields {
  int key, classes, position;  // bits
  int dropped;                 // low bits of a float that are zero in a half type
};

// A chunk of features and all that kernels need of it.
struct Chunk {
  int64_t first;  // feature
  int64_t features, samples, neighbors, classes, width;
  bool multiclass;
  bool few;  // samples: fewer than 4 k + 8
  int64_t dominant;
  Fields fields;
  const int64_t* psi;

  int32_t* class_size;   // [classes]; one against the rest: of all samples
  int32_t* class_begin;  // [classes] in the lists
  int32_t* row;          // [samples] rows of the features that take part
  Summary* summary;
  const Scale* scale;  // [features], or nullptr: no noise

  int32_t* label;             // [features, samples] as in SortedFeature
  const Word64* list;         // [features, samples] positions by class
  Word64* left_over;          // [features * samples] feature << 32 | position << 1 | is_run
  unsigned long long* count;  // of left_over
  Total* own;                 // [features, width] sums of samples among their own class
  Total* without;             // [features, width] what changes without a class
  Total* generic;             // [features, width] sums of a class's samples among all, open balls only
  Total* generics;            // [features] over all classes
  Total* rest;                // [features] of the samples beside the dominant class

  __device__ Word64 class_mask() const { return (Word64(1) << fields.classes) - 1; }
  __device__ Word64 position_mask() const { return (Word64(1) << fields.position) - 1; }
  // The class takes no corrections in the fast path.
  __device__ bool is_flagged(int32_t c) const { return !multiclass && (c == dominant || class_size[c] == 1); }
};

// The upper half changes when the lower one overflows, and when the sum's sign changes: rarely.
__device__ inline void add(Total* total, PsiSum d) {
  if (d == 0) return;
  const auto low = static_cast<unsigned long long>(d);
  const bool carry = atomicAdd(&total->low, low) > ~low;
  const auto high = static_cast<unsigned long long>(d >> 64) + (carry ? 1 : 0);
  if (high != 0) atomicAdd(&total->high, high);
}

}  // namespace
}  // namespace csg
