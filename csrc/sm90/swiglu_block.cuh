// Grouped matrix product for Hopper, A[rows of expert e] W[e], with SwiGLU or its gradient for an epilogue, or none
// where experts have few rows.
//
// Two blocks of a cluster compute neighbouring row tiles of one expert and share the weights, or, at its last rows,
// neighbouring columns, and share the rows.
#pragma once

#include "dswiglu.cuh"
#include "pipeline.cuh"
#include "scheduler.cuh"
#include "tile_choice.h"

namespace dit_moe::sm90 {

enum class Epilogue {
  kSwiGLU,      // out (rows, N) = silu(first half of A W) * second half of A W
  kSwiGLUKeep,  // the same, and h (rows, 2N) = A W
  kStore,       // out (rows, N) = A W
  kDSwiGLU,     // out (rows, 2N) = gradient for h, where weight * A W is that for silu(first half of h) * second half
};

template <typename Element_, Epilogue kEpilogue_, int kTileN_, int kCluster_>
struct SwiGLUConfig {
  using Element = Element_;
  static constexpr Epilogue kEpilogue = kEpilogue_;
  static constexpr int kTileN = kTileN_;      // columns of the product; SwiGLU stores half as many
  static constexpr int kCluster = kCluster_;  // blocks along the rows

  // A finishing warpgroup reads h and stores three matrices, as many bytes as the memory moves during the product.
  static constexpr bool kFinishes = kEpilogue == Epilogue::kDSwiGLU;
  static constexpr bool kPaired = !kFinishes && kEpilogue != Epilogue::kStore;  // gate and up columns in one tile
  static constexpr bool kTransposed = kFinishes;                  // W is (E, K, N) in memory instead of (E, N, K)
  static constexpr int kColumns = kPaired ? kTileN / 2 : kTileN;  // of out
  static constexpr int kSegments = (kColumns + kStagingColumns - 1) / kStagingColumns;  // of them
  static constexpr int kLastColumns = kColumns - (kSegments - 1) * kStagingColumns;     // of the last segment
  // Rows come in boxes of 64, one for each consumer.
  static constexpr int kRowBoxBytes = kTileM / 2 * kSwizzleBytes;
  static constexpr int kBytesA = 2 * kRowBoxBytes;
  // W comes in boxes of 128-byte rows: one of gate and one of up, or, transposed, one per 64 columns.
  static constexpr int kBoxes = kTransposed ? kTileN / 64 : kPaired ? 2 : 1;
  static constexpr int kBoxRows = kTransposed ? kTileK : kTileN / kBoxes;
  static constexpr int kBoxBytes = kBoxRows * kSwizzleBytes;
  static constexpr int kBytesB = kBoxes * kBoxBytes;
  using Layout = SharedLayout<kBytesA, kBytesB, 2, kFinishes ? kSegments * kStagingBytes : kStagingBytes>;
  // K steps by which the first consumer leads the second, so that one rounds while the other multiplies.
  static constexpr int kStagger = 2;
  // A tile is stored in pieces, each a segment of out, or of h's gate or up columns.
  static constexpr int kPieces = kSegments * (kEpilogue == Epilogue::kSwiGLUKeep ? 3 : 1);
  // Row tiles (pairs of them in clusters) that sweep the columns together.
  static constexpr int kGroupM = kPaired ? 16 : 8;

  static_assert(kBoxRows % kSwizzleRows == 0 && kBoxRows <= 256, "boxes of whole swizzle periods");
  static_assert(kCluster == 1 || kCluster == 2, "alone or in pairs");
  static_assert(kLastColumns == kStagingColumns || (!kFinishes && kLastColumns % 16 == 0), "whole segments");
};

struct SwiGLUArguments {
  const int32_t* offsets;  // (num_experts + 1,), or null: one expert with all rows
  void* out;               // (rows, width)
  void* h;                 // (rows, 2 width), if kept
  int num_experts;
  int depth;  // K
  int width;  // columns of out, or half of them
  int64_t rows;
  DSwiGLUTensors dswiglu;
  bool guesses;  // see Pipeline
};

template <class C>
class SwiGLUBlock : public Pipeline<typename C::Layout, C::kCluster> {
  using Base = Pipeline<typename C::Layout, C::kCluster>;
  using Base::full, Base::rank, Base::stage_a, Base::stage_b, Base::staging, Base::handed_over, Base::taken;
  using typename Base::QueueRing;

