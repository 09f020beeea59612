// Host side: which tile shape a grouped product takes. Rows per expert are known to the device alone, so the choice
// rests on their mean.
#pragma once

#include <stdint.h>

namespace dit_moe::sm90 {

constexpr int kTileM = 128;

struct TileShape {
  int columns;  // of the product
  int cluster;  // blocks of kTileM rows that share the weights
};

inline bool operator==(TileShape a, TileShape b) { return a.columns == b.columns && a.cluster == b.cluster; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The time that a shape is expected to take, in no particular unit: rounds of the whole GPU times columns, times what
// was measured on an H100 beyond that (ratios at equal rounds, T = 4096 and 32768 on the XL and G layers). Narrow tiles
// load more per product; blocks alone fetch the weights twice as often, which deep products feel most.
inline double expected_time(TileShape shape, bool deep, int64_t rows, int64_t num_experts, int64_t columns,
                            int multiprocessors) {
  const double mean = static_cast<double>(rows) / static_cast<double>(num_experts) / (kTileM * shape.cluster);
  const double row_tiles = static_cast<double>(num_experts) * (mean > 0.5 ? mean + 0.5 : 1.0);
  const auto tiles = static_cast<int64_t>(row_tiles * static_cast<double>(ceil_div(columns, shape.columns)));
  const int64_t rounds = ceil_div(tiles, multiprocessors / shape.cluster);
  const double narrow = shape.columns <= 128 ? 1.09 : shape.columns < 192 ? 1.02 : 1.0;
  const double alone = shape.cluster > 1 ? 1.0 : deep ? 1.15 : 1.03;
  return static_cast<double>(rounds * shape.columns) * narrow * alone;
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

// `deep`: the product is deeper than wide.
template <int kCount>
TileShape choose_tile(const TileShape (&shapes)[kCount], bool deep, int64_t rows, int64_t num_experts, int64_t columns,
                      int multiprocessors) {
  return fastest(
      shapes, [&](TileShape shape) { return expected_time(shape, deep, rows, num_experts, columns, multiprocessors); });
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
