// Self-attention over all tokens of an image, from packed queries, keys and values, with LayerNorm of each head's
// queries and keys on the way.
//
// A block takes a head of an image, or 128 queries of one. One thread has the copy engine fetch 128 rows of queries,
// keys or values into a slot of shared memory, as far ahead as slots are free; a warpgroup normalises queries and keys
// there, a thread a row. Two consumer warpgroups take 64 of 128 queries each: products and a softmax that never leave
// registers, over 128 keys at a time. Where an image has many queries, two blocks of a cluster take 128 of a head each;
// each fetches half of its keys and values for both, since the copies of narrow rows are what bounds that case
// otherwise, and normalises its half of the keys.
#pragma once

#include "attention_layout.cuh"
#include "attention_norm.cuh"
#include "online_softmax.cuh"
#include "pipeline.cuh"

namespace dit_moe::sm90 {

// Warpgroups: two consumers, one that normalises, and one for the thread that copies.
constexpr int kAttentionThreads = 4 * kGroupThreads;
constexpr int kAttendingRegisters = 168;
constexpr int kNormalisingRegisters = 152;
constexpr int kCopyingRegisters = 24;

template <class C>
class AttentionBlock {
 public:
  using Element = typename C::Element;

  // Maps of qkv (tokens of all images, 3 * heads, width) in boxes of a slot's tiles.
  __device__ __forceinline__ AttentionBlock(const CUtensorMap& map_main, const CUtensorMap& map_rest,
                                            const CUtensorMap& map_values, const AttentionArguments& arguments,
                                            uint8_t* shared)
      : map_main_(map_main),
        map_rest_(map_rest),
        map_values_(map_values),
        arguments_(arguments),
        weights_(reinterpret_cast<float*>(shared + C::kWeightsAt)),
        shared_(shared_address(shared)) {}

  // All threads: barriers, and the norms' weights in fp32; queries are scaled for softmax to the base of 2.
  __device__ __forceinline__ void prepare() const {
    if (threadIdx.x == 0) {
      prefetch_map(&map_main_);
      if constexpr (C::kRest > 0) prefetch_map(&map_rest_);
      prefetch_map(&map_values_);
      for (int slot = 0; slot < C::kSlots; ++slot) {
        barrier_init(landed(slot), 1);
        barrier_init(normalised(slot), kGroupThreads / 32);
        barrier_init(empty(slot),
                     slot < C::kQuerySlots ? 2 * kGroupThreads : 2 * kGroupThreads / 32 * arguments_.blocks);
      }
      barrier_init_fence();
    }
    for (int i = threadIdx.x; i < 4 * C::kWidth; i += blockDim.x) {
      const void* const source = arguments_.weights[i / C::kWidth];
      const int place = i % C::kWidth;
      const float weight = arguments_.weights_fp32 ? static_cast<const float*>(source)[place]
                                                   : static_cast<float>(static_cast<const Element*>(source)[place]);
      weights_[i] = i < 2 * C::kWidth ? weight * rsqrtf(static_cast<float>(C::kWidth)) * kLog2E : weight;
    }
  }

  // A warp.
  __device__ __forceinline__ void copy() const {
    for (Cursor cursor(*this); cursor.valid(); cursor.advance()) copy(cursor);
  }

  __device__ __forceinline__ void normalise() const {
    for (Cursor cursor(*this); cursor.valid(); cursor.advance()) {
      if (cursor.part == 2) continue;
      const int slot = cursor.slot();
      barrier_wait(landed(slot), cursor.phase());
      if (cursor.part == 1 && arguments_.blocks > 1) {
        normalise_for_both(slot);
      } else {
        normalise(slot, cursor.part);
      }
    }
  }

  // group: which 64 of 128 queries.
  __device__ __forceinline__ void attend(int group) const {
    if (scores_are_bounded<Element, C::kWidth>(weights_)) {
      attend<true>(group);
    } else {
      attend<false>(group);
    }
  }

