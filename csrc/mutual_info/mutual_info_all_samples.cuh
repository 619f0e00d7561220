// CUDA kernels of mutual_info that take samples among all samples, one class taken out. Part of mutual_info_cuda.cu.
#pragma once

#include <cmath>

#include "../common/cuda_launch.cuh"
#include "mutual_info_chunk.cuh"
#include "mutual_info_feature.cuh"

namespace csg {
namespace {

constexpr int64_t kShortBall = 32;  // samples of a closed ball that one thread looks at

// Blocks of a multiprocessor: as many as leave the neighbours in registers.
template <int T>
constexpr int kNearBlocks = T == 32   ? 1
                            : T == 16 ? 2
                                      : 5;

// As the CPU's among_all: T neighbours of a sample, k < T. Where their distances differ, the ball without class c
// reaches to the k-th neighbour of another class, at rank k + e with e neighbours of class c before it. T = 0: every
// sample is left over.
template <typename V, bool Closed, int T>
__global__ void __launch_bounds__(kThreads, kNearBlocks<T>)
    among_all(const Chunk c, const V* values, const unsigned feature_tiles, const unsigned tiles) {
  constexpr int kMost = T == 0 ? 0 : T / 2 - 1;  // neighbours
  CSG_SHARED(double, value, kThreads + 2 * T);
  CSG_SHARED(int32_t, label, kThreads + 2 * T);
  const int thread = threadIdx.x, k = static_cast<int>(c.neighbors);
  for (unsigned tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t feature = tile / feature_tiles, first = int64_t(tile % feature_tiles) * kThreads;
    const Feature<V> f(c, values, feature);
    const int64_t p = first + thread;
    bool slow = p < f.n;
    if constexpr (T == 0) {
      slow = slow && !(Closed && in_run(f.value, p, f.k));
    } else {
      for (int i = thread; i < kThreads + 2 * T; i += kThreads) {
        const int64_t at = first - T + i;
        value[i] = f.value[at];
        label[i] = at >= 0 && at < f.n ? f.label[at] : 0;
      }
      __syncthreads();
      if (p < f.n) {
        int left = thread + T - 1, right = thread + T + 1;
        const double x = value[thread + T];
        const int32_t own = label[thread + T];
        double below = x - value[left], above = value[right] - x, last = -1, kth = 0;
        int32_t near[T];
        bool ordered = true;
#pragma unroll
        for (int j = 0; j < T; ++j) {
          const bool take_left = below < above;
          const double d = take_left ? below : above;
          near[j] = label[take_left ? left : right];
          ordered = ordered && last < d;
          last = d;
          if (j + 1 == k) kth = d;
          if (j + 1 == T) break;
          left -= take_left, right += !take_left;
          const double next = value[take_left ? left : right];
          below = take_left ? x - next : below;
          above = take_left ? above : next - x;
        }
        slow = !(kth > 0 && ordered && last < static_cast<double>(INFINITY));
        int extra[kMost];
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
          const int32_t target = near[i];
          bool skip = i >= k || target == own || target < 0;
#pragma unroll
          for (int j = 0; j < i; ++j) skip = skip || near[j] == target;
          int e = 0;
#pragma unroll
          for (int j = 0; j + 1 < T; ++j) e += near[j] == target && (j < k || e > j - k);
          slow = slow || (!skip && e >= T - k);
          extra[i] = skip ? 0 : e;
        }
        Total* const without = c.without + feature * c.width;
        const int64_t* const psi = c.psi + k;
#pragma unroll
        for (int i = 0; i < kMost; ++i)
          if (!slow && extra[i] != 0) add(&without[near[i]], psi[0] - psi[extra[i]]);
        if (Closed && kth == 0) slow = false;  // in a run
      }
    }
    append(c, slow, feature, p, false);
    if constexpr (T > 0) __syncthreads();
  }
}

// The closed ball of sample p, by a warp: sample by sample or class by class, whichever is less.
template <typename V, typename Emit>
__device__ inline void long_ball(const Feature<V>& f, int64_t p, int lane, Emit emit) {
  const ClosedBall ball = closed_ball_of(f, p);
  const int32_t own = f.label[p];
  if (ball.end - ball.begin <= f.chunk.classes) {
    for (int64_t i = ball.begin + lane; i < ball.end; i += kWarp) member_of_ball(f, ball, i, own, emit);
    return;
  }
  for (int64_t i = lane; i < f.chunk.classes; i += kWarp) {
    const auto c = static_cast<int32_t>(i);
    const int64_t size = f.class_size[c];
    if (c == class_of(own) || f.chunk.is_flagged(c)) continue;
    const int64_t rank = first_inside(f.values_of(c), size, ball.x, ball.reach, true, size / 2);
    const int64_t q = class_inside(f, c, rank, ball.x, ball.reach);
    if (q > 0) emit(c, without_class(f, ball.x, ball.begin, ball.end, c, q, rank));
  }
}

// What the fast path leaves over: samples with ties or crowded classes around them; runs, by class.
template <typename V, bool Closed>
__global__ void __launch_bounds__(kThreads, kBlocks) one_sample(const Chunk c, const V* values) {
  const auto count = static_cast<int64_t>(*c.count), step = int64_t(gridDim.x) * kThreads;
  const int lane = threadIdx.x % kWarp;
  // Whole warps: lanes help each other with long balls.
  for (int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x - lane; first < count; first += step) {
    const bool active = first + lane < count;
    const Word64 item = active ? c.left_over[first + lane] : 0;
    const auto feature = static_cast<int64_t>(item >> 32), p = static_cast<int64_t>(item >> 1 & 0x7fffffff);
    const Feature<V> f(c, values, feature);
    const auto emit = [&](int32_t label, PsiSum d) { add(&c.without[feature * c.width + label], d); };
    bool is_long = false;
    if (!active) {
      // Nothing to do but to help.
    } else if constexpr (!Closed) {
      const int64_t generic = open_ball(f, p, emit);
      add(&c.generic[feature * c.width + class_of(f.label[p])], generic);
      add(&c.generics[feature], generic);
    } else if (item & 1) {
      // The first of its class in a run; this class's part of what the run changes.
      member_of_ball(f, closed_ball_of(f, p), p, f.label[p], emit);
    } else {
      const ClosedBall ball = closed_ball_of(f, p);
      is_long = ball.end - ball.begin > kShortBall;
      for (int64_t i = ball.begin; i < ball.end && !is_long; ++i) member_of_ball(f, ball, i, f.label[p], emit);
    }
    if constexpr (Closed) {
      for (unsigned left = __ballot_sync(kFullMask, is_long); left != 0; left &= left - 1) {
        const int source = __popc((left & (0u - left)) - 1);
        const Word64 shared = __shfl_sync(kFullMask, item, source);
        const auto its_feature = static_cast<int64_t>(shared >> 32);
        long_ball(Feature<V>(c, values, its_feature), static_cast<int64_t>(shared >> 1 & 0x7fffffff), lane,
                  [&](int32_t label, PsiSum d) { add(&c.without[its_feature * c.width + label], d); });
      }
    }
  }
}

}  // namespace
}  // namespace csg
