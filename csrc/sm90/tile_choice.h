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

// The shape with the least expected time; the first of equals. `deep`: the product is deeper than wide.
template <int kCount>
TileShape choose_tile(const TileShape (&shapes)[kCount], bool deep, int64_t rows, int64_t num_experts, int64_t columns,
                      int multiprocessors) {
  TileShape best = shapes[0];
  double best_time = expected_time(best, deep, rows, num_experts, columns, multiprocessors);
  for (int i = 1; i < kCount; ++i) {
    const double time = expected_time(shapes[i], deep, rows, num_experts, columns, multiprocessors);
    if (time < best_time) {
      best = shapes[i];
      best_time = time;
    }
  }
  return best;
}

}  // namespace dit_moe::sm90
