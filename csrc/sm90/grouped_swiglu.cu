// The grouped product of gate and up projections with SwiGLU; see launch.h.
#include "launch.cuh"

extern "C" cudaError_t dit_moe_grouped_swiglu(const void* x, const void* w13, const int32_t* expert_offsets, void* out,
                                              void* h, int64_t num_rows, int64_t depth, int64_t width,
                                              int64_t num_experts, DitMoeDtype dtype, cudaStream_t stream) {
  using namespace dit_moe::sm90;
  const Problem problem{x, w13, expert_offsets, out, h, num_rows, depth, width, num_experts, stream};
  if (h != nullptr) {
    return launch_best<Epilogue::kSwiGLUKeep, false, Option<256, 2>, Option<256, 1>>(problem, dtype);
  }
  return launch_best<Epilogue::kSwiGLU, false, Option<256, 2>, Option<256, 1>>(problem, dtype);
}
