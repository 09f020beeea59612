// Which output tiles a block computes: a fixed stride over all tiles of all experts, found from the offsets alone.
#pragma once

#include <stdint.h>

namespace dit_moe::sm90 {

struct Tile {
  int expert;
  int row;     // first row
  int end;     // end of the expert's rows
  int column;  // in tiles
};

struct Place {
  int row, column;  // in tiles
};

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

// Tiles are numbered expert by expert. Without offsets the only expert owns all rows.
template <int kRows>
class TileScheduler {
 public:
  __device__ __forceinline__ TileScheduler(const int32_t* offsets, int num_rows, int num_experts, int tiles_n,
                                           int group_m, int first, int step)
      : offsets_(offsets), num_experts_(num_experts), tiles_n_(tiles_n), group_m_(group_m), next_(first), step_(step) {
    start_ = offsets == nullptr ? 0 : __ldg(offsets);
    end_ = offsets == nullptr ? num_rows : __ldg(offsets + 1);
  }

  // False when no tile is left.
  __device__ __forceinline__ bool next(Tile& tile) {
    while (expert_ < num_experts_) {
      const int tiles = tiles_m() * tiles_n_;
      if (next_ < tiles) {
        place(next_, tile);
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
  __device__ __forceinline__ int tiles_m() const { return (end_ - start_ + kRows - 1) / kRows; }

  __device__ __forceinline__ void place(int local, Tile& tile) const {
    const Place place = sweep(local, tiles_m(), tiles_n_, group_m_);
    tile.expert = expert_;
    tile.row = start_ + place.row * kRows;
    tile.end = end_;
    tile.column = place.column;
  }

  const int32_t* offsets_;
  int num_experts_, tiles_n_, group_m_;
  int next_;  // counted from the current expert's first tile
  int step_;
  int expert_ = 0;
  int start_, end_;
};

struct WeightTile {
  int expert;
  int start, end;   // the expert's rows
  int row, column;  // of the gradient, in tiles
};

// The same for weight gradients: tiles_m x tiles_n tiles for every expert.
class WeightScheduler {
 public:
  __device__ __forceinline__ WeightScheduler(const int32_t* offsets, int num_experts, int tiles_m, int tiles_n,
                                             int group_m, int first, int step)
      : offsets_(offsets),
        num_tiles_(num_experts * tiles_m * tiles_n),
        tiles_m_(tiles_m),
        tiles_n_(tiles_n),
        group_m_(group_m),
        next_(first),
        step_(step) {}

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
