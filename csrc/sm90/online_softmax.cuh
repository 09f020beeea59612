// The softmax of attention over keys that come in tiles, and its sums of values, in one warpgroup's registers
// (FlashAttention, arXiv 2205.14135). Scores are to the base of 2.
#pragma once

#include <limits>
#include <type_traits>

#include "epilogue.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace dit_moe::sm90 {

// Of a lane's two rows, in the layout of the instruction's accumulators.
template <int kWidth>
struct Sums {
  float values[kWidth / 2];
  float maximum[2] = {kLowest, kLowest};
  float total[2] = {};
  static constexpr float kLowest = -std::numeric_limits<float>::infinity();

  // What was summed under a lower maximum.
  __device__ __forceinline__ void shrink(int upper, float factor) {
    total[upper] *= factor;
#pragma unroll
    for (int i = 0; i < kWidth / 8; ++i) {
      values[4 * i + 2 * upper] *= factor;
      values[4 * i + 2 * upper + 1] *= factor;
    }
  }
};

// Scores of at most so much either way need no maximum: in fp32 and bf16, which have the same exponents, no sum of 2^20
// of their powers overflows, times values of up to 2^40, and no power that counts is lost.
constexpr float kBound = 60.0f;

// A warp. Whether no score can be beyond kBound: queries and keys are LayerNorms, sqrt(width) long before their weights
// and biases. weights: (4, width) fp32 in shared memory: weight and bias of the queries, with all that scales scores,
// then of the keys.
template <typename Element, int kWidth>
__device__ __forceinline__ bool scores_are_bounded(const float* weights) {
  if constexpr (!std::is_same_v<Element, __nv_bfloat16>) return false;
  float bound = 1.0f;
#pragma unroll
  for (int part = 0; part < 2; ++part, weights += 2 * kWidth) {
    float highest = 0.0f, squares = 0.0f;
    for (int i = threadIdx.x % 32; i < kWidth; i += 32) {
      highest = fmaxf(highest, fabsf(weights[i]));
      squares = fmaf(weights[kWidth + i], weights[kWidth + i], squares);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, lanes));
      squares += __shfl_xor_sync(0xffffffffu, squares, lanes);
    }
    bound *= highest * sqrtf(static_cast<float>(kWidth)) + sqrtf(squares);
  }
  return __all_sync(0xffffffffu, bound <= kBound);  // not if it is no number
}

// Of more scores of each row: shares = 2^(scores - the maximum so far), in pairs as the instruction takes them.
// kBounded: the maximum is not needed. Otherwise what was summed before under a lower one shrinks.
template <typename Element, bool kBounded, int kScores, int kWidth>
__device__ __forceinline__ void soften(const float (&scores)[kScores], bool first, Sums<kWidth>& sums,
                                       uint32_t (&shares)[kScores / 2]) {
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {  // the lane's two rows
    float highest = 0.0f;
    if constexpr (!kBounded) {
      highest = sums.maximum[upper];
#pragma unroll
      for (int i = 0; i < kScores / 4; ++i) {
        highest = fmaxf(highest, fmaxf(scores[4 * i + 2 * upper], scores[4 * i + 2 * upper + 1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      if (!first) sums.shrink(upper, power_of_two(sums.maximum[upper] - highest));
      sums.maximum[upper] = highest;
    }
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kScores / 4; ++i) {
      const float left = power_of_two(scores[4 * i + 2 * upper] - highest);
      const float right = power_of_two(scores[4 * i + 2 * upper + 1] - highest);
      total += left + right;
      shares[2 * i + upper] = round_pair<Element>(left, right);
    }
    sums.total[upper] += total;
  }
}

}  // namespace dit_moe::sm90