 public:
  using Element = typename C::Element;
  using Arguments = SwiGLUArguments;
  using Layout = typename C::Layout;
  static constexpr int kCluster = C::kCluster;
  static constexpr bool kFinishes = C::kFinishes;
  static constexpr bool kOverlaps = C::kEpilogue == Epilogue::kSwiGLU || C::kEpilogue == Epilogue::kStore;
  static constexpr bool kGuesses = C::kEpilogue == Epilogue::kSwiGLU && C::kTileN <= kWidestNarrow;
  static constexpr int kProducerRegisters = kFinishes ? 32 : Base::kProducerRegisters;
  static constexpr int kConsumerRegisters = kFinishes ? 144 : Base::kConsumerRegisters;
  static constexpr int kFinisherRegisters = 512 - kProducerRegisters - 2 * kConsumerRegisters;

  __device__ __forceinline__ SwiGLUBlock(const CUtensorMap& map_a, const CUtensorMap& map_b, const Arguments& arguments,
                                         uint32_t shared)
      : Base(shared), map_a_(map_a), map_b_(map_b), arguments_(arguments) {
    steps_ = (arguments.depth + kTileK - 1) / kTileK;
  }

  __device__ __forceinline__ bool guesses() const { return kGuesses && arguments_.guesses; }

  // A warp's first thread.
  __device__ __forceinline__ void schedule() const {
    if (threadIdx.x % 32 != 0) return;
    const int tiles_n = column_tiles();
    if (guesses()) {
      wait_for_previous();
      let_next_start();
      ItemScheduler scheduler(arguments_.offsets, arguments_.num_experts, tiles_n, blockIdx.x, gridDim.x);
      this->template announce<Tile>([&](Tile& tile) { return scheduler.next(tile); });
      return;
    }
    TileScheduler<C::kCluster> scheduler(arguments_.offsets, arguments_.rows, arguments_.num_experts, tiles_n,
                                         C::kGroupM, blockIdx.x / C::kCluster, gridDim.x / C::kCluster);
    this->template announce<Tile>([&](Tile& tile) { return scheduler.next(rank(), tile); });
  }

  // A warp: everything comes through the copy engine.
  __device__ __forceinline__ void produce() const {
    QueueRing queue;
    typename Base::StageRing ring;
    Tile tile;
    if constexpr (kGuesses) {
      if (guesses()) {
        ItemScheduler::place(blockIdx.x, column_tiles(), tile);
        this->fill_with_weights(steps_, C::kBytesB, [&](int stage, int step) { copy_weights(stage, tile, step); });
      }
    }
    for (bool first = true; this->next_tile(queue, tile); first = false) {
      const uint32_t bytes = Layout::kStageBytes - (half_empty(tile) ? C::kRowBoxBytes : 0);
      if constexpr (kOverlaps) {
        const auto weights = [&](int stage, int step) { copy_weights(stage, tile, step); };
        const auto rows = [&](int stage, int step) { copy_rows(stage, tile, step); };
        const int started = !first      ? 0
                            : guesses() ? this->fill_with_rows(ring, steps_, bytes - C::kBytesB, rows)
                                        : this->fill_early(ring, steps_, bytes, weights, rows);
        const auto both = [&](int stage, int step) {
          rows(stage, step);
          weights(stage, step);
        };
        this->fill(ring, steps_, bytes, both, started);
      } else {
        this->fill(ring, steps_, bytes, [&](int stage, int step) {
          copy_rows(stage, tile, step);
          copy_weights(stage, tile, step);
        });
      }
    }
  }

  __device__ __forceinline__ void consume(int group) const {
    if constexpr (kFinishes) {
      multiply_and_hand_over(group);
    } else {
      multiply_and_store(group);
    }
  }

  // Each warp for itself: takes the rows that two consumer warps hand over, one after the other. Whatever does not come
  // from the product is asked for ahead, over the end of a tile too: h a step before, a tile's slots and their weights
  // a tile and half a tile.
  __device__ __forceinline__ void finish() const {
    const int row_of_lane = Finished::row_of(threadIdx.x % 32 / 4, threadIdx.x % 4);  // all lanes: the warp's 32 rows
    const auto slot_of = [&](const Finished& tile) {
      return row_of_lane < tile.rows() ? __ldg(arguments_.dswiglu.row_to_slot + tile.row() + row_of_lane) : -1;
    };
    const auto weight_of = [&](int slot) { return slot >= 0 ? __ldg(arguments_.dswiglu.topk_weights + slot) : 0.0f; };
    QueueRing queue;
    uint32_t phase = 0;
    bool more;
    Finished tile = next_finished(queue, more);
    typename Finished::Chunk next[C::kSegments];
    tile.load(0, next);
    float weight_of_lane = weight_of(slot_of(tile));
    while (more) {
      const Finished following = next_finished(queue, more);
      const int next_slot = slot_of(following);
      float next_weight = 0.0f, dot_of_lane = 0.0f;
#pragma unroll 1
      for (int step = 0; step < Finished::kSteps; ++step) {
        typename Finished::Chunk h[C::kSegments];
        Finished::move(next, h);
        if (step + 1 < Finished::kSteps) {
          tile.load(step + 1, next);
        } else {
          following.load(0, next);
        }
        if (step == Finished::kSteps / 2) next_weight = weight_of(next_slot);
        finish_step(tile, step, phase, weight_of_lane, h, dot_of_lane);
      }
      if (row_of_lane < tile.rows()) {
        float* const dots = arguments_.dswiglu.dots + tile.column() / C::kColumns * arguments_.rows;
        dots[tile.row() + row_of_lane] = dot_of_lane;
      }
      phase ^= 1;
      tile = following;
      weight_of_lane = next_weight;
    }
  }

