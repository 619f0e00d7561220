// Counts what kernels load from and store to watched buffers. The compiler's thread sanitizer puts a call in front of
// every access that its optimisations left over; here are those calls, in place of the sanitizer's own library.
//
// An access of a warp is what its lanes reach by one instruction at a time: the n-th execution of the instruction by
// each lane between two points where the whole warp meets. A GPU's memory sees the 32-byte sectors that it touches.
#include <algorithm>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

#include "cuda_runtime.h"

namespace {

constexpr uintptr_t kSector = 32;
constexpr int kWarp = 32, kWide = 16;

struct Counts {  // as stand_in.py mirrors it
  int64_t bytes = 0, wide_bytes = 0, sectors = 0, touched_bytes = 0, touched_sectors = 0;
};

struct Buffer {
  uintptr_t begin, end;
};

struct Key {
  const void* kernel;
  int buffer;
  bool store;
  auto operator<=>(const Key&) const = default;
};

struct Tally {
  Counts counts;
  std::vector<char> touched;  // by byte
};

// A lane's part in an access of its warp.
struct Part {
  const void* instruction;
  int warp;
  unsigned meetings, execution;
  int buffer;
  bool store;
  uintptr_t sector;
  auto operator<=>(const Part&) const = default;
};

std::vector<Buffer> buffers;
std::map<Key, Tally> tallies;
std::vector<Part> parts;                            // of the block that runs
std::unordered_map<uint64_t, unsigned> executions;  // by instruction, thread and meetings
cuda_on_cpu::Moment now{};

// The parts of a block become accesses of its warps.
void end_block() {
  std::sort(parts.begin(), parts.end());
  parts.erase(std::unique(parts.begin(), parts.end()), parts.end());
  for (const Part& part : parts) ++tallies[{now.kernel, part.buffer, part.store}].counts.sectors;
  parts.clear();
  executions.clear();
}

void access(const void* p, size_t size, bool store, const void* instruction) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  const auto found =
      std::find_if(buffers.begin(), buffers.end(), [=](const Buffer& b) { return begin >= b.begin && begin < b.end; });
  if (found == buffers.end()) return;
  const cuda_on_cpu::Moment moment = cuda_on_cpu::moment();
  if (moment.kernel == nullptr) return;  // the host's own, as in what stands in for CUB
  if (moment.launch != now.launch || moment.block != now.block) end_block();
  now = moment;
  const int buffer = static_cast<int>(found - buffers.begin());
  Tally& tally = tallies[{moment.kernel, buffer, store}];
  tally.counts.bytes += static_cast<int64_t>(size);
  if (size >= kWide) tally.counts.wide_bytes += static_cast<int64_t>(size);
  tally.touched.resize(found->end - found->begin);
  const uintptr_t end = std::min(begin + size, found->end);
  std::fill(tally.touched.begin() + (begin - found->begin), tally.touched.begin() + (end - found->begin), 1);
  // Code lies within 2^30 bytes and a block has at most 1024 threads, so the key is unique.
  const uint64_t place = (reinterpret_cast<uintptr_t>(instruction) & 0x3fffffff) << 34 |
                         static_cast<uint64_t>(moment.meetings & 0xffffff) << 10 | static_cast<unsigned>(moment.thread);
  const unsigned execution = executions[place]++;
  for (uintptr_t sector = begin / kSector; sector <= (begin + size - 1) / kSector; ++sector)
    parts.push_back({instruction, moment.thread / kWarp, moment.meetings, execution, buffer, store, sector});
}

}  // namespace

extern "C" {
#define CSG_ACCESS(size)                                                                             \
  void __tsan_read##size(void* p) { access(p, size, false, __builtin_return_address(0)); }           \
  void __tsan_write##size(void* p) { access(p, size, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##size(void* p) { access(p, size, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##size(void* p) { access(p, size, true, __builtin_return_address(0)); } \
  void __tsan_volatile_read##size(void* p) { access(p, size, false, __builtin_return_address(0)); }  \
  void __tsan_volatile_write##size(void* p) { access(p, size, true, __builtin_return_address(0)); }
CSG_ACCESS(1)
CSG_ACCESS(2)
CSG_ACCESS(4)
CSG_ACCESS(8)
CSG_ACCESS(16)
void __tsan_read_range(void* p, size_t size) { access(p, size, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t size) { access(p, size, true, __builtin_return_address(0)); }
void __tsan_init() {}

// Forgets all buffers and counts.
void traffic_clear() {
  buffers.clear();
  tallies.clear();
  parts.clear();
  executions.clear();
}

// From now on accesses to [p, p + bytes) are counted; buffers are numbered from 0.
void traffic_watch(const void* p, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  buffers.push_back({begin, begin + bytes});
}

struct TrafficRow {  // as stand_in.py mirrors it
  const void* kernel;
  int64_t buffer, store;
  Counts counts;
};

// One row for each kernel, buffer and direction that had any access; false beyond the last.
bool traffic_row(size_t i, TrafficRow* row) {
  end_block();
  if (i >= tallies.size()) return false;
  auto it = tallies.begin();
  std::advance(it, i);
  auto& [key, tally] = *it;
  const auto& touched = tally.touched;
  const uintptr_t begin = buffers[static_cast<size_t>(key.buffer)].begin;
  tally.counts.touched_bytes = std::count(touched.begin(), touched.end(), 1);
  tally.counts.touched_sectors = 0;
  uintptr_t last = 0;
  for (size_t b = 0; b < touched.size(); ++b) {
    const uintptr_t sector = (begin + b) / kSector;
    if (touched[b] && sector != last) ++tally.counts.touched_sectors, last = sector;
  }
  *row = {key.kernel, key.buffer, key.store, tally.counts};
  return true;
}
}
