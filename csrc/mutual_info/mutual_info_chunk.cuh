// What the CUDA kernels of mutual_info share: a chunk of features and its work memory. Part of mutual_info_cuda.cu.
#pragma once

#include <cstdint>

#include "../common/cuda_device.cuh"
#include "../common/radix_sort_cuda.h"
#include "mutual_info.h"

namespace csg {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;  // of a multiprocessor: registers enough to spill none

// What depends on the labels alone.
struct Summary {
  unsigned long long bad_row;
  int64_t samples;   // that take part
  int64_t dominant;  // as in SortedFeature
  int64_t weighted;  // sum of n_c psi(n_c) over classes of at least two samples
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
  double* constant;      // [classes] what MI holds beside the sums
  int32_t* row;          // [samples] rows of the features that take part
  Summary* summary;
  const Scale* scale;  // [features], or nullptr: no noise

  int32_t* label;                // [features, samples] as in SortedFeature
  const Word64* list;            // [features, samples] positions by class
  Word64* left_over;             // [features * samples] feature << 32 | position << 1 | is_run
  unsigned long long* count;     // of left_over
  unsigned long long* own;       // [features, width] sums of samples among their own class
  unsigned long long* without;   // [features, width] what changes without a class
  unsigned long long* generic;   // [features, width] sums of a class's samples among all, open balls only
  unsigned long long* generics;  // [features] over all classes
  unsigned long long* rest;      // [features] of the samples beside the dominant class

  __device__ Word64 class_mask() const { return (Word64(1) << fields.classes) - 1; }
  __device__ Word64 position_mask() const { return (Word64(1) << fields.position) - 1; }
  // The class takes no corrections in the fast path.
  __device__ bool is_flagged(int32_t c) const { return !multiclass && (c == dominant || class_size[c] == 1); }
};

__device__ inline void add(unsigned long long* sum, int64_t d) {
  if (d != 0) atomicAdd(sum, static_cast<unsigned long long>(d));
}

}  // namespace
}  // namespace csg