 private:
  using Finished = DSwiGLUTile<Element, C::kSegments>;

  __device__ __forceinline__ int column_tiles() const { return (arguments_.width + C::kColumns - 1) / C::kColumns; }

  // more: whether there is another tile. Otherwise this one has no rows.
  __device__ __forceinline__ Finished next_finished(QueueRing& queue, bool& more) const {
    Tile tile;
    more = this->next_tile(queue, tile);
    return Finished(arguments_.dswiglu, arguments_.out, tile.row, more ? min(tile.end - tile.row, kTileM) : 0,
                    tile.column * C::kColumns, arguments_.width);
  }

  // dot_of_lane: <g, a> of the lane's row, once the step that has it is done.
  __device__ __forceinline__ void finish_step(const Finished& tile, int step, uint32_t phase, float weight_of_lane,
                                              const typename Finished::Chunk (&h)[C::kSegments],
                                              float& dot_of_lane) const {
    const int lane = threadIdx.x % 32, warp = Finished::warp_of(step);
    if (step % 4 == 0) barrier_wait(handed_over(warp), phase);
    const float weight = __shfl_sync(0xffffffffu, weight_of_lane, 4 * step + lane / 8);
    float dot = tile.finish(step, staging(warp), weight, h);
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) dot += __shfl_xor_sync(0xffffffffu, dot, lanes);
    dot = __shfl_sync(0xffffffffu, dot, lane % 4 * 8);
    if (lane / 4 == step) dot_of_lane = dot;
    if (step % 4 == 3) {
      __syncwarp();
      if (lane == 0) barrier_arrive(taken(warp));
    }
  }

  // Whether the second consumer sits a tile out. (Where one of four warpgroups finishes, that was measured 1 % slower.)
  static __device__ __forceinline__ bool half_empty(const Tile& tile) { return !kFinishes && tile.low; }

  // A tile is stored, piece by piece, beside the products of the next.
  __device__ __forceinline__ void multiply_and_store(int group) const {
    float accumulators[C::kTileN / 2];
    uint32_t pairs[C::kTileN / 4] = {};  // of the tile before: SwiGLU computes from what a backward reads
    QueueRing queue;
    typename Base::StageRing ring;
    Tile tile, before;
    before.row = before.end = before.column = 0;
    bool more = this->next_tile(queue, tile);
    int lead = C::kStagger < steps_ ? C::kStagger : steps_;
    while (more) {
      if (group == 1 && half_empty(tile)) {  // what is still to be stored waits for the next tile
        this->pass(ring, steps_, lead);
        lead = 0;
        more = this->next_tile(queue, tile);
        continue;
      }
      this->template drain<C::kPieces + 1>(
          ring, steps_, group, lead, accumulators,
          [&](int stage, int step) { multiply(stage, group, step, accumulators); }, [](int) {},
          [&](int piece) {
            if (piece < C::kPieces) {
              store(before, group, piece, pairs);
            } else {
              before = tile;
              more = this->next_tile(queue, tile);
            }
          });
      lead = 0;
      round_pairs<Element, C::kTileN / 4>(accumulators, pairs);
      pin(pairs);
    }
#pragma unroll
    for (int piece = 0; piece < C::kPieces; ++piece) store(before, group, piece, pairs);
  }

  __device__ __forceinline__ void multiply_and_hand_over(int group) const {
    float accumulators[C::kTileN / 2];
    QueueRing queue;
    typename Base::StageRing ring;
    Tile tile;
    uint32_t phase = 0;
    while (this->next_tile(queue, tile)) {
      this->drain(
          ring, steps_, group, 0, accumulators,
          [&](int stage, int step) { multiply(stage, group, step, accumulators); }, [](int) {});
      hand_over(group, phase, accumulators);
      phase ^= 1;
    }
  }

  // Shared, each block copies one box for both.
  __device__ __forceinline__ void copy_rows(int stage, const Tile& tile, int step) const {
#pragma unroll
    for (int box = 0; box < 2; ++box) {
      if (box == 1 && half_empty(tile)) break;
      const uint32_t destination = stage_a(stage) + box * C::kRowBoxBytes;
      const int row = tile.row + box * (kTileM / 2);
      if (C::kCluster == 1 || !tile.split) {
        copy_box(&map_a_, destination, full(stage), step * kTileK, row);
      } else if (box == rank()) {
        copy_box_multicast(&map_a_, destination, full(stage), kBoth, step * kTileK, row);
      }
    }
  }

