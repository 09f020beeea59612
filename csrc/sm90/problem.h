// Host side: what a grouped product is asked for.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "launch.h"

namespace dit_moe::sm90 {

struct Problem {
  const void* x;           // (rows, depth)
  const void* w;           // (num_experts, columns, depth), or (num_experts, depth, columns) if transposed
  const int32_t* offsets;  // (num_experts + 1,), or null where there is one expert
  void* out;               // (rows, width)
  int64_t rows, depth, width, num_experts;
  cudaStream_t stream;
  // Whether the kernel may start while the one in front of it, a grouped product too, is still running. It then fetches
  // weights and offsets at once, which nobody may be writing any more, and waits before it touches x and out. There
  // must be rows in use: a kernel without any would not wait, and what comes behind it would find the one in front
  // running.
  bool starts_early = false;
};

// dit_moe_grouped_gemm, see launch.h.
cudaError_t grouped_gemm(const Problem& problem, DitMoeDtype dtype);

}  // namespace dit_moe::sm90
