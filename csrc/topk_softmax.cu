// Softmax and top-k of given logits, and the softmax's gradient; see launch.h.
#include "softmax_topk.cuh"

namespace dit_moe {
namespace {

constexpr int kBlock = 128;
constexpr int kLanes = 8;  // of a token
constexpr int kTokens = kBlock / kLanes;

// logits: (T, E), weights: (T, K), ids: (T, K), probs: (T, E).
template <int kPer>
__global__ void __launch_bounds__(kBlock)
    topk_softmax_kernel(const float* __restrict__ logits, float* __restrict__ weights, int32_t* __restrict__ ids,
                        float* __restrict__ probs, int64_t num_tokens, int num_experts, int top_k) {
  const TokenGroup<kLanes, kPer> group{static_cast<int>(threadIdx.x) % kLanes, num_experts};
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x / kLanes;
  const bool in_range = token < num_tokens;
  float values[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const bool valid = in_range && group.expert(i) < num_experts;
    values[i] = valid ? logits[token * num_experts + group.expert(i)] : 0.0f;
  }
  group.softmax(values);
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (in_range && group.expert(i) < num_experts) probs[token * num_experts + group.expert(i)] = values[i];
  }
  group.choose(values, top_k, [&](int k, int expert, float weight) {
    if (!in_range || group.lane != 0) return;
    weights[token * top_k + k] = weight;
    ids[token * top_k + k] = expert;
  });
}

// dweights: (T, K) or null, dprobs: (T, E) or null, ids: (T, K), probs: (T, E), dlogits: (T, E).
template <int kPer>
__global__ void __launch_bounds__(kBlock)
    topk_softmax_backward_kernel(const float* __restrict__ dweights, const float* __restrict__ dprobs,
                                 const int32_t* __restrict__ ids, const float* __restrict__ probs,
                                 float* __restrict__ dlogits, int64_t num_tokens, int num_experts, int top_k) {
  const TokenGroup<kLanes, kPer> group{static_cast<int>(threadIdx.x) % kLanes, num_experts};
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x / kLanes;
  const bool in_range = token < num_tokens;
  float prob[kPer], grad[kPer], product[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const bool valid = in_range && group.expert(i) < num_experts;
    const int64_t place = token * num_experts + group.expert(i);
    prob[i] = valid ? probs[place] : 0.0f;
    grad[i] = valid && dprobs != nullptr ? dprobs[place] : 0.0f;
  }
  if (dweights != nullptr && in_range) {
    for (int k = 0; k < top_k; ++k) {
      const int32_t chosen = ids[token * top_k + k];
      const float dweight = dweights[token * top_k + k];
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        if (group.expert(i) == chosen) grad[i] += dweight;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) product[i] = prob[i] * grad[i];
  const float mean = group.sum(product);
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (in_range && group.expert(i) < num_experts) {
      dlogits[token * num_experts + group.expert(i)] = prob[i] * (grad[i] - mean);
    }
  }
}

bool valid(int64_t num_tokens, int64_t num_experts, int64_t top_k) {
  return num_experts >= 1 && num_experts <= kMaxRouterExperts && top_k >= 1 && top_k <= num_experts &&
         fits_in_31_bits(num_tokens) && fits_in_31_bits(num_tokens * top_k);
}

unsigned blocks(int64_t num_tokens) { return static_cast<unsigned>((num_tokens + kTokens - 1) / kTokens); }

}  // namespace
}  // namespace dit_moe

extern "C" cudaError_t dit_moe_topk_softmax(const float* logits, float* weights, int32_t* ids, float* probs,
                                            int64_t num_tokens, int64_t num_experts, int64_t top_k,
                                            cudaStream_t stream) {
  using namespace dit_moe;
  if (!valid(num_tokens, num_experts, top_k)) return cudaErrorInvalidValue;
  if (num_tokens == 0) return cudaSuccess;
  return with_expert_groups(num_experts, [&](auto groups) {
    topk_softmax_kernel<groups.value><<<blocks(num_tokens), kBlock, 0, stream>>>(
        logits, weights, ids, probs, num_tokens, static_cast<int>(num_experts), static_cast<int>(top_k));
    return cudaGetLastError();
  });
}

extern "C" cudaError_t dit_moe_topk_softmax_backward(const float* dweights, const float* dprobs, const int32_t* ids,
                                                     const float* probs, float* dlogits, int64_t num_tokens,
                                                     int64_t num_experts, int64_t top_k, cudaStream_t stream) {
  using namespace dit_moe;
  if (!valid(num_tokens, num_experts, top_k)) return cudaErrorInvalidValue;
  if (num_tokens == 0) return cudaSuccess;
  return with_expert_groups(num_experts, [&](auto groups) {
    topk_softmax_backward_kernel<groups.value><<<blocks(num_tokens), kBlock, 0, stream>>>(
        dweights, dprobs, ids, probs, dlogits, num_tokens, static_cast<int>(num_experts), static_cast<int>(top_k));
    return cudaGetLastError();
  });
}