  // Boxes are dealt out over the cluster's blocks, box by box, an odd one to each in turn.
  __device__ __forceinline__ void copy_weights(int stage, const Tile& tile, int step) const {
    const int column = tile.column * C::kColumns;
    const auto copy = [&](int box) {
      const uint32_t destination = stage_b(stage) + box * C::kBoxBytes;
      const int c0 = C::kTransposed ? column + box * 64 : step * kTileK;
      const int c1 = C::kTransposed ? step * kTileK : column + box * arguments_.width;
      if (C::kCluster == 1 || tile.split) {
        copy_box(&map_b_, destination, full(stage), c0, c1, tile.expert);
      } else if ((box + step * C::kBoxes) % 2 == rank()) {
        copy_box_multicast(&map_b_, destination, full(stage), kBoth, c0, c1, tile.expert);
      }
    };
#pragma unroll
    for (int box = 0; box < C::kBoxes; ++box) copy(box);
  }

  __device__ __forceinline__ void multiply(int stage, int group, int step, float (&accumulators)[C::kTileN / 2]) const {
    const uint64_t a = operand_descriptor(stage_a(stage) + group * 64 * kSwizzleBytes, 0);
    const uint64_t b = operand_descriptor(stage_b(stage), C::kTransposed ? C::kBoxBytes : 0);
    constexpr int advance_b = C::kTransposed ? 16 * kSwizzleBytes : 32;  // 16 rows, or 16 elements
#pragma unroll
    for (int k = 0; k < kTileK / 16; ++k) {
      mma<Element, C::kTileN, false, C::kTransposed>(accumulators, a + k * (32 / 16), b + k * (advance_b / 16),
                                                     step > 0 || k > 0);
    }
  }

  __device__ __forceinline__ void hand_over(int group, uint32_t phase, const float (&acc)[C::kTileN / 2]) const {
    const int warp = group * 4 + threadIdx.x / 32 % 4;
    const uint32_t buffer = staging(warp);
    barrier_wait(taken(warp), phase ^ 1);
#pragma unroll
    for (int segment = 0; segment < C::kSegments; ++segment) {
      stage_columns<kStagingColumns>(buffer + segment * kStagingBytes, [&](int i, int q) {
        const int first = segment * kStagingColumns / 2 + 8 * i + 2 * q;
        return round_pair<Element>(acc[first], acc[first + 1]);
      });
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(handed_over(warp));
  }

  // pairs: of the tile, packed accumulators.
  __device__ __forceinline__ void store(const Tile& tile, int group, int piece,
                                        const uint32_t (&pairs)[C::kTileN / 4]) const {
    constexpr int half = C::kTileN / 8;  // pairs of a thread in the gate columns
    const int segment = piece % C::kSegments;
    const int warp = group * 4 + threadIdx.x / 32 % 4;
    const int row = tile.row + warp * kWarpRows, rows = tile.end - row;
    const int column = tile.column * C::kColumns + segment * kStagingColumns;
    const int64_t width = arguments_.width;
    const auto gate = [&](int i, int q) { return pairs[segment * kStagingColumns / 4 + 4 * i + q]; };
    const auto up = [&](int i, int q) { return pairs[half + segment * kStagingColumns / 4 + 4 * i + q]; };
    const auto put = [&](Element* first, int64_t stride, const auto& fragment) {
      const RowBlock<Element> block{first + row * stride, stride, rows};
      if (segment + 1 < C::kSegments || C::kLastColumns == kStagingColumns) {
        store_columns<kStagingColumns>(staging(warp), block, column, arguments_.width, fragment);
      } else {
        store_columns<C::kLastColumns>(staging(warp), block, column, arguments_.width, fragment);
      }
    };
    if (C::kEpilogue == Epilogue::kStore) {
      put(static_cast<Element*>(arguments_.out), width, gate);
    } else if (piece < C::kSegments) {
      const uint32_t zero = this->zero_from_here();
      put(static_cast<Element*>(arguments_.out), width,
          [&](int i, int q) { return swiglu_pair<Element>(gate(i, q) ^ zero, up(i, q)); });
    } else if (piece < 2 * C::kSegments) {
      put(static_cast<Element*>(arguments_.h), 2 * width, gate);
    } else {
      put(static_cast<Element*>(arguments_.h) + width, 2 * width, up);
    }
  }

  const CUtensorMap& map_a_;
  const CUtensorMap& map_b_;
  const Arguments& arguments_;
  int steps_;
};

}  // namespace dit_moe::sm90