 private:
  template <bool kBounded>
  __device__ __forceinline__ void attend(int group) const {
    Ring<C::kQuerySlots> queries;
    Ring<C::kKeySlots> keys;
    for (int item = first_item(); item < arguments_.items; item += item_step()) {
      for (int pass = 0; pass < arguments_.passes; ++pass) {
        Sums<C::kWidth> sums;
        const bool last = pass + 1 == arguments_.passes;  // the keys and values have done their part
        Ring<C::kKeySlots> from_here = keys;
        attend<kBounded>(group, queries, from_here, last, sums);
        if (last) keys = from_here;
        store(query_block(item, pass), item % arguments_.heads, group, queries.stage, sums);
        // Each lane: results went through the slot, and the race checker does not see what orders a warp's lanes.
        barrier_arrive(empty(queries.stage));
        queries.advance();
      }
    }
  }

  // 64 queries with all keys and values from the ring's place on.
  template <bool kBounded>
  __device__ __forceinline__ void attend(int group, const Ring<C::kQuerySlots>& queries, Ring<C::kKeySlots>& keys,
                                         bool last, Sums<C::kWidth>& sums) const {
    barrier_wait(normalised(queries.stage), queries.phase);
    for (int done = 0; done < arguments_.tokens; done += kSlotRows) {
      const int key_slot = C::kQuerySlots + keys.stage, value_slot = key_slot + 1;
      float scores[kSlotRows / 2];
      uint32_t shares[kSlotRows / 4];
      barrier_wait(normalised(key_slot), keys.phase);
      barrier_wait(landed(value_slot), keys.phase);
      score(queries.stage, group, key_slot, scores);
      if (last) release(key_slot);
      soften<Element, kBounded>(scores, done == 0, sums, shares);
      add_values(value_slot, done == 0, shares, sums);
      if (last) release(value_slot);
      keys.advance();
      keys.advance();
    }
  }

  // A place in the work on slots: a part (0 queries, 1 keys, 2 values) of 128 rows of an item. A second block of
  // queries comes after the keys and values.
  struct Cursor {
    const AttentionBlock& block;
    int item, part = 0, pass = 0;
    int rows = 0;  // keys or values of the item before these
    Ring<C::kQuerySlots> queries;
    Ring<C::kKeySlots> keys;

    explicit __device__ __forceinline__ Cursor(const AttentionBlock& b) : block(b), item(b.first_item()) {}
    __device__ __forceinline__ bool valid() const { return item < block.arguments_.items; }
    __device__ __forceinline__ int slot() const { return part == 0 ? queries.stage : C::kQuerySlots + keys.stage; }
    __device__ __forceinline__ uint32_t phase() const { return part == 0 ? queries.phase : keys.phase; }
    __device__ __forceinline__ void advance() {
      if (part == 0) {
        queries.advance();
        if (pass > 0) {
          leave();
        } else {
          part = 1;
        }
        return;
      }
      keys.advance();
      part = 3 - part;
      if (part == 2) return;
      rows += kSlotRows;
      if (rows < block.arguments_.tokens) return;
      part = 0;
      if (++pass == block.arguments_.passes) leave();
    }
    __device__ __forceinline__ void leave() {
      item += block.item_step();
      part = pass = rows = 0;
    }
  };

  __device__ __forceinline__ int first_item() const { return blockIdx.x / arguments_.blocks; }
  __device__ __forceinline__ int item_step() const { return gridDim.x / arguments_.blocks; }
  // Counted over all images.
  __device__ __forceinline__ int query_block(int item, int pass) const {
    return (item / arguments_.heads * arguments_.passes + pass) * arguments_.blocks + rank();
  }
  __device__ __forceinline__ int rank() const { return arguments_.blocks > 1 ? static_cast<int>(cluster_rank()) : 0; }

  __device__ __forceinline__ uint32_t tile(int slot) const { return shared_ + slot * C::kSlotBytes; }
  __device__ __forceinline__ uint32_t rest_tile(int slot) const { return tile(slot) + C::kTileBytes; }
  __device__ __forceinline__ uint32_t landed(int slot) const { return shared_ + C::kBarriersAt + slot * 8; }
  __device__ __forceinline__ uint32_t normalised(int slot) const { return landed(C::kSlots) + slot * 8; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return normalised(C::kSlots) + slot * 8; }

  // Where 8 columns of a row lie.
  __device__ __forceinline__ uint32_t chunk(int slot, int row, int number) const {
    if (number < 8) return tile(slot) + row * kSwizzleBytes + (number ^ row % 8) * 16;
    constexpr int chunks = C::kRestBytes / 16;
    return rest_tile(slot) + row * C::kRestBytes + (number - 8 ^ row / (8 / chunks) % chunks) * 16;
  }

