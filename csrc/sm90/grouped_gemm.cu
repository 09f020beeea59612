// The plain grouped product; see launch.h.
#include "launch.cuh"

extern "C" cudaError_t dit_moe_grouped_gemm(const void* x, const void* w, const int32_t* expert_offsets, void* out,
                                            int64_t num_rows, int64_t depth, int64_t width, int64_t num_experts,
                                            DitMoeDtype dtype, cudaStream_t stream) {
  using namespace dit_moe::sm90;
  const Problem problem{x, w, expert_offsets, out, num_rows, depth, width, num_experts, stream};
  return launch<false>(problem, dtype);
}
