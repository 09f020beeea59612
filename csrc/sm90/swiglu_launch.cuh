// Host side: a launch of the grouped product with SwiGLU or its gradient, or of a plain one whose experts have few
// rows.
#pragma once

#include "launch.cuh"
#include "swiglu_block.cuh"

namespace dit_moe::sm90 {

struct SwiGLUProblem {
  Problem product;             // its out is (rows, 2 width) with the gradient of SwiGLU
  void* h = nullptr;           // (rows, 2 width), if the pre-activations are kept
  DSwiGLUTensors gradients{};  // with the gradient of SwiGLU
};

inline bool valid(const SwiGLUProblem& problem) {
  for (const void* pointer : {const_cast<const void*>(problem.h), problem.gradients.h,
                              const_cast<const void*>(problem.gradients.weighted_a)}) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  }
  return valid(problem.product);
}

template <class C>
cudaError_t launch_configuration(const SwiGLUProblem& problem, int multiprocessors) {
  constexpr bool is_bf16 = std::is_same_v<typename C::Element, __nv_bfloat16>;
  const Problem& product = problem.product;
  const int64_t columns = product.width * (C::kPaired ? 2 : 1);  // of the product
  const int64_t tiles_n = ceil_div(product.width, C::kColumns);
  const int64_t tiles_m = product.rows / (kTileM * C::kCluster) + product.num_experts;  // upper bound
  if (tiles_m * tiles_n > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidValue;
  CUtensorMap map_a{}, map_b{};
  cudaError_t error = make_map(&map_a, product.x, is_bf16, product.depth, product.rows, 0, kTileM / 2);
  if (error != cudaSuccess) return error;
  error = make_map(&map_b, product.w, is_bf16, C::kTransposed ? columns : product.depth,
                   C::kTransposed ? product.depth : columns, product.num_experts, C::kBoxRows);
  if (error != cudaSuccess) return error;
  const bool guesses = product.start == Start::kWithWeights;
  const int64_t tiles = (guesses ? product.num_experts : tiles_m) * tiles_n;
  const int64_t clusters = std::min<int64_t>(tiles, multiprocessors / C::kCluster);
  const SwiGLUArguments arguments{product.offsets,
                                  product.out,
                                  problem.h,
                                  static_cast<int>(product.num_experts),
                                  static_cast<int>(product.depth),
                                  static_cast<int>(product.width),
                                  product.rows,
                                  problem.gradients,
                                  guesses};
  return enqueue<SwiGLUBlock<C>>(map_a, map_b, arguments, clusters, product.stream, product.start);
}

template <typename Element, Epilogue kEpilogue, int kTileN>
cudaError_t launch(const SwiGLUProblem& problem) {
  const Problem& product = problem.product;
  return with_multiprocessors(problem, product.rows, [&](int multiprocessors) {
    if constexpr (kTileN > kWidestNarrow) {
      const bool pairs = kEpilogue == Epilogue::kDSwiGLU
                             ? gradient_in_pairs(product.rows, product.num_experts, product.depth)
                             : in_pairs(product.rows, product.num_experts, product.depth);
      if (pairs) return launch_configuration<SwiGLUConfig<Element, kEpilogue, kTileN, 2>>(problem, multiprocessors);
    }
    return launch_configuration<SwiGLUConfig<Element, kEpilogue, kTileN, 1>>(problem, multiprocessors);
  });
}

// The same for an element type known at run time.
template <Epilogue kEpilogue, int kTileN>
cudaError_t launch(const SwiGLUProblem& problem, DitMoeDtype dtype) {
  return with_element(dtype, [&](auto element) { return launch<decltype(element), kEpilogue, kTileN>(problem); });
}

}  // namespace dit_moe::sm90
