// Host side: which tile shape a grouped product takes. Rows per expert are known to the device alone, so the choice
// rests on their mean.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace dit_moe::sm90 {

constexpr int kTileM = 128;
// Of tiles that are as high as an expert's rows ask for.
constexpr int kHeightStep = 16;
constexpr int kMaxHeight = 256;
// Wide tiles are at most as high as wide and have a third consumer. A block receives a tenth less for them, which takes
// less energy, and that is what there is too little of where experts have many rows.
constexpr int kWideColumns = 192;
constexpr int kWideHeight = 192;
// Of an expert, on average: from here on, what matters is the bytes that are fetched, and no longer rounds of tiles.
constexpr int kManyRows = 2048;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether experts have so few rows that a product takes as long as its weights need to be fetched. Then blocks work
// alone on narrow tiles of kTileM rows, so that all multiprocessors fetch.
inline bool few_rows(int64_t rows, int64_t num_experts) { return rows <= kTileM * num_experts; }

// Whether so few that nearly every expert has one tile of them in each column.
inline bool very_few_rows(int64_t rows, int64_t num_experts) { return 2 * rows <= kTileM * num_experts; }

// Whether tiles are wide: experts have many rows, and no columns are left idle.
inline bool wide_tiles(int64_t rows, int64_t width, int64_t num_experts) {
  return rows > kManyRows * num_experts && width % kWideColumns == 0;
}

constexpr int kWidestNarrow = 128;
constexpr int kNarrowSwiGLU = 96;  // columns of the product, half of them gate; 64 to 192 are within 4 % of the best

// Whether the blocks of a product with SwiGLU work in pairs, which fetch the weights once for both: on an H100 up to 14
// % faster, but where the loop over the depth is short, or no expert has rows for both, 2 to 20 % slower.
inline bool in_pairs(int64_t rows, int64_t num_experts, int64_t depth) {
  return depth >= 512 && rows > kTileM / 2 * num_experts;
}

// The same with the gradient of SwiGLU, which waits for other bytes: with 4096 rows an expert it is 1.5 % faster in
// pairs, with 512 up to 4 % slower.
inline bool gradient_in_pairs(int64_t rows, int64_t num_experts, int64_t depth) {
  return in_pairs(rows, num_experts, depth) && rows >= 32 * kTileM * num_experts;
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

// The width of a narrow tile of the plain product. An expert's second row tile, which needs the weights again, is the
// likelier the more rows it has on average; a step of the depth costs the rows' bytes and the columns'.
inline int narrow_columns(int64_t rows, int64_t width, int64_t num_experts, int multiprocessors) {
  constexpr int widths[] = {64, 96, kWidestNarrow};
  const double mean = static_cast<double>(rows) / static_cast<double>(num_experts), share = mean / kTileM;
  const double row_tiles = static_cast<double>(std::min(num_experts, rows)) * (1.0 + 0.6 * share * share);
  const int fetched_rows = mean <= kTileM / 2 ? 96 : kTileM;
  return fastest(widths, [&](int columns) {
    const double tiles = row_tiles * static_cast<double>(ceil_div(width, columns));
    return std::ceil(tiles / multiprocessors) * (columns + fetched_rows);
  });
}

// ---- weight gradients: as many tiles for every expert, each as deep as the expert has rows

struct WeightShape {
  int columns;  // of a tile
  bool tall;    // the two blocks of a cluster are neighbours along the rows of the product, otherwise along the columns
  bool turned;  // the product is the gradient turned
};

inline bool operator==(WeightShape a, WeightShape b) {
  return a.columns == b.columns && a.tall == b.tall && a.turned == b.turned;
}

// Of a tile: wide ones are square.
constexpr int rows_of(WeightShape shape) { return shape.columns == kWideColumns ? kWideColumns : kTileM; }

// In rounds of the whole GPU times columns of 128 elements. A wide pair fetches more: the operand that it shares is the
// narrow one. Three consumers have no registers to store a tile beside the products of the next, as two can
// (stores_beside), which counts where a tile is done in a few steps. (176 columns, which divide the G layer's 1408,
// were measured slower there than 192 with their idle columns.)
inline double expected_weight_time(WeightShape shape, int64_t rows, int64_t num_experts, int64_t height, int64_t width,
                                   int multiprocessors, bool stores_beside) {
  if (shape.turned) std::swap(height, width);
  const int64_t tiles = ceil_div(height, rows_of(shape) * (shape.tall ? 2 : 1)) *
                        ceil_div(width, shape.columns * (shape.tall ? 1 : 2)) * num_experts;
  const int64_t rounds = ceil_div(tiles, multiprocessors / 2);
  const double narrow = shape.columns <= 128 ? 1.09 : 1.0;
  const double mean = std::max(static_cast<double>(rows) / static_cast<double>(num_experts), 1.0);
  const double stored = stores_beside && shape.columns == kWideColumns ? 1.0 + 83.0 / mean : 1.0;
  return static_cast<double>(rounds * shape.columns * rows_of(shape)) / kTileM * narrow * stored *
         (shape.tall ? 1.0 : 1.03);
}

}  // namespace dit_moe::sm90
