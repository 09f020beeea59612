// Which output tiles a block computes: a fixed stride over all tiles of all experts, found from the offsets alone.
#pragma once

#include <stdint.h>

#include "tile_choice.h"

namespace dit_moe::sm90 {

struct Tile {
  int expert;
  int row;     // first row of this block's part
  int end;     // end of the expert's rows
  int column;  // in tiles
  bool split;  // along the columns: the cluster's blocks have the same rows
  bool low;    // there are no rows in the lower half of kTileM
};

struct Place {
  int row, column;  // in tiles
};

// The first tile of a cluster, which then strides over all. Tiles of neighbouring numbers share operands, and clusters
// in the same group of multiprocessors (GPC) read from the L2 cache once what they ask for at nearly the same time,
// each for itself: so the clusters of a group get neighbouring numbers. This is the order in which an H100 or H200
// deals out 66 clusters of two blocks to its groups of 8 or 9 (as %smid shows it); on any other GPU it is one order
// among others.
__device__ __forceinline__ int first_tile(int cluster, int clusters) {
  if (clusters != 66) return cluster;
  if (cluster < 4) return 4 + cluster;
  const int place = cluster - 4;
  int group = place % 8, index = place / 8;
  if (place >= 60) {
    group = place - 54;
    index = 8;
  } else if (place >= 32) {
    group = (place - 32) % 7 + 1;
    index = (place - 32) / 7 + 4;
  }
  return group * 8 + index + (group == 7);
}

// The place of a tile's number within an expert: groups of `group_m` row tiles sweep over the columns together, so that
// a wave of blocks shares both operands in the L2 cache.
__device__ __forceinline__ Place sweep(int number, int tiles_m, int tiles_n, int group_m) {
  const int width = group_m * tiles_n;
  const int group = number / width;
  const int height = min(tiles_m - group * group_m, group_m);
  const int place = number - group * width;
  const int column = place / height;
  return {group * group_m + place - column * height, column};
}

// Tiles are numbered expert by expert. A cluster's tile is kTileM rows a block, of neighbouring rows; where two blocks
// are left with no more than kTileM rows of an expert, they take neighbouring columns of these. Without offsets the
// only expert owns all rows.
template <int kCluster>
class TileScheduler {
 public:
  __device__ __forceinline__ TileScheduler(const int32_t* offsets, int64_t num_rows, int num_experts, int tiles_n,
                                           int group_m, int cluster, int clusters)
      : offsets_(offsets),
        num_experts_(num_experts),
        tiles_n_(tiles_n),
        group_m_(group_m),
        next_(first_tile(cluster, clusters)),
        step_(clusters) {
    const int rows = static_cast<int>(num_rows);
    start_ = offsets == nullptr ? 0 : __ldg(offsets);
    end_ = offsets == nullptr ? rows : __ldg(offsets + 1);
  }

  // The part that block 0 or 1 of a cluster has of the next tile. False when none is left.
  __device__ __forceinline__ bool next(int block, Tile& tile) {
    while (expert_ < num_experts_) {
      const int tiles = tiles_m() * tiles_n_ + (split() ? (tiles_n_ + 1) / 2 : 0);
      if (next_ < tiles) {
        tile.expert = expert_;
        tile.end = end_;
        place(block, tile);
        next_ += step_;
        return true;
      }
      next_ -= tiles;
      start_ = end_;
      if (++expert_ < num_experts_) end_ = __ldg(offsets_ + expert_ + 1);
    }
    return false;
  }

 private:
  static constexpr int kRows = kCluster * kTileM;

  // But for the rows of split tiles.
  __device__ __forceinline__ int tiles_m() const { return (end_ - start_ + kTileM - 1) / kRows; }
  __device__ __forceinline__ bool split() const { return end_ - start_ > tiles_m() * kRows; }

