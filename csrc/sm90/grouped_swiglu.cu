// The grouped product of gate and up projections with SwiGLU; see launch.h.
#include "swiglu_launch.cuh"

namespace dit_moe::sm90 {

cudaError_t grouped_swiglu(const Problem& problem, DitMoeDtype dtype) {
  if (few_rows(problem.rows, problem.num_experts)) return launch<Epilogue::kSwiGLU, kNarrowSwiGLU>({problem}, dtype);
  return launch<Epilogue::kSwiGLU, 256>({problem}, dtype);
}

}  // namespace dit_moe::sm90

extern "C" cudaError_t dit_moe_grouped_swiglu(const void* x, const void* w13, const int32_t* expert_offsets, void* out,
                                              void* h, int64_t num_rows, int64_t depth, int64_t width,
                                              int64_t num_experts, DitMoeDtype dtype, cudaStream_t stream) {
  using namespace dit_moe::sm90;
  const Problem product{x, w13, expert_offsets, out, num_rows, depth, width, num_experts, stream};
  if (h == nullptr) return grouped_swiglu(product, dtype);
  return launch<Epilogue::kSwiGLUKeep, 256>({product, h}, dtype);
}
