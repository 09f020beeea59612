// What the router and the routing plan share: the table of counts between their two launches.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace dit_moe {

// Slots are cut into ranges of equal length, one block each, which counts its choices of every expert into a row of a
// table. Every block of the plan reads the whole table, hence the bound on its size.
constexpr int64_t kTableSize = 32768;  // entries, 128 KB
static_assert(2 * kTableSize * sizeof(int32_t) == DIT_MOE_ROUTING_WORKSPACE, "counts and sums of probabilities");
constexpr int64_t kMaxTableRows = 2048;
constexpr int64_t kMaxPlanExperts = 512;

struct CountTable {
  const int32_t* counts;   // (rows, E)
  const float* prob_sums;  // (rows, E): the sum of each range's probabilities, or null
  int rows;
  int slots;  // of a range
};

// How many units of `num_units` each range takes, so that the table holds all ranges.
inline int64_t units_per_range(int64_t num_units, int64_t num_experts) {
  return std::max<int64_t>(1, ceil_div(num_units, std::min(kMaxTableRows, kTableSize / num_experts)));
}

inline bool valid_plan(const DitMoePlan& plan, int64_t num_slots, int64_t num_experts) {
  return fits_in_31_bits(num_slots) && num_experts >= 1 && num_experts <= kMaxPlanExperts && plan.tile_rows >= 1 &&
         fits_in_31_bits(plan.tile_rows);
}

// The balance loss, sum over the experts of count * sum of probabilities, times scale; null: it is not wanted.
struct Balance {
  float* loss;
  float scale;
};

// Tokens that go to their rows at once; null: they do not.
struct Dispatch {
  const uint4* x;  // (T, words)
  uint4* rows;     // (T * top_k, words)
  unsigned words, top_k;
};

// Whether that is possible: there must be few tokens.
bool may_dispatch(const CountTable& table, int64_t num_experts);

// From the counts to the plan, one launch. Id is int32_t or int64_t. starts_early: before the kernel in front of it is
// done; on Hopper.
template <typename Id>
cudaError_t launch_place(const Id* ids, const CountTable& table, const DitMoePlan& plan, const Balance& balance,
                         const Dispatch& dispatch, int64_t num_slots, int64_t num_experts, bool starts_early,
                         cudaStream_t stream);

// dit_moe_route, see launch.h. overlaps: kernels may start before those in front of them are done; on Hopper, and if
// there are few tokens, for those would be in each other's way.
cudaError_t route(const void* x, const void* gate, float* weights, int32_t* ids, float* probs, float* balance,
                  const DitMoePlan& plan, void* rows, void* workspace, int64_t num_tokens, int64_t depth,
                  int64_t num_experts, int64_t top_k, double balance_scale, DitMoeDtype dtype, DitMoeDtype gate_dtype,
                  bool overlaps, cudaStream_t stream);

}  // namespace dit_moe
