// Host side: what a grouped product is asked for.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "launch.h"

namespace dit_moe::sm90 {

// When a kernel may start. Early, it fetches what nobody may be writing any more, and waits before it touches x and
// out. There must be rows in use: a kernel without any would not wait, and what comes behind it would find those in
// front running.
enum class Start {
  kAfterPrevious,
  kWithOffsets,  // while a grouped product in front of it is running: weights and offsets are there
  kWithWeights,  // while the routing in front of it is running: the offsets are still to come
};

struct Problem {
  const void* x;           // (rows, depth)
  const void* w;           // (num_experts, columns, depth), or (num_experts, depth, columns) if transposed
  const int32_t* offsets;  // (num_experts + 1,), or null where there is one expert
  void* out;               // (rows, width)
  int64_t rows, depth, width, num_experts;
  cudaStream_t stream;
  Start start = Start::kAfterPrevious;
};

// dit_moe_grouped_gemm, see launch.h.
cudaError_t grouped_gemm(const Problem& problem, DitMoeDtype dtype);

// dit_moe_grouped_swiglu without h, see launch.h. It can start with the weights where the rows are few.
cudaError_t grouped_swiglu(const Problem& problem, DitMoeDtype dtype);

}  // namespace dit_moe::sm90
