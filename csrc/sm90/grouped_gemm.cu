// The plain grouped product; see launch.h.
#include "swiglu_launch.cuh"

namespace dit_moe::sm90 {
namespace {

cudaError_t launch_narrow(const Problem& problem, DitMoeDtype dtype) {
  if (!valid(problem) || (dtype != DIT_MOE_FLOAT16 && dtype != DIT_MOE_BFLOAT16)) return cudaErrorInvalidValue;
  if (problem.rows == 0) return cudaSuccess;
  int multiprocessors;
  const cudaError_t error = count_multiprocessors(&multiprocessors);
  if (error != cudaSuccess) return error;
  switch (narrow_columns(problem.rows, problem.width, problem.num_experts, multiprocessors)) {
    case 64:
      return launch<Epilogue::kStore, 64>({problem}, dtype);
    case 96:
      return launch<Epilogue::kStore, 96>({problem}, dtype);
    default:
      return launch<Epilogue::kStore, kWidestNarrow>({problem}, dtype);
  }
}

}  // namespace

cudaError_t grouped_gemm(const Problem& problem, DitMoeDtype dtype) {
  return few_rows(problem.rows, problem.num_experts) ? launch_narrow(problem, dtype) : launch<false>(problem, dtype);
}

}  // namespace dit_moe::sm90

extern "C" cudaError_t dit_moe_grouped_gemm(const void* x, const void* w, const int32_t* expert_offsets, void* out,
                                            int64_t num_rows, int64_t depth, int64_t width, int64_t num_experts,
                                            DitMoeDtype dtype, cudaStream_t stream) {
  return dit_moe::sm90::grouped_gemm({x, w, expert_offsets, out, num_rows, depth, width, num_experts, stream}, dtype);
}
