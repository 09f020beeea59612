// Grouped matrix product for Hopper: out[rows of expert e] = A[rows of expert e] W[e].
//
// The instruction's rows are columns of W and its columns are rows of A ("tokens"): it takes 64 of the former at a
// time, but any multiple of 8 of the latter, so a tile is as high as an expert's rows ask for. A block computes 128
// columns of the product for up to 256 tokens, or 192 for up to 192; the two blocks of a cluster share the tokens or
// the weights of neighbouring tiles.
#pragma once

#include "pipeline.cuh"
#include "scheduler.cuh"
#include "token_store.cuh"

namespace dit_moe::sm90 {

template <typename Element_, bool kTransposed_, int kGroups_>
struct Config {
  using Element = Element_;
  static constexpr bool kTransposed = kTransposed_;  // W is (E, K, N) in memory instead of (E, N, K)
  static constexpr int kCluster = 2;
  static constexpr int kGroups = kGroups_;                                 // consumers, of which each has 64 columns
  static constexpr int kColumns = 64 * kGroups;                            // of a tile
  static constexpr int kHeight = kGroups == 2 ? kMaxHeight : kWideHeight;  // at most
  // W comes in boxes of 64 rows of 64 elements, one for each warpgroup, and tokens in boxes of as many.
  static constexpr int kBoxTokens = 64;
  static constexpr int kBoxBytes = 64 * kSwizzleBytes;
  using Layout = SharedLayout<kGroups * kBoxBytes, kHeight * kSwizzleBytes, kGroups>;
};

struct GroupedArguments {
  const int32_t* offsets;  // (num_experts + 1,), or null: one expert with all rows
  void* out;               // (rows, width)
  int num_experts;
  int depth;  // K
  int width;  // columns of out
  int64_t rows;
};

template <class C>
class Block : public Pipeline<typename C::Layout, C::kCluster> {
  using Base = Pipeline<typename C::Layout, C::kCluster>;
  using Base::full, Base::rank, Base::stage_a, Base::stage_b;
  using typename Base::QueueRing;

 public:
  using Element = typename C::Element;
  using Arguments = GroupedArguments;
  using Layout = typename C::Layout;
  static constexpr int kCluster = C::kCluster;
  static constexpr bool kOverlaps = !C::kTransposed;

  __device__ __forceinline__ Block(const CUtensorMap& map_x, const CUtensorMap& map_w, const Arguments& arguments,
                                   uint32_t shared)
      : Base(shared), map_x_(map_x), map_w_(map_w), arguments_(arguments) {
    steps_ = (arguments.depth + kTileK - 1) / kTileK;
  }

  // A warp: its lanes compare limits for the tiles' height by the experts' rows, and the first one schedules.
  __device__ __forceinline__ void schedule() const {
    const int tiles_n = (arguments_.width + C::kColumns - 1) / C::kColumns, clusters = gridDim.x / kCluster;
    const int max_height = choose_height(tiles_n, clusters);
    if (threadIdx.x % 32 != 0) return;
    TokenScheduler scheduler(arguments_.offsets, arguments_.rows, arguments_.num_experts, tiles_n, max_height,
                             blockIdx.x / kCluster, clusters);
    this->template announce<TokenTile>([&](TokenTile& tile) { return scheduler.next(rank(), tile); });
  }

  // A warp: everything comes through the copy engine.
  __device__ __forceinline__ void produce() const {
    QueueRing queue;
    typename Base::StageRing ring;
    TokenTile tile;
    int boxes;
    const auto weights = [&](int stage, int step) { copy_weights(stage, tile, step); };
    const auto tokens = [&](int stage, int step) { copy_tokens(stage, tile, step, boxes); };
    for (bool first = kOverlaps; this->next_tile(queue, tile); first = false) {
      boxes = (tile.height + C::kBoxTokens - 1) / C::kBoxTokens;
      const uint32_t bytes = Layout::kBytesA + boxes * C::kBoxBytes;
      const int started = first ? this->fill_early(ring, steps_, bytes, weights, tokens) : 0;
      const auto both = [&](int stage, int step) {
        weights(stage, step);
        tokens(stage, step);
      };
      this->fill(ring, steps_, bytes, both, started);
    }
  }

  __device__ __forceinline__ void consume(int group) const {
    float accumulators[C::kHeight / 2];
    QueueRing queue;
    typename Base::StageRing ring;
    TokenTile tile;
    while (this->next_tile(queue, tile)) {
      multiply_tile<kHeightStep>(tile.height, ring, group, accumulators);
      store(tile, group, accumulators);
    }
  }

