// The routed layer without gradients in one call, or all but the combine: route and dispatch, both products; see
// launch.h.
#include <algorithm>
#include <limits>

#include "../routing.cuh"
#include "problem.h"
#include "tile_choice.h"

namespace dit_moe::sm90 {
namespace {

constexpr int64_t kTileRows = 128;  // of the plan's tile schedule, which these products do not read

// Hands out pieces of the workspace; without one it counts the bytes.
class Pieces {
 public:
  explicit Pieces(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t bytes) {
    constexpr int64_t alignment = 256;
    char* const piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (bytes + alignment - 1) / alignment * alignment;
    return reinterpret_cast<T*>(piece);
  }

  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

struct Workspace {
  void* routing;
  float* weights;    // (T, K)
  int32_t* ids;      // (T, K)
  DitMoePlan plan;   // without tokens_per_expert
  void* rows;        // (N, D): the tokens by expert, then their results
  void* activation;  // (N, F); these two last, so that nothing else moves if they are elsewhere
  int64_t bytes;
};

Workspace cut(void* base, int64_t num_tokens, int64_t depth, int64_t hidden, int64_t num_experts, int64_t top_k) {
  constexpr int64_t element = 2, number = 4;  // bytes of fp16 or bf16, of fp32 or int32
  const int64_t rows = num_tokens * top_k;
  const int64_t tiles = rows / kTileRows + 1 + std::min(num_experts, rows);  // no less than the plan's
  Pieces pieces(base);
  Workspace w{};
  w.routing = pieces.take<void>(DIT_MOE_ROUTING_WORKSPACE);
  w.weights = pieces.take<float>(rows * number);
  w.ids = pieces.take<int32_t>(rows * number);
  w.plan.expert_offsets = pieces.take<int32_t>((num_experts + 1) * number);
  w.plan.row_to_slot = pieces.take<int32_t>(rows * number);
  w.plan.slot_to_row = pieces.take<int32_t>(rows * number);
  w.plan.tile_expert = pieces.take<int32_t>(tiles * number);
  w.plan.tile_row = pieces.take<int32_t>(tiles * number);
  w.plan.tile_rows = kTileRows;
  w.rows = pieces.take<void>(rows * depth * element);
  w.activation = pieces.take<void>(rows * hidden * element);
  w.bytes = pieces.used();
  return w;
}

// What the sizes in bytes above need not to overflow; the launchers check the rest.
bool valid_sizes(int64_t num_tokens, int64_t depth, int64_t hidden, int64_t num_experts, int64_t top_k) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  for (const int64_t size : {num_tokens, depth, hidden, num_experts, top_k}) {
    if (size < 0 || size > limit) return false;
  }
  return num_tokens * top_k <= limit;
}

}  // namespace
}  // namespace dit_moe::sm90

extern "C" int64_t dit_moe_routed_ffn_workspace(int64_t num_tokens, int64_t depth, int64_t hidden, int64_t num_experts,
                                                int64_t top_k) {
  using namespace dit_moe::sm90;
  if (!valid_sizes(num_tokens, depth, hidden, num_experts, top_k)) return -1;
  return cut(nullptr, num_tokens, depth, hidden, num_experts, top_k).bytes;
}

extern "C" cudaError_t dit_moe_routed_ffn_products(const void* x, const void* gate, const void* w13, const void* w2,
                                                   float* probs, int32_t* tokens_per_expert, void* rows, float* weights,
                                                   int32_t* slot_to_row, void* activation, void* workspace,
                                                   int64_t num_tokens, int64_t depth, int64_t hidden,
                                                   int64_t num_experts, int64_t top_k, DitMoeDtype dtype,
                                                   DitMoeDtype gate_dtype, cudaStream_t stream) {
  using namespace dit_moe::sm90;
  if (!valid_sizes(num_tokens, depth, hidden, num_experts, top_k)) return cudaErrorInvalidValue;
  Workspace w = cut(workspace, num_tokens, 0, 0, num_experts, top_k);
  w.plan.tokens_per_expert = tokens_per_expert;
  w.plan.slot_to_row = slot_to_row;
  const int64_t num_rows = num_tokens * top_k;
  const int32_t* const offsets = w.plan.expert_offsets;
  const bool overlaps = very_few_rows(num_rows, num_experts);
  cudaError_t error = dit_moe::route(x, gate, weights, w.ids, probs, nullptr, w.plan, rows, w.routing, num_tokens,
                                     depth, num_experts, top_k, 0.0, dtype, gate_dtype, overlaps, stream);
  if (error != cudaSuccess) return error;
  const Start start = overlaps ? Start::kWithWeights : Start::kAfterPrevious;
  const Problem up{rows, w13, offsets, activation, num_rows, depth, hidden, num_experts, stream, start};
  error = grouped_swiglu(up, dtype);
  if (error != cudaSuccess) return error;
  const Problem down{activation, w2, offsets, rows, num_rows, hidden, depth, num_experts, stream, Start::kWithOffsets};
  return grouped_gemm(down, dtype);
}

extern "C" cudaError_t dit_moe_routed_ffn(const void* x, const void* gate, const void* w13, const void* w2,
                                          const void* addend, void* out, float* probs, int32_t* tokens_per_expert,
                                          void* workspace, int64_t num_tokens, int64_t depth, int64_t hidden,
                                          int64_t num_experts, int64_t top_k, DitMoeDtype dtype, DitMoeDtype gate_dtype,
                                          cudaStream_t stream) {
  using namespace dit_moe::sm90;
  if (!valid_sizes(num_tokens, depth, hidden, num_experts, top_k)) return cudaErrorInvalidValue;
  const Workspace w = cut(workspace, num_tokens, depth, hidden, num_experts, top_k);
  const cudaError_t error = dit_moe_routed_ffn_products(x, gate, w13, w2, probs, tokens_per_expert, w.rows, w.weights,
                                                        w.plan.slot_to_row, w.activation, workspace, num_tokens, depth,
                                                        hidden, num_experts, top_k, dtype, gate_dtype, stream);
  if (error != cudaSuccess) return error;
  return dit_moe_unpermute(w.rows, w.weights, addend, w.plan.slot_to_row, out, num_tokens, depth, top_k, dtype, stream);
}
