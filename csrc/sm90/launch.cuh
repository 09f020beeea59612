// Host side: a launch of the grouped matrix product.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "../early_start.cuh"
#include "grouped_gemm.cuh"
#include "problem.h"
#include "tensor_map.cuh"
#include "tile_choice.h"

namespace dit_moe::sm90 {

// A size that a kernel may hold in 32 bits, where matrix rows are whole multiples of 16 bytes.
inline bool valid_width(int64_t width) { return width > 0 && width <= 1 << 30 && width % 8 == 0; }

inline bool valid(const Problem& problem) {
  for (const void* pointer : {problem.x, problem.w, const_cast<const void*>(problem.out)}) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  }
  return problem.rows >= 0 && problem.rows <= std::numeric_limits<int32_t>::max() - kMaxHeight &&
         valid_width(problem.depth) && valid_width(problem.width) && problem.num_experts > 0 &&
         problem.num_experts <= std::numeric_limits<int32_t>::max() / kTileM &&
         (problem.offsets != nullptr || problem.num_experts == 1);
}

// blocks: of a cluster. starts_early: before the kernel in front of it is done.
template <typename... Parameters>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int64_t clusters, int blocks, int threads, int shared_bytes,
                            bool starts_early, cudaStream_t stream, const Parameters&... arguments) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (blocks > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  }
  if (starts_early) attributes[count++] = early_start();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class Block>
cudaError_t enqueue(const CUtensorMap& map_a, const CUtensorMap& map_b, const typename Block::Arguments& arguments,
                    int64_t clusters, cudaStream_t stream, Start start = Start::kAfterPrevious) {
  if (start == Start::kWithOffsets && !Block::kOverlaps) return cudaErrorInvalidValue;
  if (start == Start::kWithWeights && !Block::kGuesses) return cudaErrorInvalidValue;
  return launch_clusters(grouped_gemm_kernel<Block>, clusters, Block::kCluster, kThreads<Block>,
                         Block::Layout::kDynamicBytes, start != Start::kAfterPrevious, stream, map_a, map_b, arguments);
}

inline cudaError_t count_multiprocessors(int* count) {
  int device;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device) : error;
}

// run(multiprocessors) for a problem that is valid and has rows.
template <typename AnyProblem, typename Run>
cudaError_t with_multiprocessors(const AnyProblem& problem, int64_t rows, const Run& run) {
  if (!valid(problem)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  int multiprocessors;
  const cudaError_t error = count_multiprocessors(&multiprocessors);
  return error == cudaSuccess ? run(multiprocessors) : error;
}

// run(a value of the element type) for a type that these kernels have.
template <typename Run>
cudaError_t with_element(DitMoeDtype dtype, const Run& run) {
  switch (dtype) {
    case DIT_MOE_FLOAT16:
      return run(__half{});
    case DIT_MOE_BFLOAT16:
      return run(__nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

template <class C>
cudaError_t launch_tiles(const Problem& problem, int multiprocessors) {
  constexpr bool is_bf16 = std::is_same_v<typename C::Element, __nv_bfloat16>;
  const int64_t tiles_n = ceil_div(problem.width, C::kColumns);
  const int64_t tiles_m = ceil_div(problem.rows, kHeightStep) + problem.num_experts;  // upper bound
  if (tiles_m * tiles_n > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidValue;
  CUtensorMap map_x{}, map_w{};
  cudaError_t error = make_map(&map_x, problem.x, is_bf16, problem.depth, problem.rows, 0, C::kBoxTokens);
  if (error != cudaSuccess) return error;
  error = make_map(&map_w, problem.w, is_bf16, C::kTransposed ? problem.width : problem.depth,
                   C::kTransposed ? problem.depth : problem.width, problem.num_experts, 64);
  if (error != cudaSuccess) return error;
  const GroupedArguments arguments{problem.offsets,
                                   problem.out,
                                   static_cast<int>(problem.num_experts),
                                   static_cast<int>(problem.depth),
                                   static_cast<int>(problem.width),
                                   problem.rows};
  const int64_t clusters = std::min<int64_t>(ceil_div(tiles_m * tiles_n, C::kCluster), multiprocessors / C::kCluster);
  return enqueue<Block<C>>(map_x, map_w, arguments, clusters, problem.stream, problem.start);
}

template <typename Element, bool kTransposed>
cudaError_t launch(const Problem& problem) {
  return with_multiprocessors(problem, problem.rows, [&](int multiprocessors) {
    if (wide_tiles(problem.rows, problem.width, problem.num_experts)) {
      return launch_tiles<Config<Element, kTransposed, 3>>(problem, multiprocessors);
    }
    return launch_tiles<Config<Element, kTransposed, 2>>(problem, multiprocessors);
  });
}

// The same for an element type known at run time.
template <bool kTransposed>
cudaError_t launch(const Problem& problem, DitMoeDtype dtype) {
  return with_element(dtype, [&](auto element) { return launch<decltype(element), kTransposed>(problem); });
}

}  // namespace dit_moe::sm90
