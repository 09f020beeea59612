// Weight gradients of the grouped product; see launch.h.
#include "launch.cuh"
#include "weight_gradient.cuh"

namespace dit_moe::sm90 {
namespace {

struct WeightProblem {
  const void* grad;        // (rows, height)
  const void* x;           // (rows, width)
  const int32_t* offsets;  // (num_experts + 1,)
  void* dw;                // (num_experts, height, width)
  int64_t rows, height, width, num_experts;
  bool is_float, accumulate;
  cudaStream_t stream;
};

bool valid(const WeightProblem& problem) {
  for (const void* pointer : {problem.grad, problem.x, const_cast<const void*>(problem.dw)}) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  }
  return problem.rows >= 0 && problem.rows <= kRaggedRows && valid_width(problem.height) &&
         valid_width(problem.width) && problem.num_experts > 0 &&
         problem.num_experts <= std::numeric_limits<int32_t>::max() / kTileM;
}

template <class C>
cudaError_t launch_weights(const WeightProblem& problem, int multiprocessors) {
  constexpr bool is_bf16 = std::is_same_v<typename C::Element, __nv_bfloat16>;
  const int64_t height = C::kTurned ? problem.width : problem.height;  // of the product
  const int64_t width = C::kTurned ? problem.height : problem.width;
  const int64_t tiles = ceil_div(height, C::kRows * (C::kTall ? 2 : 1)) *
                        ceil_div(width, C::kTileN * (C::kTall ? 1 : 2)) * problem.num_experts;
  if (tiles > std::numeric_limits<int32_t>::max() - multiprocessors) return cudaErrorInvalidValue;
  CUtensorMap map_a{}, map_b{};
  cudaError_t error = make_ragged_map(&map_a, C::kTurned ? problem.x : problem.grad, is_bf16, height, C::kBoxRowsA);
  if (error != cudaSuccess) return error;
  error = make_ragged_map(&map_b, C::kTurned ? problem.grad : problem.x, is_bf16, width, C::kBoxRowsB);
  if (error != cudaSuccess) return error;
  const WeightArguments arguments{problem.offsets,
                                  problem.dw,
                                  static_cast<int>(problem.num_experts),
                                  static_cast<int>(height),
                                  static_cast<int>(width),
                                  problem.is_float,
                                  problem.accumulate};
  const int64_t clusters = std::min<int64_t>(tiles, multiprocessors / C::kCluster);
  return enqueue<WeightBlock<C>>(map_a, map_b, arguments, clusters, problem.stream);
}

template <int kColumns, bool kTall, bool kTurned>
struct WeightOption {
  static constexpr WeightShape kShape{kColumns, kTall, kTurned};
};

template <typename Element, typename... Options>
cudaError_t launch_fastest(const WeightProblem& problem) {
  int multiprocessors;
  cudaError_t error = count_multiprocessors(&multiprocessors);
  if (error != cudaSuccess) return error;
  constexpr WeightShape shapes[] = {Options::kShape...};
  const bool is_stored = !problem.is_float && !problem.accumulate;
  const WeightShape best = fastest(shapes, [&](WeightShape shape) {
    if (shape.turned && !is_stored) return std::numeric_limits<double>::infinity();
    return expected_weight_time(shape, problem.rows, problem.num_experts, problem.height, problem.width,
                                multiprocessors, is_stored);
  });
  const auto launch_if_best = [&](auto option) {
    constexpr WeightShape shape = decltype(option)::kShape;
    if (!(best == shape)) return false;
    error = launch_weights<WeightConfig<Element, shape.columns, shape.tall, shape.turned>>(problem, multiprocessors);
    return true;
  };
  (void)(launch_if_best(Options{}) || ...);
  return error;
}

template <typename Element>
cudaError_t launch_element(const WeightProblem& problem) {
  return launch_fastest<Element, WeightOption<256, true, false>, WeightOption<256, false, false>,
                        WeightOption<192, true, false>, WeightOption<192, false, false>, WeightOption<128, true, false>,
                        WeightOption<128, false, false>, WeightOption<256, false, true>>(problem);
}

}  // namespace
}  // namespace dit_moe::sm90

extern "C" cudaError_t dit_moe_grouped_gemm_dw(const void* grad, const void* x, const int32_t* expert_offsets, void* dw,
                                               int64_t num_rows, int64_t height, int64_t width, int64_t num_experts,
                                               int32_t accumulate, DitMoeDtype dw_dtype, DitMoeDtype dtype,
                                               cudaStream_t stream) {
  using namespace dit_moe::sm90;
  const bool is_float = dw_dtype == DIT_MOE_FLOAT32;
  const WeightProblem problem{grad,        x,        expert_offsets,  dw,    num_rows, height, width,
                              num_experts, is_float, accumulate != 0, stream};
  if (!valid(problem) || !(is_float || dw_dtype == dtype)) return cudaErrorInvalidValue;
  return with_element(dtype, [&](auto element) {
    if (num_rows > 0) return launch_element<decltype(element)>(problem);
    if (accumulate) return cudaSuccess;  // there may be no memory that a descriptor could name
    return cudaMemsetAsync(dw, 0, static_cast<size_t>(num_experts * height * width) * (is_float ? 4 : 2), stream);
  });
}