  // Keys or values, by each warp for itself, to every block that copies to this slot.
  __device__ __forceinline__ void release(int slot) const {
    const int lane = threadIdx.x % 32;
    if (arguments_.blocks > 1) {
      if (lane < arguments_.blocks) barrier_arrive_remote(empty(slot), lane);
    } else {
      if (lane == 0) barrier_arrive(empty(slot));  // sooner than by way of a cluster
    }
  }

  // A warp, one lane of which starts the copies of the cursor's rows as soon as their slot is free.
  __device__ __forceinline__ void copy(const Cursor& cursor) const {
    const int slot = cursor.slot(), head = cursor.item % arguments_.heads;
    const int block = query_block(cursor.item, cursor.pass);
    const int image_row = block / arguments_.query_blocks * arguments_.tokens;
    const int row = cursor.part == 0 ? block * kSlotRows : image_row + cursor.rows;
    const int matrix = cursor.part * arguments_.heads + head;
    const int boxes = arguments_.blocks, box_rows = kSlotRows / boxes;
    // This block's half of what both need: values for both, keys, which are still to be normalised, for itself.
    const bool half = cursor.part > 0 && boxes > 1;
    const bool keys = cursor.part == 1;
    barrier_wait(empty(slot), cursor.phase() ^ 1);
    __syncwarp();
    if (!elect_one()) return;
    barrier_arrive_expect(landed(slot), cursor.part == 2 ? C::kValueBytes : keys ? C::kKeyBytes / boxes : C::kKeyBytes);
    for (int box = half ? rank() : 0; box < boxes; box += half ? boxes : 1) {
      const auto copy_rows = [&](const CUtensorMap& map, uint32_t destination, int row_bytes, int column) {
        destination += box * box_rows * row_bytes;
        if (half && !keys) {
          copy_box_multicast(&map, destination, landed(slot), kBoth, column, row + box * box_rows, matrix);
        } else {
          copy_box(&map, destination, landed(slot), column, row + box * box_rows, matrix);
        }
      };
      if (cursor.part == 2) {
#pragma unroll
        for (int i = 0; i < C::kValueTiles; ++i) {
          copy_rows(map_values_, tile(slot) + i * C::kValueTileBytes, C::kValueRowBytes, 32 * i);
        }
      } else {
        copy_rows(map_main_, tile(slot), kSwizzleBytes, 0);
        if constexpr (C::kRest > 0) copy_rows(map_rest_, rest_tile(slot), C::kRestBytes, 64);
      }
    }
  }

  // A thread a row.
  __device__ __forceinline__ void normalise(int slot, int part) const {
    const int row = threadIdx.x % kGroupThreads;
    normalise_row<Element, C::kChunks, 1>([&](int i) { return chunk(slot, row, i); }, weights_ + part * 2 * C::kWidth,
                                          arguments_.eps);
    shared_fence();
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(normalised(slot));
  }

  // This block's half of the keys for both blocks, two threads a row. What a warp has normalised the copy engine takes
  // to the other block, where it counts as arrived.
  __device__ __forceinline__ void normalise_for_both(int slot) const {
    constexpr int rows = kSlotRows / 2 / (kGroupThreads / 32);  // of a warp
    const int row = rank() * (kSlotRows / 2) + threadIdx.x % kGroupThreads / 2;
    normalise_row<Element, C::kChunks, 2>([&](int i) { return chunk(slot, row, i); }, weights_ + 2 * C::kWidth,
                                          arguments_.eps);
    shared_fence();
    __syncwarp();
    const int first = __shfl_sync(0xffffffffu, row, 0);
    if (!elect_one()) return;
    barrier_arrive_expect(normalised(slot), C::kKeyBytes / kSlotRows * rows);
    const uint32_t way = remote_address(shared_, rank() ^ 1) - shared_;
    copy_to_block(tile(slot) + first * kSwizzleBytes, way, rows * kSwizzleBytes, normalised(slot));
    if constexpr (C::kRest > 0) {
      copy_to_block(rest_tile(slot) + first * C::kRestBytes, way, rows * C::kRestBytes, normalised(slot));
    }
  }

