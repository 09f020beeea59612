// What the grouped products have in common: a block is one producer warpgroup, which fills a ring of shared-memory
// stages, and two or three consumer warpgroups, which multiply 64 rows (or, with the tokens along the instruction's
// columns, 64 columns) of a tile each and store their results. Blocks stay and stride over the output tiles; while the
// consumers store one tile, the producer already loads the next. Where there is something to be done with a result, the
// consumers do it beside the products of the next tile; where there is much, they hand the result over in shared memory
// to a finishing warpgroup, and multiply on. Two blocks may form a cluster, in which each fetches half of an operand
// for both. Which tile is next is worked out ahead by a thread that has nothing else to do and read by all from a
// queue.
#pragma once

#include "../early_start.cuh"
#include "epilogue.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace dit_moe::sm90 {

constexpr int kGroupThreads = 128;  // a warpgroup
constexpr int kTileK = 64;          // elements of one swizzled row
constexpr int kMaxStages = 8;
constexpr int kMaxSharedBytes = 227 * 1024;  // of a Hopper block
constexpr int kQueue = 4;                    // tiles
constexpr int kQueueBytes = 32;              // of a tile
constexpr uint16_t kBoth = 3;                // blocks of a cluster, as copies to more than one name them

// Shared memory of a block with kGroups consumer warpgroups: stages of two operands, a staging buffer for each consumer
// warp's results, the queue of tiles, barriers, a zero.
template <int kBytesA_, int kBytesB_, int kGroups_ = 2, int kStagingBytes_ = kStagingBytes>
struct SharedLayout {
  static constexpr int kGroups = kGroups_;
  static constexpr int kConsumerWarps = kGroups * kGroupThreads / 32;
  static constexpr int kBytesA = kBytesA_;
  static constexpr int kStageBytes = kBytesA_ + kBytesB_;
  static constexpr int kWarpStagingBytes = kStagingBytes_;
  static constexpr int kBarriers = 2 * (kMaxStages + kConsumerWarps + kQueue);
  // With room to align the base.
  static constexpr int kOtherBytes =
      kConsumerWarps * kWarpStagingBytes + kQueue * kQueueBytes + kBarriers * 8 + 4 + 1024;
  static constexpr int kFitting = (kMaxSharedBytes - kOtherBytes) / kStageBytes;
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  static constexpr int kStagingAt = kStages * kStageBytes;
  static constexpr int kQueueAt = kStagingAt + kConsumerWarps * kWarpStagingBytes;
  static constexpr int kBarriersAt = kQueueAt + kQueue * kQueueBytes;
  static constexpr int kZeroAt = kBarriersAt + kBarriers * 8;  // four bytes
  static constexpr int kDynamicBytes = kStages * kStageBytes + kOtherBytes;
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

// L is a SharedLayout.
template <class L, int kCluster>
class Pipeline {
 public:
  // What a kind of block with a finishing warpgroup says otherwise: with finish(), it has four of 512 registers in all.
  static constexpr bool kFinishes = false;
  // And what one says that can start beside the kernel in front of it, see Start; one that can start with the weights
  // alone; and whether it was. It then lets the next kernel start only when it may read the offsets, others at once.
  static constexpr bool kOverlaps = false;
  static constexpr bool kGuesses = false;
  static __device__ __forceinline__ bool guesses() { return false; }
  // A thread's, of 512 for one in each warpgroup; the producer's are also the schedule's.
  static constexpr int kProducerRegisters = L::kGroups == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = L::kGroups == 2 ? 232 : 160;
  static constexpr int kFinisherRegisters = 0;

  // readers: of the queue, warps.
  __device__ __forceinline__ void init_barriers(int readers) const {
    constexpr int consumer_arrivals = L::kConsumerWarps * kCluster;
    for (int stage = 0; stage < L::kStages; ++stage) {
      barrier_init(full(stage), 1);
      barrier_init(empty(stage), consumer_arrivals);
    }
    for (int warp = 0; warp < L::kConsumerWarps; ++warp) {
      barrier_init(handed_over(warp), 1);
      barrier_init(taken(warp), 1);
    }
    for (int place = 0; place < kQueue; ++place) {
      barrier_init(queued(place), 1);
      barrier_init(read(place), readers * 32);
    }
    barrier_init_fence();
    store_shared(shared_ + L::kZeroAt, 0u);
  }

 protected:
  using StageRing = Ring<L::kStages>;
  using QueueRing = Ring<kQueue>;

  explicit __device__ __forceinline__ Pipeline(uint32_t shared) : shared_(shared) {}

