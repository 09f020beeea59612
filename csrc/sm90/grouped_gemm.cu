// The plain grouped product; see launch.h.
#include "swiglu_launch.cuh"

namespace dit_moe::sm90 {
namespace {

template <typename Element>
cudaError_t launch_narrow(const Problem& problem) {
  return with_multiprocessors(problem, problem.rows, [&](int multiprocessors) {
    switch (narrow_columns(problem.rows, problem.width, problem.num_experts, multiprocessors)) {
      case 64:
        return launch_configuration<SwiGLUConfig<Element, Epilogue::kStore, 64, 1>>({problem}, multiprocessors);
      case 96:
        return launch_configuration<SwiGLUConfig<Element, Epilogue::kStore, 96, 1>>({problem}, multiprocessors);
      default:
        return launch_configuration<SwiGLUConfig<Element, Epilogue::kStore, kWidestNarrow, 1>>({problem},
                                                                                               multiprocessors);
    }
  });
}

}  // namespace

cudaError_t grouped_gemm(const Problem& problem, DitMoeDtype dtype) {
  if (!few_rows(problem.rows, problem.num_experts)) return launch<false>(problem, dtype);
  return with_element(dtype, [&](auto element) { return launch_narrow<decltype(element)>(problem); });
}

}  // namespace dit_moe::sm90

extern "C" cudaError_t dit_moe_grouped_gemm(const void* x, const void* w, const int32_t* expert_offsets, void* out,
                                            int64_t num_rows, int64_t depth, int64_t width, int64_t num_experts,
                                            DitMoeDtype dtype, cudaStream_t stream) {
  return dit_moe::sm90::grouped_gemm({x, w, expert_offsets, out, num_rows, depth, width, num_experts, stream}, dtype);
}
