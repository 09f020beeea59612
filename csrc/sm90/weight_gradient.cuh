// Weight gradients for Hopper: dw[e] (height, width) = sum over the rows r of expert e of grad[r]^T x[r].
//
// Rows are the depth of these products, so both operands are "transposed" in the sense of wgmma.cuh. Where a step
// reaches beyond an expert's rows, the copy engine fills in zeros (make_ragged_map), and an expert without rows takes
// one step of zeros. Two blocks of a cluster compute neighbouring tiles and share x (tall) or grad (wide). A turned
// product is x[r]^T grad[r], whose tiles are turned as they are stored: where its tiles fit and those of the other do
// not.
#pragma once

#include "pipeline.cuh"
#include "scheduler.cuh"
#include "tensor_map.cuh"
#include "tile_choice.h"
#include "token_store.cuh"

namespace dit_moe::sm90 {

template <typename Element_, int kTileN_, bool kTall_, bool kTurned_>
struct WeightConfig {
  using Element = Element_;
  static constexpr int kTileN = kTileN_;
  static constexpr bool kTall = kTall_;
  static constexpr bool kTurned = kTurned_;
  static constexpr int kCluster = 2;
  // An operand's stage consists of strips: 64 columns of kTileK rows. Of a shared strip each block copies half.
  static constexpr int kStripColumns = 64;
  static constexpr int kRows = rows_of({kTileN, kTall, kTurned});
  static constexpr int kGroups = kRows / 64;  // consumers, of which each has 64 rows
  static constexpr int kStripsA = kRows / kStripColumns;
  static constexpr int kStripsB = (kTileN + kStripColumns - 1) / kStripColumns;
  static constexpr int kStripBytes = kTileK * kSwizzleBytes;
  static constexpr int kBoxRowsA = kTall ? kTileK : kTileK / 2;
  static constexpr int kBoxRowsB = kTall ? kTileK / 2 : kTileK;
  using Layout = SharedLayout<kStripsA * kStripBytes, kStripsB * kStripBytes, kGroups>;
  static constexpr int kStagger = kGroups == 2 ? 2 : 0;  // K steps by which the first of two consumers leads
  static constexpr int kPrefetchSteps = 8;               // K steps before the end that old gradients are asked for
  // Whether a tile that is stored in 16 bits is stored beside the products of the next one, for which two consumers
  // have the registers; in so many pieces.
  static constexpr bool kStoresBeside = kGroups == 2;
  static constexpr int kPieces = kTileN / kStagingColumns;
};

struct WeightArguments {
  const int32_t* offsets;  // (num_experts + 1,)
  void* dw;                // (num_experts, height, width), of the operands' type or fp32; turned, (.., width, height)
  int num_experts;
  int height;  // of the product
  int width;
  bool is_float;    // dw is fp32; not if turned
  bool accumulate;  // add to dw; not if turned
};

template <class C>
class WeightBlock : public Pipeline<typename C::Layout, C::kCluster> {
  using Base = Pipeline<typename C::Layout, C::kCluster>;
  using Base::full, Base::rank, Base::stage_a, Base::stage_b, Base::staging;
  using typename Base::QueueRing;

 public:
  using Element = typename C::Element;
  using Arguments = WeightArguments;
  using Layout = typename C::Layout;
  static constexpr int kCluster = C::kCluster;

  __device__ __forceinline__ WeightBlock(const CUtensorMap& map_a, const CUtensorMap& map_b, const Arguments& arguments,
                                         uint32_t shared)
      : Base(shared), map_a_(map_a), map_b_(map_b), arguments_(arguments) {}

  // A warp's first thread.
  __device__ __forceinline__ void schedule() const {
    if (threadIdx.x % 32 != 0) return;
    constexpr int rows = C::kRows * (C::kTall ? 2 : 1), columns = C::kTileN * (C::kTall ? 1 : 2);  // of a cluster
    WeightScheduler scheduler(arguments_.offsets, arguments_.num_experts, (arguments_.height + rows - 1) / rows,
                              (arguments_.width + columns - 1) / columns, blockIdx.x / C::kCluster,
                              gridDim.x / C::kCluster);
    this->template announce<WeightTile>([&](WeightTile& tile) { return scheduler.next(tile); });
  }

