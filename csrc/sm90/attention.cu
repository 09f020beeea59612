// Launch of the attention; see launch.h.
#include <algorithm>
#include <limits>

#include "attention.cuh"
#include "launch.cuh"

namespace dit_moe::sm90 {
namespace {

struct AttentionProblem {
  const void* qkv;
  AttentionArguments arguments;  // without passes
  cudaStream_t stream;
};

// Boxes of 128 tokens of one of 3 * heads matrices, each as wide as a head.
template <class C>
cudaError_t make_head_map(CUtensorMap* map, const AttentionProblem& problem, int box_columns) {
  constexpr bool is_bf16 = std::is_same_v<typename C::Element, __nv_bfloat16>;
  const cuuint64_t width = C::kWidth, heads = 3 * static_cast<cuuint64_t>(problem.arguments.heads);
  const cuuint64_t rows = static_cast<cuuint64_t>(problem.arguments.images) * problem.arguments.tokens;
  return encode_map<3>(map, problem.qkv, is_bf16, {width, rows, heads}, {heads * width * 2, width * 2}, kSlotRows,
                       box_columns);
}

template <class C>
cudaError_t launch_attention(const AttentionProblem& problem) {
  const auto kernel = attention_kernel<C>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kDynamicBytes);
  if (error != cudaSuccess) return error;
  CUtensorMap map_main{}, map_rest{}, map_values{};
  error = make_head_map<C>(&map_main, problem, 64);
  if (error == cudaSuccess && C::kRest > 0) error = make_head_map<C>(&map_rest, problem, C::kRest);
  if (error == cudaSuccess) error = make_head_map<C>(&map_values, problem, 32);
  if (error != cudaSuccess) return error;
  int multiprocessors;
  error = count_multiprocessors(&multiprocessors);
  if (error != cudaSuccess) return error;
  AttentionArguments arguments = problem.arguments;
  const int64_t heads = int64_t{arguments.images} * arguments.heads, query_blocks = arguments.tokens / kSlotRows;
  // Keys and values of two slots each stay where there is a head for every multiprocessor.
  arguments.passes = query_blocks == 2 && heads >= multiprocessors ? 2 : 1;
  const int64_t items = heads * query_blocks / arguments.passes;
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(items, multiprocessors));
  kernel<<<blocks, kAttentionThreads, C::kDynamicBytes, problem.stream>>>(map_main, map_rest, map_values, arguments);
  return cudaGetLastError();
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
  const AttentionArguments arguments{
      {q_weight, q_bias, k_weight, k_bias}, out, static_cast<int>(num_images), static_cast<int>(num_tokens),
      static_cast<int>(num_heads),          0,   static_cast<float>(eps),      fp32};
  const AttentionProblem problem{qkv, arguments, stream};
  switch (dtype) {
    case DIT_MOE_FLOAT16:
      return launch_attention<__half>(problem, width);
    case DIT_MOE_BFLOAT16:
      return launch_attention<__nv_bfloat16>(problem, width);
  }
  return cudaErrorInvalidValue;
}