  // Split tiles come between the others of their columns, which need the same weights.
  __device__ __forceinline__ void place(int block, Tile& tile) const {
    const int before = max(tiles_m() - 1, 0) / group_m_ * group_m_;  // row tiles of whole groups
    const int height = tiles_m() - before, number = next_ - before * tiles_n_;
    Place place;
    tile.split = false;
    if (number < 0 || !split()) {
      place = sweep(next_, tiles_m(), tiles_n_, group_m_);
    } else {
      const int pair = number / (2 * height + 1), rest = number - pair * (2 * height + 1);
      const bool second = rest >= height && 2 * pair + 1 < tiles_n_;
      place = {before + rest - second * height, 2 * pair + second};
      tile.split = place.row == tiles_m();
    }
    tile.row = start_ + place.row * kRows + (tile.split ? 0 : block * kTileM);
    tile.low = end_ - tile.row <= kTileM / 2;
    tile.column = place.column;
    if (!tile.split) return;
    tile.column = place.column / 2 * 2 + block;
    if (tile.column < tiles_n_) return;
    --tile.column;  // an odd number of columns: nothing is left for this block, which stores no row of its neighbour's
    tile.end = tile.row;
  }

  const int32_t* offsets_;
  int num_experts_, tiles_n_, group_m_;
  int next_;  // counted from the current expert's first tile
  int step_;
  int expert_ = 0;
  int start_, end_;
};

// Where experts have few rows: a block strides over items, each an expert's columns of one tile for all of its rows. So
// a block's first weights follow from its number, and are fetched before anyone knows the rows. The first item has a
// tile even if the expert has no rows.
class ItemScheduler {
 public:
  __device__ __forceinline__ ItemScheduler(const int32_t* offsets, int num_experts, int tiles_n, int block, int blocks)
      : offsets_(offsets), num_items_(num_experts * tiles_n), tiles_n_(tiles_n), step_(blocks) {
    enter(block);
  }

  // Sets which weights an item needs.
  static __device__ __forceinline__ void place(int item, int tiles_n, Tile& tile) {
    tile.expert = item / tiles_n;
    tile.column = item - tile.expert * tiles_n;
    tile.split = false;
  }

  // False when no tile is left.
  __device__ __forceinline__ bool next(Tile& tile) {
    for (; item_ < num_items_; enter(item_ + step_)) {
      if (row_ >= end_ && !first_) continue;
      first_ = false;
      place(item_, tiles_n_, tile);
      tile.row = row_;
      tile.end = end_;
      tile.low = end_ - row_ <= kTileM / 2;
      row_ += kTileM;
      return true;
    }
    return false;
  }

 private:
  // Not through the read-only path: the offsets were written after the kernel started.
  __device__ __forceinline__ void enter(int item) {
    item_ = item;
    if (item >= num_items_) return;
    row_ = __ldcg(offsets_ + item / tiles_n_);
    end_ = __ldcg(offsets_ + item / tiles_n_ + 1);
  }

  const int32_t* offsets_;
  int num_items_, tiles_n_, step_;
  int item_, row_, end_;
  bool first_ = true;
};

// ---- tiles of equal height

// What a product is expected to take whose tiles have at most `limit` rows: when the last pair of blocks is done with
// its share, where a tile costs its height, and a low one waits for its weights. In no particular unit. The constants
// are a fit to times on an H100 of heights from 192 to 256, models S to G, 2048 to 32768 tokens.
class HeightEstimate {
 public:
  // depth: of the product, which a tile's other costs are spread over.
  __device__ __forceinline__ HeightEstimate(int limit, int depth)
      : limit_(static_cast<float>(limit)), other_(300.0f * 64.0f / static_cast<float>(depth)) {}

  // An expert's rows.
  __device__ __forceinline__ void add(int num_rows) {
    const auto rows = static_cast<float>(num_rows);
    const float tiles = rounded_up(rows, limit_);
    const float height = rounded_up(rows, fmaxf(tiles, 1.0f) * kHeightStep) * kHeightStep;
    const float cost_here = cost(height);
    count_ += tiles;
    sum_ += tiles * cost_here;
    squares_ += tiles * cost_here * cost_here;
  }

  // Of a tile.
  __device__ __forceinline__ float cost(float height) const { return fmaxf(height, 115.0f + 0.5f * height) + other_; }

  // exchange(value): what another lane, which has counted other experts, has for this value.
  template <typename Exchange>
  __device__ __forceinline__ void join(const Exchange& exchange) {
    count_ += exchange(count_);
    sum_ += exchange(sum_);
    squares_ += exchange(squares_);
  }

