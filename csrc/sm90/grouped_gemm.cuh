// Grouped matrix product for Hopper: out[rows of expert e] = A[rows of expert e] W[e], with an epilogue.
//
// A block is one producer warpgroup, which fills a ring of shared-memory stages, and two consumer warpgroups, which
// multiply 64 rows each and store their results. Blocks stay and stride over the output tiles; while the consumers
// store one tile, the producer already loads the next. Two blocks may form a cluster: they compute neighbouring row
// tiles of one expert, and each fetches half of the weights for both.
#pragma once

#include "epilogue.cuh"
#include "ptx.cuh"
#include "scheduler.cuh"
#include "tile_choice.h"
#include "wgmma.cuh"

namespace dit_moe::sm90 {

constexpr int kGroupThreads = 128;  // a warpgroup
constexpr int kThreads = 3 * kGroupThreads;
constexpr int kTileK = 64;  // elements of one swizzled row
constexpr int kMaxStages = 6;
constexpr int kMaxSharedBytes = 227 * 1024;  // of a Hopper block
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;

enum class Epilogue {
  kStore,       // out (rows, N) = A W
  kSwiGLU,      // out (rows, N) = silu(first half of A W) * second half of A W
  kSwiGLUKeep,  // the same, and h (rows, 2N) = A W
};

template <typename Element_, Epilogue kEpilogue_, bool kTransposed_, int kTileN_, int kCluster_>
struct Config {
  using Element = Element_;
  static constexpr Epilogue kEpilogue = kEpilogue_;
  static constexpr bool kTransposed = kTransposed_;  // W is (E, K, N) in memory instead of (E, N, K)
  static constexpr int kTileN = kTileN_;             // columns of the product; SwiGLU stores half as many
  static constexpr int kCluster = kCluster_;         // blocks along the rows

  static constexpr bool kPaired = kEpilogue != Epilogue::kStore;  // gate and up columns in one tile
  static constexpr int kColumns = kPaired ? kTileN / 2 : kTileN;  // of out
  static constexpr int kBytesA = kTileM * kSwizzleBytes;
  // W comes in boxes of 128-byte rows: two of kTileN / 2 rows along N, or, transposed, two per 64 columns, of 32 rows.
  static constexpr int kBoxes = kTransposed ? 2 * ((kTileN + 63) / 64) : 2;
  static constexpr int kBoxRows = kTransposed ? kTileK / 2 : kTileN / 2;
  static constexpr int kBoxBytes = kBoxRows * kSwizzleBytes;
  static constexpr int kBytesB = kBoxes * kBoxBytes;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr int kOtherBytes = 8 * kStagingBytes + 2 * kMaxStages * 8 + 1024;  // with room to align the base
  static constexpr int kFitting = (kMaxSharedBytes - kOtherBytes) / kStageBytes;
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  static constexpr int kStagingAt = kStages * kStageBytes;
  static constexpr int kBarriersAt = kStagingAt + 8 * kStagingBytes;
  static constexpr int kDynamicBytes = kStages * kStageBytes + kOtherBytes;
  // K steps by which the first consumer leads the second, so that long epilogues do not coincide.
  static constexpr int kStagger = kPaired ? 2 : 0;
  // Row tiles (pairs of them in clusters) that sweep the columns together.
  static constexpr int kGroupM = kPaired ? 16 : 8;

  static_assert(kBoxRows % kSwizzleRows == 0 && kBoxRows <= 256, "boxes of whole swizzle periods");
  static_assert(kCluster == 1 || kCluster == 2, "alone or in pairs");
  static_assert(!(kTransposed && kPaired), "gate and up columns come from two boxes along N");
};

struct Arguments {
  const int32_t* offsets;  // (num_experts + 1,)
  void* out;               // (rows, width)
  void* h;                 // (rows, 2 width), if kept
  int num_experts;
  int depth;  // K
  int width;  // columns of out
};

// A place in the ring of stages. The phase flips on each round.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

template <class C>
class Block {
 public:
  using Element = typename C::Element;
  using Scheduler = TileScheduler<kTileM * C::kCluster>;

  __device__ __forceinline__ Block(const CUtensorMap& map_a, const CUtensorMap& map_b, const Arguments& arguments,
                                   uint32_t shared)
      : map_a_(map_a), map_b_(map_b), arguments_(arguments), shared_(shared) {
    steps_ = (arguments.depth + kTileK - 1) / kTileK;
  }

