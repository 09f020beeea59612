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

// Tiles are numbered expert by expert. Within an expert, groups of `group_m` row tiles sweep over the columns together,
// so that a wave of blocks shares both rows and weights in the L2 cache.
template <int kRows>
class TileScheduler {
 public:
  __device__ __forceinline__ TileScheduler(const int32_t* offsets, int num_experts, int tiles_n, int group_m, int first,
                                           int step)
      : offsets_(offsets), num_experts_(num_experts), tiles_n_(tiles_n), group_m_(group_m), next_(first), step_(step) {
    start_ = __ldg(offsets_);
    end_ = num_experts_ > 0 ? __ldg(offsets_ + 1) : start_;
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
    const int width = group_m_ * tiles_n_;
    const int group = local / width;
    const int height = min(tiles_m() - group * group_m_, group_m_);
    const int place = local - group * width;
    const int column = place / height;
    tile.expert = expert_;
    tile.row = start_ + (group * group_m_ + place - column * height) * kRows;
    tile.end = end_;
    tile.column = column;
  }

  const int32_t* offsets_;
  int num_experts_, tiles_n_, group_m_;
  int next_;  // counted from the current expert's first tile
  int step_;
  int expert_ = 0;
  int start_, end_;
};

}  // namespace dit_moe::sm90