 private:
  // By a warp, the same in each block: half a warp the limits, the halves every second expert.
  __device__ __forceinline__ int choose_height(int tiles_n, int clusters) const {
    constexpr unsigned all = 0xffffffffu;
    const int lane = threadIdx.x % 32;
    const auto limit = [](int number) { return min(height_limit(min(number, kHeightLimits - 1)), C::kHeight); };
    HeightEstimate estimate(limit(lane % 16), arguments_.depth);
    if (arguments_.offsets == nullptr) estimate.add(lane < 16 ? static_cast<int>(arguments_.rows) : 0);
    for (int first = 0; arguments_.offsets != nullptr && first < arguments_.num_experts; first += 32) {
      const int expert = first + lane;
      const bool exists = expert < arguments_.num_experts;
      const int rows = exists ? __ldg(arguments_.offsets + expert + 1) - __ldg(arguments_.offsets + expert) : 0;
      const int count = min(arguments_.num_experts - first, 32);
#pragma unroll 1  // unrolled, the code would be longer in coming than in running
      for (int i = 0; i < count; i += 2) estimate.add(__shfl_sync(all, rows, i + lane / 16));
    }
    estimate.join([](float value) { return __shfl_xor_sync(all, value, 16); });
    const float time = estimate.time(tiles_n, clusters);
    float least = time;
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes /= 2) least = fminf(least, __shfl_xor_sync(all, least, lanes));
    return limit(__ffs(__ballot_sync(all, time <= kNearly * least)) - 1);
  }

  // The weights of all warpgroups; shared, the blocks copy those of every second one for both.
  __device__ __forceinline__ void copy_weights(int stage, const TokenTile& tile, int step) const {
#pragma unroll
    for (int box = 0; box < C::kGroups; ++box) {
      const uint32_t destination = stage_a(stage) + box * C::kBoxBytes;
      const int column = tile.column * C::kColumns + box * 64;
      const auto copy = [&](auto... coordinates) {
        if (tile.shared != Shared::kWeights) {
          copy_box(&map_w_, destination, full(stage), coordinates...);
        } else if (box % 2 == rank()) {
          copy_box_multicast(&map_w_, destination, full(stage), kBoth, coordinates...);
        }
      };
      if constexpr (C::kTransposed) {
        copy(column, step * kTileK, tile.expert);
      } else {
        copy(step * kTileK, column, tile.expert);
      }
    }
  }

  // Shared, the blocks copy every second box each.
  __device__ __forceinline__ void copy_tokens(int stage, const TokenTile& tile, int step, int boxes) const {
    const bool share = tile.shared == Shared::kTokens;
    for (int box = share ? rank() : 0; box < boxes; box += share ? 2 : 1) {
      const uint32_t destination = stage_b(stage) + box * C::kBoxBytes;
      const int row = tile.row + box * C::kBoxTokens;
      if (share) {
        copy_box_multicast(&map_x_, destination, full(stage), kBoth, step * kTileK, row);
      } else {
        copy_box(&map_x_, destination, full(stage), step * kTileK, row);
      }
    }
  }

  // The loop over K with the instruction of the tile's height.
  template <int kHeight>
  __device__ __forceinline__ void multiply_tile(int height, typename Base::StageRing& ring, int group,
                                                float (&accumulators)[C::kHeight / 2]) const {
    if (height == kHeight) {
      this->drain(
          ring, steps_, group, 0, accumulators,
          [&](int stage, int step) { multiply<kHeight>(stage, group, step, accumulators); }, [](int) {});
    } else if constexpr (kHeight < C::kHeight) {
      multiply_tile<kHeight + kHeightStep>(height, ring, group, accumulators);
    }
  }

  template <int kHeight>
  __device__ __forceinline__ void multiply(int stage, int group, int step,
                                           float (&accumulators)[C::kHeight / 2]) const {
    const uint64_t w = operand_descriptor(stage_a(stage) + group * C::kBoxBytes, 0);
    const uint64_t x = operand_descriptor(stage_b(stage), 0);
    constexpr int advance_w = C::kTransposed ? 16 * kSwizzleBytes : 32;  // 16 rows, or 16 elements
#pragma unroll
    for (int k = 0; k < kTileK / 16; ++k) {
      mma<Element, kHeight, C::kTransposed, false>(accumulators, w + k * (advance_w / 16), x + k * (32 / 16),
                                                   step > 0 || k > 0);
    }
  }

  __device__ __forceinline__ void store(const TokenTile& tile, int group, const float (&acc)[C::kHeight / 2]) const {
    const int64_t width = arguments_.width;
    const int column = tile.column * C::kColumns + group * 64;
    Element* const out = static_cast<Element*>(arguments_.out) + tile.row * width + column;
    store_tokens<Element, C::kHeight>(this->group_staging(group), group, out, width, tile.rows,
                                      arguments_.width - column, acc);
  }

  const CUtensorMap& map_x_;
  const CUtensorMap& map_w_;
  const Arguments& arguments_;
  int steps_;
};

}  // namespace dit_moe::sm90
