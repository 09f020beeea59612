// The grouped product with the weights as they lie and the gradient of SwiGLU; see launch.h.
#include "swiglu_launch.cuh"

extern "C" cudaError_t dit_moe_grouped_dswiglu(const void* grad, const void* w2, const int32_t* expert_offsets,
                                               const void* h, const float* topk_weights, const int32_t* row_to_slot,
                                               void* dh, void* weighted_a, float* dots, int64_t num_rows, int64_t depth,
                                               int64_t width, int64_t num_experts, DitMoeDtype dtype,
                                               cudaStream_t stream) {
  using namespace dit_moe::sm90;
  const SwiGLUProblem problem{{grad, w2, expert_offsets, dh, num_rows, depth, width, num_experts, stream},
                              nullptr,
                              {h, topk_weights, row_to_slot, weighted_a, dots}};
  return launch<Epilogue::kDSwiGLU, DIT_MOE_DSWIGLU_COLUMNS>(problem, dtype);
}
