// Launch of the attention; see launch.h.
#include <algorithm>
#include <iterator>
#include <limits>

#include "attention.cuh"
#include "launch.cuh"

namespace dit_moe::sm90 {
namespace {

struct AttentionProblem {
  const void* qkv;
  int64_t images;
  AttentionArguments arguments;  // without what split() says
  cudaStream_t stream;
};

// Boxes of tokens of one of 3 * heads matrices, each as wide as a head.
template <class C>
cudaError_t make_head_map(CUtensorMap* map, const AttentionProblem& problem, int box_rows, int box_columns) {
  constexpr bool is_bf16 = std::is_same_v<typename C::Element, __nv_bfloat16>;
  const cuuint64_t width = C::kWidth, heads = 3 * static_cast<cuuint64_t>(problem.arguments.heads);
  const cuuint64_t rows = static_cast<cuuint64_t>(problem.images) * problem.arguments.tokens;
  return encode_map<3>(map, problem.qkv, is_bf16, {width, rows, heads}, {heads * width * 2, width * 2}, box_rows,
                       box_columns);
}

// Who takes which queries.
AttentionArguments split(const AttentionProblem& problem, int multiprocessors) {
  AttentionArguments arguments = problem.arguments;
  const int64_t heads = problem.images * arguments.heads;
  arguments.query_blocks = arguments.tokens / kSlotRows;
  // Keys and values of two slots each stay where there is a head for every multiprocessor.
  arguments.passes = arguments.query_blocks == 2 && heads >= multiprocessors ? 2 : 1;
  arguments.blocks = arguments.query_blocks > 2 && arguments.query_blocks % 2 == 0 ? 2 : 1;
  arguments.items = static_cast<int>(heads * (arguments.query_blocks / (arguments.passes * arguments.blocks)));
  return arguments;
}

template <class C>
cudaError_t launch_attention(const AttentionProblem& problem) {
  int multiprocessors;
  cudaError_t error = count_multiprocessors(&multiprocessors);
  if (error != cudaSuccess) return error;
  const AttentionArguments arguments = split(problem, multiprocessors);
  const int box_rows = kSlotRows / arguments.blocks;
  CUtensorMap map_main{}, map_rest{}, map_values{};
  error = make_head_map<C>(&map_main, problem, box_rows, 64);
  if (error == cudaSuccess && C::kRest > 0) error = make_head_map<C>(&map_rest, problem, box_rows, C::kRest);
  if (error == cudaSuccess) error = make_head_map<C>(&map_values, problem, box_rows, 32);
  if (error != cudaSuccess) return error;
  const int64_t clusters = std::min<int64_t>(arguments.items, multiprocessors / arguments.blocks);
  return launch_clusters(attention_kernel<C>, clusters, arguments.blocks, kAttentionThreads, C::kDynamicBytes,
                         /*starts_early=*/false, problem.stream, map_main, map_rest, map_values, arguments);
}

template <typename Element>
cudaError_t launch_attention(const AttentionProblem& problem, int64_t width) {
  switch (width) {
    case 64:
      return launch_attention<AttentionConfig<Element, 64>>(problem);
    case 72:
      return launch_attention<AttentionConfig<Element, 72>>(problem);
    case 88:
      return launch_attention<AttentionConfig<Element, 88>>(problem);
  }
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace dit_moe::sm90

extern "C" cudaError_t dit_moe_qk_norm_attention(const void* qkv, const void* q_weight, const void* q_bias,
                                                 const void* k_weight, const void* k_bias, void* out,
                                                 int64_t num_images, int64_t num_tokens, int64_t num_heads,
                                                 int64_t width, double eps, DitMoeDtype dtype, DitMoeDtype weight_dtype,
                                                 cudaStream_t stream) {
  using namespace dit_moe::sm90;
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  for (const int64_t size : {num_images, num_tokens, 3 * num_heads}) {
    if (size < 0 || size > limit) return cudaErrorInvalidValue;
  }
  if (num_tokens % kSlotRows != 0 || num_images * num_tokens > limit) return cudaErrorInvalidValue;
  const int64_t blocks = num_images * num_tokens / kSlotRows;
  if (blocks * num_heads > limit) return cudaErrorInvalidValue;
  for (const void* pointer : {qkv, static_cast<const void*>(out)}) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return cudaErrorInvalidValue;
  }
  const bool fp32 = weight_dtype == DIT_MOE_FLOAT32;
  if (!fp32 && weight_dtype != dtype) return cudaErrorInvalidValue;
  if (blocks * num_heads == 0) return cudaSuccess;
  AttentionArguments arguments{};
  const void* const weights[] = {q_weight, q_bias, k_weight, k_bias};
  std::copy(std::begin(weights), std::end(weights), arguments.weights);
  arguments.out = out;
  arguments.tokens = static_cast<int>(num_tokens);
  arguments.heads = static_cast<int>(num_heads);
  arguments.eps = static_cast<float>(eps);
  arguments.weights_fp32 = fp32;
  const AttentionProblem problem{qkv, num_images, arguments, stream};
  return with_element(dtype, [&](auto element) { return launch_attention<decltype(element)>(problem, width); });
}