  // A warp.
  __device__ __forceinline__ void produce() const {
    QueueRing queue;
    typename Base::StageRing ring;
    WeightTile tile;
    while (this->next_tile(queue, tile)) {
      const int row = row_of(tile), column = column_of(tile);
      const int first = kRaggedRows - (tile.end - tile.start);
      this->fill(ring, steps_of(tile), Layout::kStageBytes, [&](int stage, int step) {
        const int k = first + step * kTileK;
        copy_strips<C::kStripsA, !C::kTall>(&map_a_, stage_a(stage), full(stage), row, k, tile.end);
        copy_strips<C::kStripsB, C::kTall>(&map_b_, stage_b(stage), full(stage), column, k, tile.end);
      });
    }
  }

  __device__ __forceinline__ void consume(int group) const {
    if constexpr (C::kTurned) {
      multiply_and_store(group);
    } else if (C::kStoresBeside && !arguments_.is_float && !arguments_.accumulate) {
      multiply_and_store(group);
    } else {
      multiply_then_store(group);
    }
  }

 private:
  // A tile is stored, piece by piece, beside the products of the next.
  __device__ __forceinline__ void multiply_and_store(int group) const {
    float accumulators[C::kTileN / 2];
    uint32_t pairs[C::kTileN / 4] = {};  // of the tile before
    QueueRing queue;
    typename Base::StageRing ring;
    WeightTile tile, before{};
    bool more = this->next_tile(queue, tile), stored = false;
    int lead = min(C::kStagger, steps_of(tile));
    while (more) {
      this->template drain<C::kPieces + 1>(
          ring, steps_of(tile), group, lead, accumulators,
          [&](int stage, int step) { multiply(stage, group, step, accumulators); }, [](int) {},
          [&](int piece) {
            if (piece < C::kPieces) {
              if (stored) store_piece(before, group, piece, pairs);
            } else {
              before = tile;
              stored = true;
              more = this->next_tile(queue, tile);
            }
          });
      lead = 0;
      round_pairs<Element, C::kTileN / 4>(accumulators, pairs);
      pin(pairs);
    }
    if (!stored) return;
#pragma unroll
    for (int piece = 0; piece < C::kPieces; ++piece) store_piece(before, group, piece, pairs);
  }

  __device__ __forceinline__ void multiply_then_store(int group) const {
    float accumulators[C::kTileN / 2];
    QueueRing queue;
    typename Base::StageRing ring;
    WeightTile tile;
    bool first = true;
    while (this->next_tile(queue, tile)) {
      const int steps = steps_of(tile);
      const int lead = first ? min(C::kStagger, steps) : 0;
      const int prefetch_step = arguments_.accumulate ? max(steps - C::kPrefetchSteps, 0) : steps;
      first = false;
      this->drain(
          ring, steps, group, lead, accumulators,
          [&](int stage, int step) { multiply(stage, group, step, accumulators); },
          [&](int step) {
            if (step == prefetch_step) prefetch(tile, group);
          });
      store(tile, group, accumulators);
    }
  }

  static __device__ __forceinline__ int steps_of(const WeightTile& tile) {
    return max((tile.end - tile.start + kTileK - 1) / kTileK, 1);
  }
  // Of the product.
  static __device__ __forceinline__ int row_of(const WeightTile& tile) {
    return (C::kTall ? tile.row * 2 + rank() : tile.row) * C::kRows;
  }
  static __device__ __forceinline__ int column_of(const WeightTile& tile) {
    return (C::kTall ? tile.column : tile.column * 2 + rank()) * C::kTileN;
  }

