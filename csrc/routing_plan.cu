// The routing plan: a stable counting sort of slots by expert in two launches, count and place; see launch.h. Where
// there are few tokens, what places them can also copy them there.
#include "early_start.cuh"
#include "routing.cuh"

namespace dit_moe {
namespace {

constexpr unsigned kFull = 0xffffffffu;
constexpr int kPlanThreads = 512;
constexpr int kWarps = kPlanThreads / kWarp;
constexpr int kItems = 2;                      // slots of a thread
constexpr int kChunk = kPlanThreads * kItems;  // slots that a block places at a time
constexpr int kCountUnit = 512;                // slots that a block counts at a time
constexpr int64_t kMaxPlaceBlocks = 256;

template <typename Id>
__device__ __forceinline__ int routed_expert(const Id* ids, int64_t slot, int64_t end, int num_experts) {
  const Id id = slot < end ? ids[slot] : Id{-1};
  return id >= 0 && id < num_experts ? static_cast<int>(id) : -1;
}

// ids: (N,), counts: (ranges, E). Integer additions in shared memory: their order does not matter.
template <typename Id>
__global__ void __launch_bounds__(kThreads) count_kernel(const Id* __restrict__ ids, int32_t* __restrict__ counts,
                                                         int64_t num_slots, int64_t slots, int num_experts) {
  __shared__ int32_t count[kMaxPlanExperts];
  for (int e = threadIdx.x; e < num_experts; e += kThreads) count[e] = 0;
  __syncthreads();
  const int64_t first = blockIdx.x * slots, end = min(num_slots, first + slots);
  for (int64_t slot = first + threadIdx.x; slot < end; slot += kThreads) {
    const int expert = routed_expert(ids, slot, end, num_experts);
    if (expert >= 0) atomicAdd(&count[expert], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < num_experts; e += kThreads) counts[blockIdx.x * num_experts + e] = count[e];
}

__device__ __forceinline__ int32_t warp_prefix_sum(int32_t value, int lane) {
#pragma unroll
  for (int distance = 1; distance < static_cast<int>(kWarp); distance *= 2) {
    const int32_t below = __shfl_up_sync(kFull, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

// What every block knows of all experts before it places its slots.
struct Experts {
  int32_t before[kMaxPlanExperts];  // rows of the slots in front of this block's
  int32_t offset[kMaxPlanExperts + 1];
  int32_t tile_end[kMaxPlanExperts];  // tiles of the experts up to this one
  int32_t total[kMaxPlanExperts];
};

// Threads side by side read experts side by side, each every so many-th of the table's rows, in their order:
// visit(row, value).
template <typename Value, typename Visit>
__device__ __forceinline__ void visit_table(const Value* __restrict__ table, int rows, int num_experts,
                                            const Visit& visit) {
  constexpr int batch = 8;  // loads under way together
  const int groups = kPlanThreads / num_experts, group = threadIdx.x / num_experts;
  const int expert = threadIdx.x - group * num_experts;
  if (group >= groups) return;
  for (int first = group; first < rows; first += batch * groups) {
    Value values[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const int row = first + i * groups;
      values[i] = row < rows ? table[row * num_experts + expert] : Value{};
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) visit(first + i * groups, values[i]);
  }
}

// Sets before, to the sums over the rows below `first_range`, and total. Of whole numbers: the order does not matter.
__device__ __forceinline__ void sum_counts(Experts& experts, const CountTable& table, int first_range,
                                           int num_experts) {
  const int thread = threadIdx.x;
  if (thread < num_experts) experts.before[thread] = experts.total[thread] = 0;
  int32_t before = 0, total = 0;
  visit_table(table.counts, table.rows, num_experts, [&](int row, int32_t count) {
    total += count;
    before += row < first_range ? count : 0;
  });
  __syncthreads();
  atomicAdd(&experts.total[thread % num_experts], total);
  atomicAdd(&experts.before[thread % num_experts], before);
  __syncthreads();
}

// Thread e < E returns its expert's sum of probabilities, in a fixed order.
__device__ __forceinline__ float sum_probabilities(const CountTable& table, int num_experts, float* scratch) {
  const int thread = threadIdx.x;
  float sum = 0.0f, total = 0.0f;
  visit_table(table.prob_sums, table.rows, num_experts, [&](int, float value) { sum += value; });
  scratch[thread] = sum;
  __syncthreads();
  for (int i = thread; i < kPlanThreads / num_experts * num_experts && thread < num_experts; i += num_experts) {
    total += scratch[i];
  }
  __syncthreads();
  return total;
}

// By the first warp: offsets and tile ends from the totals.
__device__ __forceinline__ void scan_experts(Experts& experts, int num_experts, int tile_rows, int lane) {
  int32_t rows = 0, tiles = 0;
  for (int first = 0; first < num_experts; first += kWarp) {
    const int e = first + lane;
    const int32_t total = e < num_experts ? experts.total[e] : 0;
    const int32_t end = rows + warp_prefix_sum(total, lane);
    const int32_t tile_end = tiles + warp_prefix_sum((total + tile_rows - 1) / tile_rows, lane);
    if (e < num_experts) {
      experts.offset[e] = end - total;
      experts.tile_end[e] = tile_end;
    }
    rows = __shfl_sync(kFull, end, kWarp - 1);
    tiles = __shfl_sync(kFull, tile_end, kWarp - 1);
  }
  if (lane == 0) experts.offset[num_experts] = rows;
}

// The tile schedule, shared out over the blocks: each entry looks up the expert that owns it.
__device__ __forceinline__ void write_tiles(const Experts& experts, const DitMoePlan& plan, int64_t num_tiles,
                                            int num_experts) {
  const int tile_rows = static_cast<int>(plan.tile_rows);
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kPlanThreads + threadIdx.x; tile < num_tiles;
       tile += static_cast<int64_t>(gridDim.x) * kPlanThreads) {
    int owner = 0;  // the first expert whose tiles end behind this one
    for (int above = num_experts; owner < above;) {
      const int middle = (owner + above) / 2;
      if (experts.tile_end[middle] > tile) {
        above = middle;
      } else {
        owner = middle + 1;
      }
    }
    const bool used = owner < num_experts;
    const int local = used ? static_cast<int>(tile) - (owner > 0 ? experts.tile_end[owner - 1] : 0) : 0;
    plan.tile_expert[tile] = used ? owner : -1;
    plan.tile_row[tile] = used ? experts.offset[owner] + local * tile_rows : 0;
  }
}

// A warp a token, of `count` tokens whose slots' rows are in shared memory.
__device__ __forceinline__ void dispatch_tokens(const Dispatch& dispatch, int64_t first, int count, const int32_t* rows,
                                                int warp, int lane) {
  constexpr int batch = 6;  // words of a lane under way together: a token of G has as many
  for (int token = warp; token < count; token += kWarps) {
    const uint4* source = dispatch.x + (first + token) * dispatch.words;
    for (unsigned start = lane; start < dispatch.words; start += batch * kWarp) {
      uint4 words[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        if (start + i * kWarp < dispatch.words) words[i] = load_once(source + start + i * kWarp);
      }
      for (unsigned k = 0; k < dispatch.top_k; ++k) {
        uint4* target = dispatch.rows + static_cast<int64_t>(rows[token * dispatch.top_k + k]) * dispatch.words;
#pragma unroll
        for (int i = 0; i < batch; ++i) {
          if (start + i * kWarp < dispatch.words) store(target + start + i * kWarp, words[i]);
        }
      }
    }
  }
}

// ids: (N,). Block b places the slots of `ranges` rows of the table; the last block has none and writes the summaries.
// With kDispatches a range is whole tokens, a block has at most kChunk slots, and all of them are routed.
template <typename Id, bool kDispatches>
__global__ void __launch_bounds__(kPlanThreads)
    place_kernel(const Id* __restrict__ ids, CountTable table, int ranges, DitMoePlan plan, int64_t num_tiles,
                 Balance balance, Dispatch dispatch, int64_t num_slots, int num_experts) {
  __shared__ Experts experts;
  __shared__ int32_t warp_rows[kWarps][kMaxPlanExperts];  // counts of each warp's slots, then its next rows
  __shared__ float sums[kPlanThreads];
  __shared__ int32_t rows_here[kDispatches ? kChunk : 1];  // of this block's slots
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const int first_range = min(table.rows, static_cast<int>(blockIdx.x) * ranges);

  if (thread == 0) let_next_start();
  wait_for_previous();
  sum_counts(experts, table, first_range, num_experts);
  if (warp == 0) scan_experts(experts, num_experts, static_cast<int>(plan.tile_rows), lane);
  __syncthreads();
  write_tiles(experts, plan, num_tiles, num_experts);

  if (blockIdx.x == gridDim.x - 1) {
    for (int e = thread; e <= num_experts; e += kPlanThreads) {
      plan.expert_offsets[e] = experts.offset[e];
      if (e < num_experts) plan.tokens_per_expert[e] = experts.total[e];
    }
    if (balance.loss != nullptr && balance.scale == 0.0f) {
      if (thread == 0) *balance.loss = 0.0f;  // also where a probability is NaN
    } else if (balance.loss != nullptr) {
      const float sum = sum_probabilities(table, num_experts, sums);
      if (thread < num_experts) sums[thread] = sum * static_cast<float>(experts.total[thread]);
      __syncthreads();
      if (thread == 0) {
        float total = 0.0f;
        for (int e = 0; e < num_experts; ++e) total += sums[e];
        *balance.loss = balance.scale * total;
      }
    }
    return;
  }

  int32_t next =
      thread < num_experts ? experts.offset[thread] + experts.before[thread] : 0;  // this thread's expert's next row
  const int32_t used = experts.offset[num_experts];
  const int64_t end = min(num_slots, static_cast<int64_t>(first_range + ranges) * table.slots);
  for (int64_t start = static_cast<int64_t>(first_range) * table.slots; start < end; start += kChunk) {
    const int64_t first_slot = start + warp * (kItems * kWarp) + lane;
    for (int e = lane; e < num_experts; e += kWarp) warp_rows[warp][e] = 0;
    __syncwarp();
    int expert[kItems], rank[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      expert[i] = routed_expert(ids, first_slot + i * kWarp, end, num_experts);
      const unsigned peers = __match_any_sync(kFull, expert[i]);
      const int below = __popc(peers & ((1u << lane) - 1));
      rank[i] = expert[i] >= 0 ? warp_rows[warp][expert[i]] + below : 0;
      __syncwarp();
      if (expert[i] >= 0 && below == 0) warp_rows[warp][expert[i]] += __popc(peers);
      __syncwarp();
    }
    __syncthreads();
    if (thread < num_experts) {
      for (int w = 0; w < kWarps; ++w) {
        const int32_t count = warp_rows[w][thread];
        warp_rows[w][thread] = next;
        next += count;
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t slot = first_slot + i * kWarp;
      if (slot >= end) continue;
      const int32_t row = expert[i] >= 0 ? warp_rows[warp][expert[i]] + rank[i] : -1;
      plan.slot_to_row[slot] = row;
      if (row >= 0) plan.row_to_slot[row] = static_cast<int32_t>(slot);
      if constexpr (kDispatches) rows_here[slot - start] = row;
      // The last rows, as many as there are unrouted slots, belong to nobody: each block clears its share.
      if (slot >= used) plan.row_to_slot[slot] = -1;
    }
    __syncwarp();  // before the next chunk's counts replace the rows
    if constexpr (kDispatches) {
      __syncthreads();
      const int count = static_cast<int>(end - start) / static_cast<int>(dispatch.top_k);
      dispatch_tokens(dispatch, start / dispatch.top_k, count, rows_here, warp, lane);
    }
  }
}

// Ranges that a block places at least, for there to be no more than kMaxPlaceBlocks.
int64_t fewest_ranges(const CountTable& table) { return std::max<int64_t>(1, ceil_div(table.rows, kMaxPlaceBlocks)); }

template <typename Id>
cudaError_t launch_plan(const Id* ids, const DitMoePlan& plan, int32_t* counts, int64_t num_slots, int64_t num_experts,
                        cudaStream_t stream) {
  const int64_t slots = kCountUnit * units_per_range(ceil_div(num_slots, kCountUnit), num_experts);
  const int64_t ranges = ceil_div(num_slots, slots);
  if (ranges > 0) {
    count_kernel<<<static_cast<unsigned>(ranges), kThreads, 0, stream>>>(ids, counts, num_slots, slots,
                                                                         static_cast<int>(num_experts));
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  const CountTable table{counts, nullptr, static_cast<int>(ranges), static_cast<int>(slots)};
  return launch_place(ids, table, plan, {}, {}, num_slots, num_experts, false, stream);
}

}  // namespace

// Each block that dispatches reads all counts, and has its tokens' slots at once.
bool may_dispatch(const CountTable& table, int64_t num_experts) {
  constexpr int64_t few_counts = 8192;
  return table.rows * num_experts <= few_counts && fewest_ranges(table) * table.slots <= kChunk;
}

template <typename Id>
cudaError_t launch_place(const Id* ids, const CountTable& table, const DitMoePlan& plan, const Balance& balance,
                         const Dispatch& dispatch, int64_t num_slots, int64_t num_experts, bool starts_early,
                         cudaStream_t stream) {
  const bool dispatches = dispatch.x != nullptr;
  const int64_t whole_chunk = dispatches ? 1 : ceil_div(kChunk, table.slots);
  const int64_t ranges = std::max(whole_chunk, fewest_ranges(table));
  const int64_t busy = std::min(num_slots, num_experts);  // each expert ends at most one partial tile
  const int64_t num_tiles = ceil_div(num_slots, plan.tile_rows) + busy - (num_slots > 0 ? 1 : 0);
  auto kernel = place_kernel<Id, false>;
  if constexpr (std::is_same_v<Id, int32_t>) {  // as the router gives them
    if (dispatches) kernel = place_kernel<Id, true>;
  }
  const dim3 blocks(static_cast<unsigned>(ceil_div(table.rows, ranges) + 1));
  return launch_kernel(kernel, blocks, dim3(kPlanThreads), starts_early, stream, ids, table, static_cast<int>(ranges),
                       plan, num_tiles, balance, dispatch, num_slots, static_cast<int>(num_experts));
}

template cudaError_t launch_place(const int32_t*, const CountTable&, const DitMoePlan&, const Balance&, const Dispatch&,
                                  int64_t, int64_t, bool, cudaStream_t);

}  // namespace dit_moe

extern "C" cudaError_t dit_moe_routing_plan(const void* ids, int64_t id_bytes, const DitMoePlan* plan, void* workspace,
                                            int64_t num_slots, int64_t num_experts, cudaStream_t stream) {
  using namespace dit_moe;
  if (!valid_plan(*plan, num_slots, num_experts)) return cudaErrorInvalidValue;
  int32_t* counts = static_cast<int32_t*>(workspace);
  switch (id_bytes) {
    case sizeof(int32_t):
      return launch_plan(static_cast<const int32_t*>(ids), *plan, counts, num_slots, num_experts, stream);
    case sizeof(int64_t):
      return launch_plan(static_cast<const int64_t*>(ids), *plan, counts, num_slots, num_experts, stream);
  }
  return cudaErrorInvalidValue;
}
