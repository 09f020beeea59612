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

// The time that a product in tiles of kTileM rows and `tile_columns` columns is expected to take, in no particular
// unit: rounds of the whole GPU times columns, times what was measured on an H100 for blocks without a neighbour in a
// cluster, which fetch the weights twice as often. `deep`: the product is deeper than wide, and feels that most.
inline double expected_time(int cluster, int tile_columns, bool deep, int64_t rows, int64_t num_experts,
                            int64_t columns, int multiprocessors) {
  const double mean = static_cast<double>(rows) / static_cast<double>(num_experts) / (kTileM * cluster);
  const double row_tiles = static_cast<double>(num_experts) * (mean > 0.5 ? mean + 0.5 : 1.0);
  const auto tiles = static_cast<int64_t>(row_tiles * static_cast<double>(ceil_div(columns, tile_columns)));
  const int64_t rounds = ceil_div(tiles, multiprocessors / cluster);
  const double alone = cluster > 1 ? 1.0 : deep ? 1.15 : 1.03;
  return static_cast<double>(rounds * tile_columns) * alone;
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

// The rows that such a product's tiles have at most, a multiple of kHeightStep, for the least expected time: rounds of
// the whole GPU, as pairs of blocks, times what a round of such tiles costs, in rows. Below about 200 rows a tile waits
// for its weights (a fit to times on an H100 of heights from 64 to 256, XL layer, T = 32768). Rows of an expert scatter
// about their mean as if every row chose for itself.
inline int choose_height(int64_t rows, int64_t num_experts, int64_t depth, int64_t column_tiles, int multiprocessors) {
  constexpr int step = kHeightStep, highest = kMaxHeight, lowest = 3 * kHeightStep;
  constexpr double deviations[] = {-1.3, -0.5, 0.0, 0.5, 1.3};
  const double mean = static_cast<double>(rows) / static_cast<double>(num_experts);
  const double spread = num_experts > 1 ? std::sqrt(mean) : 0.0;
  const double store = 300.0 * 64.0 / static_cast<double>(depth);  // what a tile costs beside the product
  int best = highest;
  double best_time = std::numeric_limits<double>::infinity();
  for (int limit = highest; limit >= lowest; limit -= step) {
    double tiles = 0.0, time = 0.0;  // of an expert
    for (const double deviation : deviations) {
      const double expert_rows = std::max(mean + deviation * spread, 1.0);
      const double count = std::ceil(expert_rows / limit);
      const double height = std::ceil(expert_rows / count / step) * step;
      tiles += count / std::size(deviations);
      time += count / std::size(deviations) * (std::max(height, 115.0 + 0.43 * height) + store);
    }
    const double pairs = tiles * static_cast<double>(num_experts * column_tiles) / 2;
    // A few tiles more than expected may begin a round.
    const double clusters = multiprocessors / 2;
    const double rounds = (std::ceil(pairs / clusters) + std::ceil(1.02 * pairs / clusters)) / 2;
    const double expected = rounds * time / tiles;
    if (expected < 0.995 * best_time) {
      best_time = expected;
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

// In the terms of expected_time. A wide pair fetches more: the operand that it shares is the narrow one. (176 columns,
// which divide the G layer's 1408, were measured slower there than 192 with their idle columns.)
inline double expected_weight_time(WeightShape shape, int64_t num_experts, int64_t height, int64_t width,
                                   int multiprocessors) {
  const int64_t tiles = ceil_div(height, kTileM * (shape.tall ? 2 : 1)) *
                        ceil_div(width, shape.columns * (shape.tall ? 1 : 2)) * num_experts;
  const int64_t rounds = ceil_div(tiles, multiprocessors / 2);
  const double narrow = shape.columns <= 128 ? 1.09 : 1.0;
  return static_cast<double>(rounds * shape.columns) * narrow * (shape.tall ? 1.0 : 1.03);
}

}  // namespace dit_moe::sm90
