// The grouped product with the weights as they lie and the gradient of SwiGLU; see launch.h.
#include "launch.cuh"

extern "C" cudaError_t dit_moe_grouped_dswiglu(const void* grad, const void* w2, const int32_t* expert_offsets,
                                               const void* h, const float* topk_weights, const int32_t* row_to_slot,
                                               void* dh, void* weighted_a, float* dots, int64_t num_rows, int64_t depth,
                                               int64_t width, int64_t num_experts, DitMoeDtype dtype,
                                               cudaStream_t stream) {
  using namespace dit_moe::sm90;
  constexpr int columns = DIT_MOE_DSWIGLU_COLUMNS;
  const Problem problem{grad,
                        w2,
                        expert_offsets,
                        dh,
                        nullptr,
                        num_rows,
                        depth,
                        width,
                        num_experts,
                        stream,
                        {h, topk_weights, row_to_slot, weighted_a, dots}};
  return launch_best<Epilogue::kDSwiGLU, true, Option<columns, 2>, Option<columns, 1>>(problem, dtype);
}