  // tiles_n: of a row.
  __device__ __forceinline__ float time(int tiles_n, int clusters) const {
    const float mean = sum_ / fmaxf(count_, 1.0f), variance = squares_ / fmaxf(count_, 1.0f) - mean * mean;
    const float rounds = count_ * static_cast<float>(tiles_n) / static_cast<float>(2 * clusters);
    const float whole = ceilf(rounds - 1e-4f);
    const float last = whole * mean + 0.5f * sqrtf(fmaxf(whole * variance, 0.0f));
    return 0.8f * last + 0.2f * rounds * mean;  // an incomplete round has the memory to itself
  }

 private:
  // a / b, whole numbers, rounded up. The half is much more than the error of a fast division, which matters: all
  // blocks wait for it.
  static __device__ __forceinline__ float rounded_up(float a, float b) {
#ifdef __CUDA_ARCH__
    return floorf(__fdividef(a + b - 0.5f, b));
#else
    return floorf((a + b - 0.5f) / b);
#endif
  }

  float limit_, other_;
  float count_ = 0.0f, sum_ = 0.0f, squares_ = 0.0f;  // of tiles of a column, and their costs
};

// The limits that are compared: kMaxHeight, kMaxHeight - kHeightStep, ... The highest is taken whose time is nearly the
// least.
constexpr float kNearly = 1.005f;
constexpr int kHeightLimits = kMaxHeight / kHeightStep - 2;
__device__ __forceinline__ int height_limit(int number) { return kMaxHeight - number * kHeightStep; }

enum class Shared { kTokens, kWeights, kNothing };

// A tile of a product's rows ("tokens") and columns. Its height is what the product computes, `rows` of it are stored.
struct TokenTile {
  int expert;
  int row;        // first row
  int rows;       // to be stored; none of a tile that the pair's other block has too
  int height;     // a multiple of kHeightStep
  int column;     // in tiles
  Shared shared;  // with the pair's other tile
};

// Cuts each expert's rows into as few tiles as `max_height` allows, all of one height: so each wastes less than
// kHeightStep rows, however many rows an expert has. Tiles are dealt out in pairs, one a cluster: neighbours in a row,
// which share its tokens. Of an odd number of columns the last one's tiles are neighbours in the column, which share
// its weights; one without a neighbour shares nothing with the next group's first.
class TokenScheduler {
 public:
  __device__ __forceinline__ TokenScheduler(const int32_t* offsets, int64_t num_rows, int num_experts, int tiles_n,
                                            int max_height, int cluster, int clusters)
      : offsets_(offsets),
        num_rows_(static_cast<int>(num_rows)),
        num_experts_(num_experts),
        tiles_n_(tiles_n),
        max_height_(max_height),
        group_(num_rows > int64_t{kManyRows} * num_experts && tiles_n <= kFewColumns ? 2 : 16),
        next_(first_tile(cluster, clusters)),
        step_(clusters) {
    enter(0);
    skip_empty();
  }

  // The tile that block 0 or 1 of a cluster takes of the next pair. False when none is left.
  __device__ __forceinline__ bool next(int block, TokenTile& tile) {
    while (expert_ < num_experts_) {
      const int pairs = tiles_n_ / 2 * rows() + tiles_n_ % 2 * (rows() - taken_ + 1) / 2;
      if (next_ < pairs) {
        place(next_, block, tile);
        next_ += step_;
        return true;
      }
      next_ -= pairs;
      leave();
    }
    return false;
  }

 private:
  static constexpr int kFewColumns = 24;  // in tiles

  // Row tiles of the current group.
  __device__ __forceinline__ int rows() const { return min(tiles_m_ - first_, group_); }

  __device__ __forceinline__ void enter(int expert) {
    expert_ = expert;
    first_ = 0;
    if (expert >= num_experts_) return;
    start_ = offsets_ == nullptr ? 0 : __ldg(offsets_ + expert);
    end_ = offsets_ == nullptr ? num_rows_ : __ldg(offsets_ + expert + 1);
    const int num_rows = end_ - start_;
    const int fewest = max((num_rows + max_height_ - 1) / max_height_, 1);
    height_ = max((num_rows + fewest * kHeightStep - 1) / (fewest * kHeightStep), 1) * kHeightStep;
    tiles_m_ = (num_rows + height_ - 1) / height_;
  }

