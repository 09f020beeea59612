// Softmax over a token's experts and its top_k choices, by a few neighbouring lanes of a warp.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "router_inputs.cuh"

namespace dit_moe {

// Experts in whole groups of eight, 1, 2, 4 or 8 of them: what the router's kernels are compiled for.
template <typename Launch>
cudaError_t with_expert_groups(int64_t num_experts, const Launch& launch) {
  if (num_experts <= 8) return launch(std::integral_constant<int, 1>{});
  if (num_experts <= 16) return launch(std::integral_constant<int, 2>{});
  if (num_experts <= 32) return launch(std::integral_constant<int, 4>{});
  return launch(std::integral_constant<int, 8>{});
}

// A token belongs to kLanes neighbouring lanes; lane l holds the experts l, l + kLanes, ..., kPer of them. All lanes of
// the warp call these functions together, those of tokens out of range too.
template <int kLanes, int kPer>
struct TokenGroup {
  int lane, num_experts;

  __device__ __forceinline__ int expert(int i) const { return lane + i * kLanes; }

  template <typename Combine>
  __device__ __forceinline__ float all(float value, const Combine& combine) const {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    return value;
  }

  __device__ __forceinline__ float sum(const float (&values)[kPer]) const {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kPer; ++i) total += values[i];
    return all(total, [](float a, float b) { return a + b; });
  }

  // Logits to probabilities, in place; zero beyond the last expert. A NaN or +inf makes all of them NaN.
  __device__ __forceinline__ void softmax(float (&values)[kPer]) const {
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (expert(i) < num_experts) largest = fmaxf(largest, values[i]);
    }
    largest = all(largest, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int i = 0; i < kPer; ++i) values[i] = expert(i) < num_experts ? expf(values[i] - largest) : 0.0f;
    const float total = sum(values);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (expert(i) < num_experts) values[i] /= total;
    }
  }

  // Calls visit(k, expert, probability) for the top_k choices in descending order, equal ones by their ids. NaN counts
  // above all numbers, so the choices are distinct and valid whatever the probabilities are.
  template <typename Visit>
  __device__ __forceinline__ void choose(const float (&probs)[kPer], int top_k, const Visit& visit) const {
    constexpr float not_a_number = 2.0f, taken = -1.0f;  // as scores: above and below all probabilities
    float score[kPer];
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      score[i] = expert(i) >= num_experts ? taken : probs[i] != probs[i] ? not_a_number : probs[i];
    }
    for (int k = 0; k < top_k; ++k) {
      float best = taken;
      int chosen = kMaxRouterExperts;
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        if (score[i] > best) {
          best = score[i];
          chosen = expert(i);
        }
      }
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, best, distance);
        const int other_chosen = __shfl_xor_sync(0xffffffffu, chosen, distance);
        if (other > best || (other == best && other_chosen < chosen)) {
          best = other;
          chosen = other_chosen;
        }
      }
      visit(k, chosen, best == not_a_number ? NAN : best);
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        if (expert(i) == chosen) score[i] = taken;
      }
    }
  }
};

}  // namespace dit_moe
