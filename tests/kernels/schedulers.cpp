// Checks csrc/sm90/scheduler.cuh's schedulers on the host: every row meets every column tile exactly once, blocks of a
// pair agree, and what they say they share is the same; every tile of a weight gradient comes once. Then the choice of
// tiles' height: the schedules of random loads take hardly longer than with the best height; and of narrow tiles'
// width. Prints the first case that fails and returns 1.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#define __device__
#define __forceinline__ inline
static int32_t __ldg(const int32_t* address) { return *address; }
static int32_t __ldcg(const int32_t* address) { return *address; }
using std::max;
using std::min;

#include "scheduler.cuh"

using namespace dit_moe::sm90;

namespace {

struct Case {
  std::vector<int32_t> offsets;
  int columns, max_height, clusters;
};

bool pair_agrees(const TokenTile& a, const TokenTile& b) {
  if (a.shared != b.shared) return false;
  if (a.shared == Shared::kNothing) return true;
  if (a.expert != b.expert || a.height != b.height) return false;
  return a.shared == Shared::kTokens ? a.row == b.row && b.column == a.column + 1 : a.column == b.column;
}

bool tile_fits(const Case& c, const TokenTile& tile) {
  if (tile.height <= 0 || tile.height % kHeightStep != 0 || tile.height > c.max_height) return false;
  if (tile.rows < 0 || tile.rows > tile.height || tile.column < 0 || tile.column >= c.columns) return false;
  return tile.rows == 0 || (tile.row >= c.offsets[tile.expert] && tile.row + tile.rows <= c.offsets[tile.expert + 1]);
}

const char* failure(const Case& c) {
  const int num_experts = static_cast<int>(c.offsets.size()) - 1, rows = c.offsets.back();
  std::vector<int> visits(static_cast<size_t>(rows) * c.columns);
  for (int cluster = 0; cluster < c.clusters; ++cluster) {
    TokenScheduler schedulers[2] = {
        {c.offsets.data(), rows, num_experts, c.columns, c.max_height, cluster, c.clusters},
        {c.offsets.data(), rows, num_experts, c.columns, c.max_height, cluster, c.clusters}};
    TokenTile tiles[2];
    while (true) {
      const bool one = schedulers[0].next(0, tiles[0]), other = schedulers[1].next(1, tiles[1]);
      if (one != other) return "one block of a pair ends before the other";
      if (!one) break;
      if (!pair_agrees(tiles[0], tiles[1])) return "what a pair shares is not the same";
      for (const TokenTile& tile : tiles) {
        if (!tile_fits(c, tile)) return "a tile is out of place";
        for (int row = tile.row; row < tile.row + tile.rows; ++row) ++visits[row * c.columns + tile.column];
      }
    }
  }
  const bool once = std::all_of(visits.begin(), visits.end(), [](int count) { return count == 1; });
  return once ? nullptr : "a row meets a column not exactly once";
}

// The same for an ItemScheduler, whose blocks' first tiles lie where their numbers say.
const char* failure_of_items(const Case& c) {
  const int num_experts = static_cast<int>(c.offsets.size()) - 1, rows = c.offsets.back();
  std::vector<int> visits(static_cast<size_t>(rows) * c.columns);
  for (int block = 0; block < min(c.clusters, num_experts * c.columns); ++block) {
    ItemScheduler scheduler(c.offsets.data(), num_experts, c.columns, block, c.clusters);
    Tile tile, expected;
    ItemScheduler::place(block, c.columns, expected);
    bool first = true;
    for (; scheduler.next(tile); first = false) {
      if (first && (tile.expert != expected.expert || tile.column != expected.column)) return "a first tile elsewhere";
      if (tile.row < c.offsets[tile.expert] || tile.end != c.offsets[tile.expert + 1]) return "an item out of place";
      if (tile.low != (tile.end - tile.row <= kTileM / 2)) return "an item of the wrong height";
      for (int row = tile.row; row < min(tile.end, tile.row + kTileM); ++row) ++visits[row * c.columns + tile.column];
    }
    if (first) return "a block without a tile";
  }
  const bool once = std::all_of(visits.begin(), visits.end(), [](int count) { return count == 1; });
  return once ? nullptr : "a row meets a column of an item not exactly once";
}

// Every tile of a weight gradient, tiles_m x tiles_n for every expert, comes once, with the expert's rows.
const char* failure_of_weights(const Case& c, int tiles_m, int tiles_n) {
  const int num_experts = static_cast<int>(c.offsets.size()) - 1;
  std::vector<int> visits(static_cast<size_t>(num_experts) * tiles_m * tiles_n);
  for (int cluster = 0; cluster < c.clusters; ++cluster) {
    WeightScheduler scheduler(c.offsets.data(), num_experts, tiles_m, tiles_n, cluster, c.clusters);
    for (WeightTile tile; scheduler.next(tile);) {
      if (tile.row >= tiles_m || tile.column >= tiles_n) return "a weight tile out of place";
      if (tile.start != c.offsets[tile.expert] || tile.end != c.offsets[tile.expert + 1])
        return "another expert's rows";
      ++visits[(tile.expert * tiles_m + tile.row) * tiles_n + tile.column];
    }
  }
  const bool once = std::all_of(visits.begin(), visits.end(), [](int count) { return count == 1; });
  return once ? nullptr : "a weight tile comes not exactly once";
}

// The same for a TileScheduler. Blocks without a neighbour split nothing; pairs split no more than kTileM rows.
template <int kCluster>
const char* failure_of_tiles(const Case& c) {
  const int num_experts = static_cast<int>(c.offsets.size()) - 1, rows = c.offsets.back();
  std::vector<int> visits(static_cast<size_t>(rows) * c.columns);
  for (int cluster = 0; cluster < c.clusters; ++cluster) {
    const TileScheduler<kCluster> start(c.offsets.data(), rows, num_experts, c.columns, 1 + c.max_height / 64, cluster,
                                        c.clusters);
    std::vector<TileScheduler<kCluster>> schedulers(kCluster, start);
    Tile tiles[kCluster];
    while (true) {
      int found = 0;
      for (int block = 0; block < kCluster; ++block) found += schedulers[block].next(block, tiles[block]);
      if (found % kCluster != 0) return "one block of a pair ends before the other";
      if (found == 0) break;
      for (int block = 0; block < kCluster; ++block) {
        const Tile& first = tiles[0];
        const Tile& tile = tiles[block];
        if (tile.split != first.split || tile.expert != first.expert) return "a pair does not agree";
        if (tile.split && (kCluster == 1 || tile.row != first.row)) return "a split tile's rows are not the same";
        if (tile.low != (c.offsets[tile.expert + 1] - tile.row <= kTileM / 2)) return "a tile is low or is not";
        if (!tile.split && (tile.row != first.row + block * kTileM || tile.column != first.column)) {
          return "a pair's rows are no neighbours, or its columns not the same";
        }
        if (tile.column < 0 || tile.column >= c.columns || tile.row < c.offsets[tile.expert]) return "out of place";
        for (int row = tile.row; row < std::min(tile.row + kTileM, tile.end); ++row) {
          ++visits[row * c.columns + tile.column];
        }
      }
    }
  }
  const bool once = std::all_of(visits.begin(), visits.end(), [](int count) { return count == 1; });
  return once ? nullptr : "a row meets a column not exactly once";
}

// As a product's blocks choose it.
int chosen_height(const Case& c, int depth) {
  float times[kHeightLimits], least = 1e30f;
  for (int number = 0; number < kHeightLimits; ++number) {
    HeightEstimate estimate(height_limit(number), depth);
    for (size_t expert = 1; expert < c.offsets.size(); ++expert)
      estimate.add(c.offsets[expert] - c.offsets[expert - 1]);
    times[number] = estimate.time(c.columns, c.clusters);
    least = std::min(least, times[number]);
  }
  int number = 0;
  while (times[number] > kNearly * least) ++number;
  return height_limit(number);
}

// When the last cluster is done, where a tile costs what HeightEstimate says.
double duration(Case c, int max_height, int depth) {
  double last = 0.0;
  for (int cluster = 0; cluster < c.clusters; ++cluster) {
    TokenScheduler scheduler(c.offsets.data(), c.offsets.back(), static_cast<int>(c.offsets.size()) - 1, c.columns,
                             max_height, cluster, c.clusters);
    double time = 0.0;
    for (TokenTile tile; scheduler.next(0, tile);) {
      time += HeightEstimate(max_height, depth).cost(static_cast<float>(tile.height));
    }
    last = std::max(last, time);
  }
  return last;
}

// Prints what is wrong with the heights of experts whose loads are uneven by a half, if anything is.
bool heights_fail(std::mt19937& random) {
  double excess = 0.0;
  constexpr int trials = 300;
  for (int trial = 0; trial < trials; ++trial) {
    const int num_experts = trial % 2 ? 8 : 16, mean = 256 << random() % 5, depth = 1536 << random() % 3;
    Case c{{0}, 3 + static_cast<int>(random() % 9), kMaxHeight, 66};
    for (int expert = 0; expert < num_experts; ++expert) {
      c.offsets.push_back(c.offsets.back() + static_cast<int>(mean / 2 + random() % mean));
    }
    double best = 1e30;
    for (int number = 0; number < kHeightLimits; ++number) {
      best = std::min(best, duration(c, height_limit(number), depth));
    }
    excess += duration(c, chosen_height(c, depth), depth) / best - 1.0;
  }
  if (excess / trials < 0.03) return false;
  std::printf("schedules take on average %.3f more than with the best heights", excess / trials);
  return true;
}

// When the last of c.clusters blocks is done with its narrow tiles of `columns`, where a tile costs what it fetches.
int narrow_duration(const Case& c, int width, int columns) {
  const int num_experts = static_cast<int>(c.offsets.size()) - 1;
  int last = 0;
  for (int block = 0; block < c.clusters; ++block) {
    TileScheduler<1> scheduler(c.offsets.data(), c.offsets.back(), num_experts, (width + columns - 1) / columns, 16,
                               block, c.clusters);
    int time = 0;
    for (Tile tile; scheduler.next(0, tile);) time += columns + (tile.low ? kTileM / 2 : kTileM);
    last = std::max(last, time);
  }
  return last;
}

// Prints what is wrong with the widths of narrow tiles for the models' sizes and random loads, if anything is.
bool widths_fail(std::mt19937& random) {
  double excess = 0.0, narrowest = 0.0, widest = 0.0;
  constexpr int trials = 500, multiprocessors = 132;
  constexpr int models[][2] = {{384, 8}, {768, 8}, {1024, 8}, {1152, 8}, {1408, 16}};
  for (int trial = 0; trial < trials; ++trial) {
    const auto [width, num_experts] = models[trial % 5];
    std::vector<int32_t> loads(num_experts);
    const int rows = (32 << random() % 5) * num_experts / 8;
    for (int row = 0; row < rows; ++row) ++loads[random() % num_experts];
    Case c{{0}, 0, 0, multiprocessors};
    for (const int32_t load : loads) c.offsets.push_back(c.offsets.back() + load);
    const int times[] = {narrow_duration(c, width, 64), narrow_duration(c, width, 96), narrow_duration(c, width, 128)};
    const double best = *std::min_element(times, times + 3);
    excess += narrow_duration(c, width, narrow_columns(rows, width, num_experts, multiprocessors)) / best - 1.0;
    narrowest += times[0] / best - 1.0;
    widest += times[2] / best - 1.0;
  }
  if (excess < 0.05 * trials && excess < 0.5 * std::min(narrowest, widest)) return false;
  std::printf("narrow tiles take on average %.3f more than with the best width, always 64 %.3f, always 128 %.3f\n",
              excess / trials, narrowest / trials, widest / trials);
  return true;
}

}  // namespace

