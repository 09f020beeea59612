// The grouped product with the weights as they lie, its contraction over their rows; see launch.h.
#include "launch.cuh"

extern "C" cudaError_t dit_moe_grouped_gemm_dx(const void* grad, const void* w, const int32_t* expert_offsets, void* dx,
                                               int64_t num_rows, int64_t depth, int64_t width, int64_t num_experts,
                                               DitMoeDtype dtype, cudaStream_t stream) {
  using namespace dit_moe::sm90;
  const Problem problem{grad, w, expert_offsets, dx, num_rows, depth, width, num_experts, stream};
  return launch<true>(problem, dtype);
}