  __device__ __forceinline__ void init_barriers() const {
    constexpr int consumer_arrivals = 2 * (kGroupThreads / 32) * C::kCluster;
    for (int stage = 0; stage < C::kStages; ++stage) {
      barrier_init(full(stage), 1);
      barrier_init(empty(stage), consumer_arrivals);
    }
    barrier_init_fence();
  }

  // One thread: everything comes through the copy engine.
  __device__ __forceinline__ void produce() const {
    Scheduler scheduler = make_scheduler();
    Ring<C::kStages> ring;
    Tile tile;
    while (scheduler.next(tile)) {
      const int row = row_of(tile);
      for (int step = 0; step < steps_; ++step) {
        barrier_wait(empty(ring.stage), ring.phase ^ 1);
        barrier_arrive_expect(full(ring.stage), C::kStageBytes);
        copy_box(&map_a_, stage_a(ring.stage), full(ring.stage), step * kTileK, row);
        copy_weights(ring.stage, tile, step);
        ring.advance();
      }
    }
  }

  __device__ __forceinline__ void consume(int group) const {
    float accumulators[C::kTileN / 2];
    Scheduler scheduler = make_scheduler();
    Ring<C::kStages> ring;
    Tile tile;
    int lead = C::kStagger < steps_ ? C::kStagger : steps_;
    while (scheduler.next(tile)) {
      if (group == 1 && lead > 0) named_barrier_wait();
      int previous = 0;
      for (int step = 0; step < steps_; ++step) {
        barrier_wait(full(ring.stage), ring.phase);
        mma_fence();
        multiply(ring.stage, group, step, accumulators);
        mma_commit();
        mma_wait<1>();
        if (step > 0) release(previous);
        previous = ring.stage;
        ring.advance();
        if (group == 0 && step + 1 == lead) named_barrier_arrive();
      }
      lead = 0;
      mma_wait<0>();
      pin(accumulators);
      release(previous);
      store(tile, group, accumulators);
    }
  }

 private:
  __device__ __forceinline__ Scheduler make_scheduler() const {
    const int tiles_n = (arguments_.width + C::kColumns - 1) / C::kColumns;
    return Scheduler(arguments_.offsets, arguments_.num_experts, tiles_n, C::kGroupM, blockIdx.x / C::kCluster,
                     gridDim.x / C::kCluster);
  }

  __device__ __forceinline__ uint32_t stage_a(int stage) const { return shared_ + stage * C::kStageBytes; }
  __device__ __forceinline__ uint32_t stage_b(int stage) const { return stage_a(stage) + C::kBytesA; }
  __device__ __forceinline__ uint32_t full(int stage) const { return shared_ + C::kBarriersAt + stage * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage) + C::kStages * 8; }
  // Asked of the hardware where it is needed: consumers have no register to keep it in.
  static __device__ __forceinline__ int rank() { return C::kCluster > 1 ? static_cast<int>(cluster_rank()) : 0; }
  static __device__ __forceinline__ int row_of(const Tile& tile) { return tile.row + rank() * kTileM; }

  // Boxes are dealt out over the cluster's blocks, box by box.
  __device__ __forceinline__ void copy_weights(int stage, const Tile& tile, int step) const {
    const int column = tile.column * C::kColumns;
#pragma unroll
    for (int i = 0; i < C::kBoxes / C::kCluster; ++i) {
      const int box = i * C::kCluster + rank();
      int c0 = step * kTileK, c1;
      if constexpr (C::kTransposed) {
        c1 = c0 + box % 2 * C::kBoxRows;
        c0 = column + box / 2 * 64;
      } else {
        c1 = column + box * (C::kPaired ? arguments_.width : C::kBoxRows);
      }
      const uint32_t destination = stage_b(stage) + box * C::kBoxBytes;
      if constexpr (C::kCluster > 1) {
        copy_box_multicast(&map_b_, destination, full(stage), (1 << C::kCluster) - 1, c0, c1, tile.expert);
      } else {
        copy_box(&map_b_, destination, full(stage), c0, c1, tile.expert);
      }
    }
  }

  __device__ __forceinline__ void multiply(int stage, int group, int step, float (&accumulators)[C::kTileN / 2]) const {
    const uint64_t a = operand_descriptor(stage_a(stage) + group * 64 * kSwizzleBytes, 0);
    const uint64_t b = operand_descriptor(stage_b(stage), C::kTransposed ? 2 * C::kBoxBytes : 0);
    constexpr int advance_b = C::kTransposed ? 16 * kSwizzleBytes : 32;  // 16 rows, or 16 elements
#pragma unroll
    for (int k = 0; k < kTileK / 16; ++k) {
      mma<Element, C::kTileN, false, C::kTransposed>(accumulators, a + k * (32 / 16), b + k * (advance_b / 16),
                                                     step > 0 || k > 0);
    }
  }

