// NumPy's Mersenne Twister and polar method, column by column, in batches that stay in the cache.
#include "standard_normal_cpu.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace csg {
namespace {

constexpr int kWords = 624, kShift = 397;
constexpr int64_t kSquare = 8;
constexpr int64_t kTile = 1 << 17;  // numbers drawn before they are turned into columns: stay in the cache

// The next 624 words of the Mersenne Twister MT19937 (Matsumoto and Nishimura, 1998).
void twist(uint32_t* s) {
  const auto next = [](uint32_t high, uint32_t low, uint32_t other) {
    const uint32_t y = (high & 0x80000000u) | (low & 0x7fffffffu);
    return other ^ (y >> 1) ^ ((0u - (y & 1u)) & 0x9908b0dfu);
  };
  for (int i = 0; i < kWords - kShift; ++i) s[i] = next(s[i], s[i + 1], s[i + kShift]);
  for (int i = kWords - kShift; i < kWords - 1; ++i) s[i] = next(s[i], s[i + 1], s[i + kShift - kWords]);
  s[kWords - 1] = next(s[kWords - 1], s[0], s[kShift - 1]);
}

class Words {
 public:
  explicit Words(NormalState& state) : state_(state) { temper(); }

  // Four words: two uniform numbers of 53 bits.
  const uint32_t* four() {
    if (state_.position + 4 <= kWords) {
      state_.position += 4;
      return tempered_ + state_.position - 4;
    }
    for (uint32_t& word : across_) word = one();
    return across_;
  }

 private:
  uint32_t one() {
    if (state_.position == kWords) {
      twist(state_.key);
      temper();
      state_.position = 0;
    }
    return tempered_[state_.position++];
  }
  void temper() {
    for (int i = 0; i < kWords; ++i) {
      uint32_t y = state_.key[i];
      y ^= y >> 11;
      y ^= y << 7 & 0x9d2c5680u;
      y ^= y << 15 & 0xefc60000u;
      tempered_[i] = y ^ y >> 18;
    }
  }

  NormalState& state_;
  uint32_t tempered_[kWords] = {}, across_[4] = {};
};

double uniform(uint32_t high, uint32_t low) { return (double(high >> 5) * 0x1p26 + double(low >> 6)) * 0x1p-53; }

struct Point {
  double x, y, square;  // inside the unit circle
};

double factor(const Point& p) { return std::sqrt(-2.0 * std::log(p.square) / p.square); }

}  // namespace

void standard_normal_cpu(NormalState& state, int64_t n, int64_t k, int64_t begin, int64_t end, double* out,
                         ParallelFor parallel_for) {
  const int64_t rows = std::clamp(kTile / std::max<int64_t>(k, 1), int64_t(1), std::max<int64_t>(n, 1));
  std::vector<Point> points(size_t(rows * k / 2 + 2));
  std::vector<double> tile(size_t(rows * k + 2));
  Words words(state);
  for (int64_t first = 0; first < n; first += rows) {
    const int64_t here = std::min(rows, n - first), count = here * k, old = state.has_gauss && count > 0;
    const int64_t pairs = (count - old + 1) / 2;
    for (int64_t found = 0; found < pairs;) {
      const uint32_t* w = words.four();
      const double x = 2.0 * uniform(w[0], w[1]) - 1.0, y = 2.0 * uniform(w[2], w[3]) - 1.0;
      const double square = x * x + y * y;
      points[size_t(found)] = {x, y, square};
      found += square < 1.0 && square != 0.0;
    }
    if (old) tile[0] = state.gauss;
    parallel_ranges(parallel_for, pairs, 4096, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        const int64_t at = old + 2 * i, column = at % k;
        // Both numbers of the pair outside the wanted columns: the logarithm is spared.
        if (end - begin < k && (column < begin || column >= end) && (column + 1 < begin || column + 1 >= end) &&
            i + 1 < pairs && column + 1 < k)
          continue;
        const double f = factor(points[size_t(i)]);
        tile[size_t(at)] = f * points[size_t(i)].y;
        tile[size_t(at + 1)] = f * points[size_t(i)].x;
      }
    });
    if (count > 0) {
      state.has_gauss = (count - old) % 2 != 0;
      state.gauss = state.has_gauss ? tile[size_t(count)] : 0.0;
    }
    // Square by square: with one column after the other, rows of 2^j numbers would share a few sets of the cache.
    const int64_t squares = (end - begin + kSquare - 1) / kSquare;
    parallel_ranges(parallel_for, squares, std::max<int64_t>(1, 16384 / (here * kSquare)),
                    [&](int64_t from, int64_t to) {
                      for (int64_t left = from * kSquare; left < std::min(to * kSquare, end - begin); left += kSquare)
                        for (int64_t top = 0; top < here; top += kSquare)
                          for (int64_t i = top; i < std::min(top + kSquare, here); ++i)
                            for (int64_t j = left; j < std::min(left + kSquare, end - begin); ++j)
                              out[j * n + first + i] = tile[size_t(i * k + begin + j)];
                    });
  }
}

}  // namespace csg
