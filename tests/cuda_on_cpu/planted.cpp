// Planted bugs: each must be caught by the stand-in. `planted <bug>` exits with 0 if the run was right (so 0 for
// "none").
#include <cstdio>
#include <cstring>
#include <string_view>

#include "../../csrc/common/cuda_device.cuh"
#include "../../csrc/common/cuda_launch.cuh"

extern "C" void* cuda_on_cpu_map(size_t bytes);
extern "C" void cuda_on_cpu_set_seed(uint64_t seed);

namespace {

constexpr int kThreads = 256;

enum class Bug {
  None,
  MissingBarrier,
  DivergentBarrier,
  ExitBeforeBarrier,
  DynamicOverrun,
  StaticOverrun,
  GlobalOverread,
  Misaligned,
  AbsentLane,
  LaneNeverComes,
  TooMuchShared,
};
constexpr std::string_view kNames[] = {
    "none",           "missing-barrier", "divergent-barrier", "exit-before-barrier", "dynamic-overrun",
    "static-overrun", "global-overread", "misaligned",        "absent-lane",         "lane-never-comes",
    "too-much-shared"};

// out[block][i] = in[block][kThreads - 1 - i] + the sum of in over the thread's warp.
__global__ void reverse_and_sum(const float* in, float* out, Bug bug) {
  CSG_DYNAMIC_SHARED(shared);
  CSG_SHARED(float, sums, kThreads / 32);
  float* const staged = reinterpret_cast<float*>(shared);
  const int i = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * kThreads;
  staged[i + (bug == Bug::DynamicOverrun ? 1 : 0)] = in[first + i];
  float sum = in[first + i];
  if (bug == Bug::GlobalOverread) sum += 0 * in[first + i + 1];
  for (int offset = 16; offset > 0; offset /= 2) {
    if (bug == Bug::LaneNeverComes && offset == 2 && i == 40) continue;
    const unsigned mask = bug == Bug::AbsentLane ? (i % 32 < 16 ? 0xffffu : 0xffff0000u) : 0xffffffffu;
    sum += __shfl_xor_sync(mask, sum, offset);
  }
  if (i % 32 == 0) sums[i / 32 + (bug == Bug::StaticOverrun ? 1 : 0)] = sum;
  if (bug == Bug::ExitBeforeBarrier && i == 5) return;
  if (bug == Bug::DivergentBarrier && i < 32) {
    __syncthreads();
  } else if (bug != Bug::MissingBarrier) {
    __syncthreads();
  }
  if (bug == Bug::Misaligned && i == 0) {
    const auto pack = csg::load_pack<float, 4>(in + 1);
    out[first] = pack.v[0];
  }
  out[first + i] = staged[kThreads - 1 - i] + sums[i / 32];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  int bug = -1;
  for (int b = 0; b < static_cast<int>(std::size(kNames)); ++b) {
    if (kNames[b] == argv[1]) bug = b;
  }
  if (bug < 0) return 2;
  cuda_on_cpu_set_seed(static_cast<uint64_t>(std::atoi(argv[2])));
  constexpr int kBlocks = 4;  // both buffers fill one page of 4096 bytes
  auto* const in = static_cast<float*>(cuda_on_cpu_map(sizeof(float) * kBlocks * kThreads));
  auto* const out = static_cast<float*>(cuda_on_cpu_map(sizeof(float) * kBlocks * kThreads));
  for (int i = 0; i < kBlocks * kThreads; ++i) in[i] = static_cast<float>(i % 97);
  const size_t shared_bytes = static_cast<Bug>(bug) == Bug::TooMuchShared ? 48 * 1024 : sizeof(float) * kThreads;
  if (csg::launch(reverse_and_sum, kBlocks, kThreads, shared_bytes, nullptr, in, out, static_cast<Bug>(bug)) !=
      cudaSuccess) {
    std::printf("fault: %s\n", cuda_on_cpu::error());
    return 1;
  }
  for (int i = 0; i < kBlocks * kThreads; ++i) {
    const int first = i / kThreads * kThreads;
    float expected = in[first + kThreads - 1 - i % kThreads];
    for (int l = 0; l < 32; ++l) expected += in[i / 32 * 32 + l];
    if (out[i] != expected) {
      std::printf("wrong: out[%d] is %g, expected %g\n", i, out[i], expected);
      return 1;
    }
  }
  std::printf("right\n");
  return 0;
}
