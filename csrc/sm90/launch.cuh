// Host side: one launch of a configuration of the grouped matrix product.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "grouped_gemm.cuh"
#include "launch.h"
#include "tensor_map.cuh"
#include "tile_choice.h"

namespace dit_moe::sm90 {

struct Problem {
  const void* a;           // (rows, depth)
  const void* w;           // (num_experts, columns, depth), or (num_experts, depth, columns) if transposed
  const int32_t* offsets;  // (num_experts + 1,), or null where there is one expert
  void* out;               // (rows, width)
  void* h;                 // (rows, 2 width), or null
  int64_t rows, depth, width, num_experts;
  cudaStream_t stream;
  DSwiGLUTensors dswiglu{};  // where that is the epilogue; out is (rows, 2 width) then
};

// A size that a kernel may hold in 32 bits, where matrix rows are whole multiples of 16 bytes.
inline bool valid_width(int64_t width) { return width > 0 && width <= 1 << 30 && width % 8 == 0; }

inline bool valid(const Problem& problem) {
  for (const void* pointer :
       {problem.a, problem.w, const_cast<const void*>(problem.out), const_cast<const void*>(problem.h),
        problem.dswiglu.h, const_cast<const void*>(problem.dswiglu.weighted_a)}) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  }
  return problem.rows >= 0 && problem.rows <= std::numeric_limits<int32_t>::max() - 2 * kTileM &&
         valid_width(problem.depth) && valid_width(problem.width) && problem.num_experts > 0 &&
         problem.num_experts <= std::numeric_limits<int32_t>::max() / kTileM &&
         (problem.offsets != nullptr || problem.num_experts == 1);
}

template <class Block>
cudaError_t enqueue(const CUtensorMap& map_a, const CUtensorMap& map_b, const typename Block::Arguments& arguments,
                    int64_t clusters, cudaStream_t stream) {
  const auto kernel = grouped_gemm_kernel<Block>;
  constexpr int bytes = Block::Layout::kDynamicBytes;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {Block::kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * Block::kCluster));
  config.blockDim = dim3(kThreads<Block>);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, map_a, map_b, arguments);
}

inline cudaError_t count_multiprocessors(int* count) {
  int device;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device) : error;
}

template <class C>
cudaError_t launch(const Problem& problem, int multiprocessors) {
  using Element = typename C::Element;
  constexpr bool is_bf16 = std::is_same_v<Element, __nv_bfloat16>;
  const int64_t columns = problem.width * (C::kPaired ? 2 : 1);  // of the product
  const int64_t tiles_n = (problem.width + C::kColumns - 1) / C::kColumns;
  const int64_t tiles_m = problem.rows / (kTileM * C::kCluster) + problem.num_experts;  // upper bound
  if (tiles_m * tiles_n > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidValue;
  CUtensorMap map_a{}, map_b{};
  cudaError_t error = make_map(&map_a, problem.a, is_bf16, problem.depth, problem.rows, 0, kTileM);
  if (error != cudaSuccess) return error;
  error = make_map(&map_b, problem.w, is_bf16, C::kTransposed ? columns : problem.depth,
                   C::kTransposed ? problem.depth : columns, problem.num_experts, C::kBoxRows);
  if (error != cudaSuccess) return error;
  const int64_t clusters = std::min<int64_t>(tiles_m * tiles_n, multiprocessors / C::kCluster);
  const GroupedArguments arguments{problem.offsets,
                                   problem.out,
                                   problem.h,
                                   static_cast<int>(problem.num_experts),
                                   static_cast<int>(problem.depth),
                                   static_cast<int>(problem.width),
                                   problem.rows,
                                   problem.dswiglu};
  return enqueue<Block<C>>(map_a, map_b, arguments, clusters, problem.stream);
}

template <int kColumns, int kCluster>
struct Option {
  static constexpr TileShape kShape{kColumns, kCluster};
};

// Launches the configuration that the tile choice names, out of the compiled ones.
template <typename Element, Epilogue kEpilogue, bool kTransposed, typename... Options>
cudaError_t launch_best(const Problem& problem) {
  if (!valid(problem)) return cudaErrorInvalidValue;
  if (problem.rows == 0) return cudaSuccess;
  int multiprocessors;
  cudaError_t error = count_multiprocessors(&multiprocessors);
  if (error != cudaSuccess) return error;
  constexpr TileShape shapes[] = {Options::kShape...};
  const bool paired = kEpilogue == Epilogue::kSwiGLU || kEpilogue == Epilogue::kSwiGLUKeep;
  const int64_t columns = problem.width * (paired ? 2 : 1);
  const TileShape best =
      choose_tile(shapes, problem.depth > columns, problem.rows, problem.num_experts, columns, multiprocessors);
  const auto launch_if_best = [&](auto option) {
    constexpr TileShape shape = decltype(option)::kShape;
    if (!(best == shape)) return false;
    error = launch<Config<Element, kEpilogue, kTransposed, shape.columns, shape.cluster>>(problem, multiprocessors);
    return true;
  };
  (void)(launch_if_best(Options{}) || ...);
  return error;
}

// The same for an element type known at run time.
template <Epilogue kEpilogue, bool kTransposed, typename... Options>
cudaError_t launch_best(const Problem& problem, DitMoeDtype dtype) {
  switch (dtype) {
    case DIT_MOE_FLOAT16:
      return launch_best<__half, kEpilogue, kTransposed, Options...>(problem);
    case DIT_MOE_BFLOAT16:
      return launch_best<__nv_bfloat16, kEpilogue, kTransposed, Options...>(problem);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dit_moe::sm90