int main() {
  std::mt19937 random(0);
  const auto below = [&](int bound) { return static_cast<int>(random() % bound); };
  for (int trial = 0; trial < 2000; ++trial) {
    Case c{{0}, 1 + below(12), kHeightStep * (1 + below(16)), trial % 4 ? 1 + below(70) : 66};
    const int num_experts = 1 + below(9), most = trial % 2 ? 40 : trial % 8 ? 3000 : 9000;  // the last: kManyRows
    for (int expert = 0; expert < num_experts; ++expert) {
      c.offsets.push_back(c.offsets.back() + (below(3) == 0 ? 0 : below(most)));
    }
    const char* what = failure(c);
    if (what == nullptr) what = failure_of_tiles<1>(c);
    if (what == nullptr) what = failure_of_tiles<2>(c);
    if (what == nullptr) what = failure_of_items(c);
    if (what == nullptr) what = failure_of_weights(c, 1 + below(40), 1 + below(40));
    if (what != nullptr) {
      std::printf("trial %d, %d experts, %d rows, %d columns, height %d, %d clusters: %s\n", trial, num_experts,
                  c.offsets.back(), c.columns, c.max_height, c.clusters, what);
      return 1;
    }
  }
  return heights_fail(random) || widths_fail(random) ? 1 : 0;
}