  // Products of this group's 64 queries with the keys.
  __device__ __forceinline__ void score(int query_slot, int group, int key_slot, float (&scores)[kSlotRows / 2]) const {
    const uint64_t q = operand_descriptor(tile(query_slot) + group * 64 * kSwizzleBytes, 0);
    const uint64_t k = operand_descriptor(tile(key_slot), 0);
    mma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      mma<Element, kSlotRows, false, false>(scores, q + step * 2, k + step * 2, step > 0);
    }
    if constexpr (C::kRest > 0) {
      const uint64_t q_rest = operand_descriptor<C::kRestBytes>(rest_tile(query_slot) + group * 64 * C::kRestBytes, 0);
      const uint64_t k_rest = operand_descriptor<C::kRestBytes>(rest_tile(key_slot), 0);
#pragma unroll
      for (int step = 0; step < C::kRest / 16; ++step) {
        mma<Element, kSlotRows, false, false>(scores, q_rest + step * 2, k_rest + step * 2, 1);
      }
    }
    mma_commit();
    mma_wait<0>();
    pin(scores);
  }

  __device__ __forceinline__ void add_values(int value_slot, bool first, uint32_t (&shares)[kSlotRows / 4],
                                             Sums<C::kWidth>& sums) const {
    const uint64_t v = operand_descriptor<C::kValueRowBytes>(tile(value_slot), C::kValueTileBytes);
    pin(shares);
    mma_fence();
#pragma unroll
    for (int step = 0; step < kSlotRows / 16; ++step) {
      mma_registers<Element, C::kWidth>(sums.values, shares + 4 * step, v + step * C::kValueRowBytes,
                                        !first || step > 0);
    }
    mma_commit();
    mma_wait<0>();
    pin(sums.values);
  }

  // By way of the queries' slot, where each warp's rows are its own again, to whole rows of memory.
  __device__ __forceinline__ void store(int block, int head, int group, int query_slot,
                                        const Sums<C::kWidth>& sums) const {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    synchronize_group(group);  // the other warps' products have read the queries
    const int first_row = group * 64 + warp * 16;
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      float total = sums.total[upper];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const float inverse = reciprocal(total);
      const int row = first_row + upper * 8 + lane / 4;
#pragma unroll
      for (int i = 0; i < C::kChunks; ++i) {
        const float left = sums.values[4 * i + 2 * upper], right = sums.values[4 * i + 2 * upper + 1];
        store_shared(chunk(query_slot, row, i) + lane % 4 * 4, round_pair<Element>(left * inverse, right * inverse));
      }
    }
    __syncwarp();
    const int heads = arguments_.heads;
    const int64_t first = int64_t{block} * kSlotRows + first_row;  // blocks of queries lie behind one another
    Element* const target = static_cast<Element*>(arguments_.out) + (first * heads + head) * C::kWidth;
#pragma unroll 2
    for (int place = lane; place < 16 * C::kChunks; place += 32) {
      const int row = place / C::kChunks, number = place % C::kChunks;
      const uint4 word = load_shared(chunk(query_slot, first_row + row, number));
      store_global(target + int64_t{row} * heads * C::kWidth + number * 8, word);
    }
    shared_fence();
    __syncwarp();
  }

  const CUtensorMap& map_main_;
  const CUtensorMap& map_rest_;
  const CUtensorMap& map_values_;
  const AttentionArguments& arguments_;
  float* weights_;
  uint32_t shared_;
};

template <class C>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    attention_kernel(const __grid_constant__ CUtensorMap map_main, const __grid_constant__ CUtensorMap map_rest,
                     const __grid_constant__ CUtensorMap map_values,
                     const __grid_constant__ AttentionArguments arguments) {
  extern __shared__ uint8_t dynamic_shared[];
  uint8_t* const shared = dynamic_shared + (1024 - shared_address(dynamic_shared) % 1024) % 1024;
  const AttentionBlock<C> block(map_main, map_rest, map_values, arguments, shared);
  block.prepare();
  const bool pair = arguments.blocks > 1;
  if (pair) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / kGroupThreads, 0);  // known to be the same for a warp
  if (group < 2) {
    take_registers<kAttendingRegisters>();
    block.attend(group);
  } else if (group == 2) {
    take_registers<kNormalisingRegisters>();
    block.normalise();
  } else {
    give_registers<kCopyingRegisters>();
    if (__shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0) == 0) block.copy();
    __syncwarp();
  }
  if (pair) cluster_sync();  // the other may still write here and arrive at barriers here
}

}  // namespace dit_moe::sm90