  __device__ __forceinline__ uint32_t stage_a(int stage) const { return shared_ + stage * L::kStageBytes; }
  __device__ __forceinline__ uint32_t stage_b(int stage) const { return stage_a(stage) + L::kBytesA; }
  __device__ __forceinline__ uint32_t full(int stage) const { return shared_ + L::kBarriersAt + stage * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage) + L::kStages * 8; }
  // Of a consumer warp's staging buffer, where a finishing warp takes the results from there.
  __device__ __forceinline__ uint32_t handed_over(int warp) const { return empty(L::kStages) + warp * 8; }
  __device__ __forceinline__ uint32_t taken(int warp) const { return handed_over(L::kConsumerWarps) + warp * 8; }
  // Of a place in the queue.
  __device__ __forceinline__ uint32_t queued(int place) const { return taken(L::kConsumerWarps) + place * 8; }
  __device__ __forceinline__ uint32_t read(int place) const { return queued(kQueue) + place * 8; }
  __device__ __forceinline__ uint32_t staging(int warp) const {
    return shared_ + L::kStagingAt + warp * L::kWarpStagingBytes;
  }
  __device__ __forceinline__ uint32_t group_staging(int group) const { return staging(group * kGroupThreads / 32); }
  // A zero that is not known before this place. What is computed with it cannot be moved in front of products that were
  // started before, where the compiler would like to have it, and these would wait.
  __device__ __forceinline__ uint32_t zero_from_here() const { return load_shared_word(shared_ + L::kZeroAt); }
  // Asked of the hardware where it is needed: consumers have no register to keep it in.
  static __device__ __forceinline__ int rank() { return kCluster > 1 ? static_cast<int>(cluster_rank()) : 0; }

  // One thread: puts into the queue what next(tile) finds, until it returns false. So divisions, and offsets that have
  // left the first-level cache, delay neither copies nor products.
  template <class T, typename Next>
  __device__ __forceinline__ void announce(const Next& next) const {
    static_assert(sizeof(Announcement<T>) == kQueueBytes, "two words of 16 bytes");
    QueueRing ring;
    Announcement<T> announcement{};
    do {
      announcement.valid = next(announcement.tile);
      barrier_wait(read(ring.stage), ring.phase ^ 1);
      uint4 words[2];
      memcpy(words, &announcement, sizeof(announcement));
      const uint32_t address = shared_ + L::kQueueAt + ring.stage * kQueueBytes;
      store_shared(address, words[0]);
      store_shared(address + 16, words[1]);
      barrier_arrive(queued(ring.stage));
      ring.advance();
    } while (announcement.valid);
  }

  // A warp: the next tile of the queue. False when none is left.
  template <class T>
  __device__ __forceinline__ bool next_tile(QueueRing& ring, T& tile) const {
    barrier_wait(queued(ring.stage), ring.phase);
    const uint32_t address = shared_ + L::kQueueAt + ring.stage * kQueueBytes;
    const uint4 words[2] = {load_shared(address), load_shared(address + 16)};
    Announcement<T> announcement;
    memcpy(&announcement, words, sizeof(announcement));
    __syncwarp();  // the compiler then knows the warp to be whole, and keeps addresses in uniform registers
    barrier_arrive(read(ring.stage));  // each lane: the race checker does not see what orders those of a warp
    ring.advance();
    tile = announcement.tile;
    return announcement.valid;
  }

  // The producer's part of a tile, a warp: one lane's copy(stage, step) starts the copies of a K step, `bytes` in all,
  // into a free stage. The first `started` steps have been.
  template <typename Copy>
  __device__ __forceinline__ void fill(StageRing& ring, int steps, uint32_t bytes, const Copy& copy,
                                       int started = 0) const {
    for (int step = started; step < steps; ++step) {
      barrier_wait(empty(ring.stage), ring.phase ^ 1);
      if (elect_one()) {
        barrier_arrive_expect(full(ring.stage), bytes);
        copy(ring.stage, step);
      }
      __syncwarp();
      ring.advance();
    }
  }

  // The same for the first steps of a block's first tile, as many as there are stages: weights come while the kernel in
  // front of this one may still be computing the rows. How many steps these are.
  template <typename Weights, typename Rows>
  __device__ __forceinline__ int fill_early(StageRing& ring, int steps, uint32_t bytes, const Weights& weights,
                                            const Rows& rows) const {
    const int early = steps < L::kStages ? steps : L::kStages;
    if (elect_one()) {
      for (int step = 0; step < early; ++step) {
        barrier_arrive_expect(full(step), bytes);
        weights(step, step);
      }
      wait_for_previous();
      for (int step = 0; step < early; ++step) rows(step, step);
    }
    __syncwarp();
    for (int step = 0; step < early; ++step) ring.advance();
    return early;
  }

  // The same in two parts, where how many bytes the rows are is not known at first: `bytes` of weights,
  template <typename Weights>
  __device__ __forceinline__ void fill_with_weights(int steps, uint32_t bytes, const Weights& weights) const {
    if (elect_one()) {
      for (int step = 0; step < min(steps, L::kStages); ++step) {
        barrier_expect(full(step), bytes);
        weights(step, step);
      }
    }
    __syncwarp();
  }
  // and then of rows.
  template <typename Rows>
  __device__ __forceinline__ int fill_with_rows(StageRing& ring, int steps, uint32_t bytes, const Rows& rows) const {
    const int early = min(steps, L::kStages);
    if (elect_one()) {
      wait_for_previous();
      for (int step = 0; step < early; ++step) {
        barrier_arrive_expect(full(step), bytes);
        rows(step, step);
      }
    }
    __syncwarp();
    for (int step = 0; step < early; ++step) ring.advance();
    return early;
  }