  // Each warp for itself, to every block that fills this stage.
  __device__ __forceinline__ void release(int stage) const {
    const unsigned lane = threadIdx.x % 32;
    if constexpr (C::kCluster > 1) {
      if (lane < C::kCluster) barrier_arrive_remote(empty(stage), lane);
    } else {
      if (lane == 0) barrier_arrive(empty(stage));
    }
  }

  static __device__ __forceinline__ void named_barrier_wait() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
  static __device__ __forceinline__ void named_barrier_arrive() { asm volatile("bar.arrive 1, 256;" ::: "memory"); }

  __device__ __forceinline__ void store(const Tile& tile, int group, const float (&acc)[C::kTileN / 2]) const {
    const int warp = group * 4 + threadIdx.x / 32 % 4;
    const uint32_t staging = shared_ + C::kStagingAt + warp * kStagingBytes;
    const int row = row_of(tile) + warp * kWarpRows;
    const int64_t width = arguments_.width;
    const RowBlock<Element> out{static_cast<Element*>(arguments_.out) + row * width, width, tile.end - row};
    const int first_column = tile.column * C::kColumns;
    // Rounded at once: SwiGLU computes from what a backward reads, and half of the registers are free again.
    uint32_t pairs[C::kTileN / 4];
#pragma unroll
    for (int i = 0; i < C::kTileN / 4; ++i) pairs[i] = round_pair<Element>(acc[2 * i], acc[2 * i + 1]);
    pin(pairs);
    if constexpr (C::kPaired) {
      constexpr int half = C::kTileN / 8;  // pairs of a thread in the gate columns
      if constexpr (C::kEpilogue == Epilogue::kSwiGLUKeep) {
        Element* h = static_cast<Element*>(arguments_.h) + row * 2 * width;
        const RowBlock<Element> gate{h, 2 * width, out.rows}, up{h + width, 2 * width, out.rows};
        store_pass<C::kColumns>(staging, gate, first_column, [&](int i) { return pairs[i]; });
        store_pass<C::kColumns>(staging, up, first_column, [&](int i) { return pairs[half + i]; });
      }
      store_pass<C::kColumns>(staging, out, first_column,
                              [&](int i) { return swiglu_pair<Element>(pairs[i], pairs[half + i]); });
    } else {
      store_pass<C::kColumns>(staging, out, first_column, [&](int i) { return pairs[i]; });
    }
  }

  // All columns of a tile, up to 64 at a time; pair(i) gives the values at accumulators 2 i and 2 i + 1.
  template <int kColumns, int kFirst = 0, typename PairAt>
  __device__ __forceinline__ void store_pass(uint32_t staging, const RowBlock<Element>& block, int column,
                                             const PairAt& pair) const {
    constexpr int count = kColumns - kFirst < kStagingColumns ? kColumns - kFirst : kStagingColumns;
    store_columns<count>(staging, block, column + kFirst, arguments_.width,
                         [&](int i, int q) { return pair(kFirst / 4 + 4 * i + q); });
    if constexpr (kFirst + count < kColumns) store_pass<kColumns, kFirst + count>(staging, block, column, pair);
  }

  const CUtensorMap& map_a_;
  const CUtensorMap& map_b_;
  const Arguments& arguments_;
  uint32_t shared_;
  int steps_;
};

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_gemm_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                        const __grid_constant__ Arguments arguments) {
  extern __shared__ uint8_t dynamic_shared[];
  const uint32_t shared = (shared_address(dynamic_shared) + 1023) / 1024 * 1024;
  const Block<C> block(map_a, map_b, arguments, shared);
  if (threadIdx.x == 0) {
    prefetch_map(&map_a);
    prefetch_map(&map_b);
    block.init_barriers();
  }
  if constexpr (C::kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / kGroupThreads, 0);  // known to be the same for a warp
  if (group == 0) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) block.produce();
    __syncwarp();
  } else {
    take_registers<kConsumerRegisters>();
    block.consume(group - 1);
  }
  if constexpr (C::kCluster > 1) cluster_sync();  // the other block may still write here and arrive at barriers here
}

}  // namespace dit_moe::sm90