  template <int kStrips, bool kShared>
  static __device__ __forceinline__ void copy_strips(const CUtensorMap* map, uint32_t destination, uint32_t barrier,
                                                     int column, int k, int end) {
    const int row = kShared ? rank() * (kTileK / 2) : 0;
    destination += row * kSwizzleBytes;
    k += row;
#pragma unroll
    for (int i = 0; i < kStrips; ++i) {
      const uint32_t strip = destination + i * C::kStripBytes;
      const int strip_column = column + i * C::kStripColumns;
      if constexpr (kShared) {
        copy_box_multicast(map, strip, barrier, (1 << C::kCluster) - 1, strip_column, k, end, kRaggedRows);
      } else {
        copy_box(map, strip, barrier, strip_column, k, end, kRaggedRows);
      }
    }
  }

  __device__ __forceinline__ void multiply(int stage, int group, int step, float (&accumulators)[C::kTileN / 2]) const {
    const uint64_t a = operand_descriptor(stage_a(stage) + group * C::kStripBytes, C::kStripBytes);
    const uint64_t b = operand_descriptor(stage_b(stage), C::kStripBytes);
    constexpr int advance = 16 * kSwizzleBytes / 16;  // 16 rows
#pragma unroll
    for (int k = 0; k < kTileK / 16; ++k) {
      mma<Element, C::kTileN, true, true>(accumulators, a + k * advance, b + k * advance, step > 0 || k > 0);
    }
  }

  // A warp's rows of dw.
  template <typename Sum>
  __device__ __forceinline__ RowBlock<Sum> row_block(const WeightTile& tile, int warp) const {
    const int row = row_of(tile) + warp * kWarpRows;
    const int64_t width = arguments_.width;
    Sum* dw = static_cast<Sum*>(arguments_.dw) + (static_cast<int64_t>(tile.expert) * arguments_.height + row) * width;
    return {dw, width, arguments_.height - row};
  }

  static __device__ __forceinline__ int warp_of(int group) { return group * 4 + threadIdx.x / 32 % 4; }

  __device__ __forceinline__ void prefetch(const WeightTile& tile, int group) const {
    const int warp = warp_of(group), column = column_of(tile), width = arguments_.width;
    if (arguments_.is_float) {
      prefetch_rows<C::kTileN>(row_block<float>(tile, warp), column, width);
    } else {
      prefetch_rows<C::kTileN>(row_block<Element>(tile, warp), column, width);
    }
  }

  // pairs: of the tile, packed accumulators.
  __device__ __forceinline__ void store_piece(const WeightTile& tile, int group, int piece,
                                              const uint32_t (&pairs)[C::kTileN / 4]) const {
    const int column = column_of(tile) + piece * kStagingColumns, width = arguments_.width;
    const int first = piece * kStagingColumns / 4;
    if constexpr (C::kTurned) {
      const int64_t height = arguments_.height;
      const int row = row_of(tile) + group * 64;
      Element* const dw = static_cast<Element*>(arguments_.dw) + (int64_t{tile.expert} * width + column) * height + row;
      store_token_pairs<kStagingColumns>(this->group_staging(group), group, dw, height, width - column,
                                         arguments_.height - row, pairs + first);
      __syncwarp();  // the compiler then knows the warp to be whole again, as in next_tile
    } else {
      const int warp = warp_of(group);
      store_columns<kStagingColumns>(staging(warp), row_block<Element>(tile, warp), column, width,
                                     [&](int i, int q) { return pairs[first + 4 * i + q]; });
    }
  }

  __device__ __forceinline__ void store(const WeightTile& tile, int group, const float (&acc)[C::kTileN / 2]) const {
    const int warp = warp_of(group), column = column_of(tile), width = arguments_.width;
    const uint32_t buffer = staging(warp);
    if (arguments_.is_float) {
      add_tile<C::kTileN>(buffer, row_block<float>(tile, warp), column, width, arguments_.accumulate, acc);
    } else if (arguments_.accumulate) {
      add_tile<C::kTileN>(buffer, row_block<Element>(tile, warp), column, width, true, acc);
    } else {
      store_tile<C::kTileN>(buffer, row_block<Element>(tile, warp), column, width,
                            [&](int i) { return round_pair<Element>(acc[2 * i], acc[2 * i + 1]); });
    }
  }

  const CUtensorMap& map_a_;
  const CUtensorMap& map_b_;
  const Arguments& arguments_;
};

}  // namespace dit_moe::sm90