  // A consumer's part: multiply(stage, step) starts the products of a K step, prepare(step) comes before each, and the
  // calls beside(0) to beside(kPieces - 1) come beside the products of the first steps. The first of two consumers
  // leads the second by `lead` steps (0: not from here on), so that what they do between two tiles does not coincide.
  template <int kPieces, int kCount, typename Multiply, typename Prepare, typename Beside>
  __device__ __forceinline__ void drain(StageRing& ring, int steps, int group, int lead, float (&accumulators)[kCount],
                                        const Multiply& multiply, const Prepare& prepare, const Beside& beside) const {
    if (group == 1 && lead > 0) named_barrier_wait();
    int previous = 0;
    const auto advance = [&](int step, const auto& work) {
      prepare(step);
      barrier_wait(full(ring.stage), ring.phase);
      mma_fence();
      multiply(ring.stage, step);
      mma_commit();
      work();
      mma_wait<1>();
      if (step > 0) release(previous);
      previous = ring.stage;
      ring.advance();
      if (group == 0 && step + 1 == lead) named_barrier_arrive();
    };
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (piece < steps) advance(piece, [&] { beside(piece); });
    }
    for (int step = kPieces; step < steps; ++step) advance(step, [] {});
#pragma unroll
    for (int piece = 1; piece < kPieces; ++piece) {
      if (piece >= steps) beside(piece);
    }
    mma_wait<0>();
    pin(accumulators);
    release(previous);
  }

  template <int kCount, typename Multiply, typename Prepare>
  __device__ __forceinline__ void drain(StageRing& ring, int steps, int group, int lead, float (&accumulators)[kCount],
                                        const Multiply& multiply, const Prepare& prepare) const {
    drain<0>(ring, steps, group, lead, accumulators, multiply, prepare, [](int) {});
  }

  // The second consumer's part of a tile in which it has no rows.
  __device__ __forceinline__ void pass(StageRing& ring, int steps, int lead) const {
    if (lead > 0) named_barrier_wait();
    for (int step = 0; step < steps; ++step) {
      barrier_wait(full(ring.stage), ring.phase);
      release(ring.stage);
      ring.advance();
    }
  }

 private:
  template <class T>
  struct alignas(16) Announcement {
    T tile;
    bool valid;  // otherwise there is no tile, nor will there be another
  };

  // Each warp for itself, to every block that fills this stage.
  __device__ __forceinline__ void release(int stage) const {
    const unsigned lane = threadIdx.x % 32;
    if constexpr (kCluster > 1) {
      if (lane < kCluster) barrier_arrive_remote(empty(stage), lane);
    } else {
      if (lane == 0) barrier_arrive(empty(stage));
    }
  }

  static __device__ __forceinline__ void named_barrier_wait() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
  static __device__ __forceinline__ void named_barrier_arrive() { asm volatile("bar.arrive 1, 256;" ::: "memory"); }

  uint32_t shared_;
};

template <class Block>
constexpr int kThreads = (1 + Block::Layout::kGroups + Block::kFinishes) * kGroupThreads;

// Block is a Pipeline with produce() and schedule() for a warp each, consume(group) and, if it has that warpgroup,
// finish().
template <class Block>
__global__ void __launch_bounds__(kThreads<Block>, 1)
    grouped_gemm_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                        const __grid_constant__ typename Block::Arguments arguments) {
  extern __shared__ uint8_t dynamic_shared[];
  const uint32_t shared = (shared_address(dynamic_shared) + 1023) / 1024 * 1024;
  const Block block(map_a, map_b, arguments, shared);
  if (threadIdx.x == 0) {
    prefetch_map(&map_a);
    prefetch_map(&map_b);
    if (!block.guesses()) let_next_start();
    block.init_barriers(1 + Block::Layout::kConsumerWarps + (Block::kFinishes ? kGroupThreads / 32 : 0));
  }
  if constexpr (Block::kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / kGroupThreads, 0);  // known to be the same for a warp
  if (group == 0) {
    give_registers<Block::kProducerRegisters>();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (warp == 0) block.produce();
    if (warp == 1) block.schedule();
    __syncwarp();
  } else if (!Block::kFinishes || group <= Block::Layout::kGroups) {
    take_registers<Block::kConsumerRegisters>();
    block.consume(group - 1);
  } else if constexpr (Block::kFinishes) {
    take_registers<Block::kFinisherRegisters>();
    block.finish();
  }
  if constexpr (Block::kCluster > 1) cluster_sync();  // the other may still write here and arrive at barriers here
}

}  // namespace dit_moe::sm90