  __device__ __forceinline__ void skip_empty() {
    while (expert_ < num_experts_ && first_ >= tiles_m_) enter(expert_ + 1);
  }

  // Goes on to the next group that has rows.
  __device__ __forceinline__ void leave() {
    taken_ = tiles_n_ % 2 * (rows() - taken_) % 2;
    first_ += group_;
    skip_empty();
  }

  __device__ __forceinline__ void place(int number, int block, TokenTile& tile) const {
    const int columns = number / rows();  // to the left, in pairs
    if (columns < tiles_n_ / 2) {
      set(number - columns * rows(), 2 * columns + block, Shared::kTokens, tile);
      return;
    }
    const int row = taken_ + 2 * (number - tiles_n_ / 2 * rows());  // of the pair's first
    if (row + 1 < rows()) {
      set(row + block, tiles_n_ - 1, Shared::kWeights, tile);
      return;
    }
    TokenScheduler other = *this;
    if (block == 1) other.leave();
    const bool repeats = other.expert_ >= num_experts_;
    if (block == 0 || repeats) {
      set(row, tiles_n_ - 1, Shared::kNothing, tile);
    } else {
      other.set(0, tiles_n_ - 1, Shared::kNothing, tile);
    }
    if (repeats) tile.rows = 0;
  }

  // row: in tiles, from the group's first.
  __device__ __forceinline__ void set(int row, int column, Shared shared, TokenTile& tile) const {
    tile.expert = expert_;
    tile.row = start_ + (first_ + row) * height_;
    tile.rows = min(end_ - tile.row, height_);
    tile.height = height_;
    tile.column = column;
    tile.shared = shared;
  }

  const int32_t* offsets_;
  int num_rows_, num_experts_, tiles_n_, max_height_;
  // Row tiles that sweep over the columns together, so that a wave of blocks shares both operands in the L2 cache.
  // Where a wave takes all columns of several rows, groups are small: few rows are then left for the next wave to fetch
  // again.
  int group_;
  int next_;  // counted from the current group's first pair
  int step_;
  int expert_, start_, end_;
  int height_, tiles_m_;
  int first_;      // row tile of the group
  int taken_ = 0;  // 1: the first tile of the group's last column is in the pair before the group
};

struct WeightTile {
  int expert;
  int start, end;   // the expert's rows
  int row, column;  // of the gradient, in tiles
};

// The same for weight gradients: tiles_m x tiles_n tiles for every expert. A wave of blocks takes the shorter side as a
// whole, so that what lies along the longer one is fetched once; of two long sides, a square.
class WeightScheduler {
 public:
  __device__ __forceinline__ WeightScheduler(const int32_t* offsets, int num_experts, int tiles_m, int tiles_n,
                                             int cluster, int clusters)
      : offsets_(offsets),
        num_tiles_(num_experts * tiles_m * tiles_n),
        tiles_m_(tiles_m),
        tiles_n_(tiles_n),
        group_m_(min(tiles_m, tiles_n) > 16 ? 8
                 : tiles_m <= tiles_n       ? tiles_m
                                            : 1),
        next_(first_tile(cluster, clusters)),
        step_(clusters) {}

  // False when no tile is left.
  __device__ __forceinline__ bool next(WeightTile& tile) {
    if (next_ >= num_tiles_) return false;
    tile.expert = next_ / (tiles_m_ * tiles_n_);
    tile.start = __ldg(offsets_ + tile.expert);
    tile.end = __ldg(offsets_ + tile.expert + 1);
    const Place place = sweep(next_ - tile.expert * tiles_m_ * tiles_n_, tiles_m_, tiles_n_, group_m_);
    tile.row = place.row;
    tile.column = place.column;
    next_ += step_;
    return true;
  }

 private:
  const int32_t* offsets_;
  int num_tiles_, tiles_m_, tiles_n_, group_m_, next_, step_;
};

}  // namespace dit_moe::sm90
