// Host side: which tile shape a grouped product takes. Rows per expert are known to the device alone, so the choice
// rests on their mean.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

namespace dit_moe::sm90 {

constexpr int kTileM = 128;
// Of tiles that are as high as an expert's rows ask for.
constexpr int kHeightStep = 16;
constexpr int kMaxHeight = 256;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether the blocks of a product with SwiGLU work in pairs, which fetch the weights once for both: on an H100 up to 14
// % faster, but where the loop over the depth is short, or no expert has rows for both, 2 to 20 % slower. (The gradient
// of SwiGLU waits for other bytes, and its blocks are as fast or up to 3 % faster alone, at the power limit.)
inline bool in_pairs(int64_t rows, int64_t num_experts, int64_t depth) {
  return depth >= 512 && rows > kTileM / 2 * num_experts;
}

// The shape with the least time(shape); the first of equals.
template <typename Shape, int kCount, typename Time>
Shape fastest(const Shape (&shapes)[kCount], const Time& time) {
  Shape best = shapes[0];
  double best_time = time(best);
  for (int i = 1; i < kCount; ++i) {
    const double other_time = time(shapes[i]);
    if (other_time < best_time) {
      best = shapes[i];
      best_time = other_time;
    }
  }
  return best;
}

// ---- products with tiles of equal height (TokenScheduler)

// A number that scatters, by its sums over cases that are as likely as one another.
struct Likely {
  double cases = 0.0, sum = 0.0, squares = 0.0;

  void add(double value, double weight = 1.0) {
    cases += weight;
    sum += weight * value;
    squares += weight * value * value;
  }
  double mean() const { return sum / cases; }
  double deviation() const { return std::sqrt(std::max(squares / cases - mean() * mean(), 0.0)); }
};

// When the last pair of blocks is expected to be done with all experts' tiles of at most `limit` rows, where a tile
// costs its height, and a low one waits for its weights. An expert's rows scatter about their mean as if every row
// chose for itself, which seven numbers stand for. The constants are a fit to times on an H100 of heights from 192 to
// 256, S to G, 2048 to 32768 tokens: what this chooses was on average 0.5 % slower than the best limit, at most 3 %.
inline double expected_time(int limit, int64_t rows, int64_t num_experts, int64_t depth, int64_t column_tiles,
                            int multiprocessors) {
  constexpr double deviations[] = {-1.47, -0.79, -0.37, 0.0, 0.37, 0.79, 1.47};
  const double experts = static_cast<double>(num_experts), mean = static_cast<double>(rows) / experts;
  const double spread = num_experts > 1 ? std::sqrt(mean) : 0.0;
  const double store = 300.0 * 64.0 / static_cast<double>(depth);  // what a tile costs beside the product
  Likely count, cost;                                              // row tiles of an expert, and of each of them
  for (const double deviation : deviations) {
    const double expert_rows = std::max(mean + deviation * spread, 1.0);
    const double tiles = std::ceil(expert_rows / limit);
    const double height = std::ceil(expert_rows / tiles / kHeightStep) * kHeightStep;
    count.add(tiles);
    cost.add(std::max(height, 115.0 + 0.5 * height) + store, tiles);
  }
  const double share = static_cast<double>(column_tiles) / (multiprocessors / 2 * 2);  // of a row tile, for each pair
  const double rounds = experts * share * count.mean(), scatter = std::sqrt(experts) * share * count.deviation();
  const double whole = (std::ceil(rounds - scatter - 1e-9) + std::ceil(rounds + scatter - 1e-9)) / 2;
  const double last = whole * cost.mean() + 0.5 * std::sqrt(whole) * cost.deviation();
  return 0.8 * last + 0.2 * rounds * cost.mean();  // an incomplete round has the memory to itself
}

// The rows that such a product's tiles have at most, a multiple of kHeightStep, for the least expected time.
inline int choose_height(int64_t rows, int64_t num_experts, int64_t depth, int64_t column_tiles, int multiprocessors) {
  int best = kMaxHeight;
  double best_time = std::numeric_limits<double>::infinity();
  for (int limit = kMaxHeight; limit >= 3 * kHeightStep; limit -= kHeightStep) {
    const double time = expected_time(limit, rows, num_experts, depth, column_tiles, multiprocessors);
    if (time < 0.995 * best_time) {
      best_time = time;
      best = limit;
    }
  }
  return best;
}

// ---- weight gradients: as many tiles for every expert, each as deep as the expert has rows

struct WeightShape {
  int columns;
  bool tall;  // the two blocks of a cluster are neighbours along the rows of the gradient, otherwise along the columns
};

inline bool operator==(WeightShape a, WeightShape b) { return a.columns == b.columns && a.tall == b.tall; }

// In rounds of the whole GPU times columns. A wide pair fetches more: the operand that it shares is the narrow one.
// (176 columns, which divide the G layer's 1408, were measured slower there than 192 with their idle columns.)
inline double expected_weight_time(WeightShape shape, int64_t num_experts, int64_t height, int64_t width,
                                   int multiprocessors) {
  const int64_t tiles = ceil_div(height, kTileM * (shape.tall ? 2 : 1)) *
                        ceil_div(width, shape.columns * (shape.tall ? 1 : 2)) * num_experts;
  const int64_t rounds = ceil_div(tiles, multiprocessors / 2);
  const double narrow = shape.columns <= 128 ? 1.09 : 1.0;
  return static_cast<double>(rounds * shape.columns) * narrow * (shape.tall ? 1.0 : 1.03);
}

}  // namespace dit_moe::sm90
