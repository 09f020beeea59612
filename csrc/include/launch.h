// The C interface of the CUDA kernels: raw device pointers, sizes, a dtype, the stream last.
//
// Nothing here knows Python or PyTorch. The caller allocates every buffer on the stream's device, makes that device
// current, and keeps the buffers alive until the stream has run the work. Matrices are row-major and contiguous. A
// launcher only enqueues: it does not allocate, synchronise or use atomics on floats, so its work can be captured in a
// CUDA graph and gives the same bits on every run. It returns cudaErrorInvalidValue for sizes or a dtype out of range
// and otherwise the launch's own error; nothing is launched when there is no output.
//
// Names: T tokens, K = top_k choices a token, N = T * K rows, D = width. slot = token * K + choice; a row is a slot's
// place after sorting by expert. N, K and D fit in 31 bits; products of them are computed in 64.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// An integer, not an enum type, so that a value out of range is defined and can be refused.
typedef int32_t DitMoeDtype;
enum { DIT_MOE_FLOAT32 = 0, DIT_MOE_FLOAT16 = 1, DIT_MOE_BFLOAT16 = 2 };

// Dispatch: out[slot_to_row[slot]] = x[slot / top_k] for every slot whose row is not -1, and zeros in the rows whose
// row_to_slot is -1. The two are inverse to each other. beside: it may run while the kernel in front of it on the
// stream still does, a grouped product, and neither may touch what the other writes; what comes behind waits for both.
//   x (T, D) dtype, row_to_slot (N,) int32, slot_to_row (N,) int32 -> out (N, D) dtype
cudaError_t dit_moe_permute(const void* x, const int32_t* row_to_slot, const int32_t* slot_to_row, void* out,
                            int64_t num_tokens, int64_t width, int64_t top_k, int32_t beside, DitMoeDtype dtype,
                            cudaStream_t stream);

// Combine: out[t] = sum over k of weights[t, k] * y[slot_to_row[t * top_k + k]], in fp32, in the order of k, +
// addend[t] before the one rounding to dtype. A slot whose row is -1 adds nothing, whatever its weight. weights may be
// NULL, which means ones, and addend, which means zeros.
//   y (N, D) dtype, weights (T, K) fp32, addend (T, D) dtype, slot_to_row (N,) int32 -> out (T, D) dtype
cudaError_t dit_moe_unpermute(const void* y, const float* weights, const void* addend, const int32_t* slot_to_row,
                              void* out, int64_t num_tokens, int64_t width, int64_t top_k, DitMoeDtype dtype,
                              cudaStream_t stream);

// Gradients of the weighted combine: dy[row] = weights[slot] * dout[slot / top_k] and
// dweights[slot] = dot(dout[slot / top_k], y[row]) in fp32, where slot = row_to_slot[row].
// A row whose slot is -1 gets dy = 0. Slots that own no row are not written: the caller sets dweights to zero before.
//   dout (T, D) dtype, y (N, D) dtype, weights (T, K) fp32, row_to_slot (N,) int32 -> dy (N, D) dtype, dweights (T, K)
//   fp32
cudaError_t dit_moe_unpermute_backward(const void* dout, const void* y, const float* weights,
                                       const int32_t* row_to_slot, void* dy, float* dweights, int64_t num_rows,
                                       int64_t width, int64_t top_k, DitMoeDtype dtype, cudaStream_t stream);

// out = silu(gate) * up in fp32, from h = [gate | up].
//   h (N, 2F) dtype -> out (N, F) dtype; width is F
cudaError_t dit_moe_swiglu(const void* h, void* out, int64_t num_rows, int64_t width, DitMoeDtype dtype,
                           cudaStream_t stream);

// The gradient for h of the above.
//   dout (N, F) dtype, h (N, 2F) dtype -> dh (N, 2F) dtype
cudaError_t dit_moe_swiglu_backward(const void* dout, const void* h, void* dh, int64_t num_rows, int64_t width,
                                    DitMoeDtype dtype, cudaStream_t stream);

// ---- norms: between the sub-layers of an adaLN block
//
// B images of N tokens; B * N fits in 31 bits. The images' vectors (B, D) are contiguous rows, any number of elements
// apart: that is their stride. dtype is that of the residual stream; branch_dtype, of all else, is the same, or of 16
// bits where dtype is fp32. Statistics are in fp32.

// out = (total - mean) / sqrt(variance + eps) * (1 + scale) + shift, mean and variance being the row's, where
// total = x + gate * y, rounded to dtype. gate, y and total may be NULL, all three: then x takes the place of total.
// With slot_to_row, y are rows that are combined on the way, as dit_moe_unpermute combines them, with its rounding;
// otherwise weights and addend are not looked at.
//   x (B, N, D) dtype, gate (B, D) branch_dtype, y (B, N, D) or (B * N * K, D) branch_dtype, weights (B * N, K) fp32,
//   addend (B, N, D) branch_dtype, slot_to_row (B * N * K,), shift and scale (B, D) branch_dtype
//   -> total (B, N, D) dtype, out (B, N, D) branch_dtype
cudaError_t dit_moe_norm_modulate(const void* x, const void* gate, const void* y, const float* weights,
                                  const void* addend, const int32_t* slot_to_row, const void* shift, const void* scale,
                                  void* total, void* out, int64_t num_images, int64_t num_tokens, int64_t width,
                                  int64_t top_k, int64_t gate_stride, int64_t shift_stride, int64_t scale_stride,
                                  double eps, DitMoeDtype dtype, DitMoeDtype branch_dtype, cudaStream_t stream);

// Gradients of the above, x being the total where there was one: with dn = dout * (1 + scale) behind the normalisation,
//   dx = (dn - mean of dn - n * mean of dn n) / sqrt(variance + eps) + dsum, n being the normalised row, and dy = gate
//   dx
// and, summed in fp32 over an image's tokens, dshift = sum dout, dscale = sum dout n, dgate = sum dx y.
// dsum, gate, y, dy and dgate may be NULL, all five. statistics and partials are workspace, at multiples of 16 bytes.
//   dout (B, N, D) branch_dtype, dsum and x (B, N, D) dtype, gate (B, D) branch_dtype, y (B, N, D) branch_dtype, scale
//   (B, D) branch_dtype, statistics (B, N, 4) fp32, partials (B, P, 3, D) fp32, or (B, P, 2, D) without y
//   -> dx (B, N, D) dtype, dy (B, N, D) branch_dtype, dshift, dscale and dgate (B, D) contiguous branch_dtype;
//   num_parts is P, in so many parts an image's tokens are summed: 1 to N, or 0 if N is 0
cudaError_t dit_moe_norm_modulate_backward(const void* dout, const void* dsum, const void* x, const void* gate,
                                           const void* y, const void* scale, void* dx, void* dy, void* dshift,
                                           void* dscale, void* dgate, float* statistics, float* partials,
                                           int64_t num_images, int64_t num_tokens, int64_t width, int64_t gate_stride,
                                           int64_t scale_stride, int64_t num_parts, double eps, DitMoeDtype dtype,
                                           DitMoeDtype branch_dtype, cudaStream_t stream);

// out = (x - mean) / sqrt(variance + eps) * weight + bias for every head's row of q, then of k, in one launch. Rows are
// multiples of 8 elements, at most 128; strides are elements between tokens and between heads. Strides and addresses
// are multiples of 16 bytes. weight_dtype is dtype or fp32.
//   q and k (T, H, W) dtype, weights and biases (W,) weight_dtype -> q_out and k_out (T, H, W) contiguous dtype
cudaError_t dit_moe_qk_norm(const void* q, const void* k, const void* q_weight, const void* q_bias,
                            const void* k_weight, const void* k_bias, void* q_out, void* k_out, int64_t num_tokens,
                            int64_t heads, int64_t width, int64_t q_stride, int64_t q_head_stride, int64_t k_stride,
                            int64_t k_head_stride, double eps, DitMoeDtype dtype, DitMoeDtype weight_dtype,
                            cudaStream_t stream);

// Gradients of the above. The sums of partials over P are the gradients of q's weight and bias, then of k's; P is the
// caller's choice, and without tokens partials are zeros.
//   dq_out and dk_out (T, H, W) contiguous dtype, q, k and weights as above
//   -> dq and dk (T, H, W) contiguous dtype, partials (P, 2, 2, W) fp32; num_partials is P
cudaError_t dit_moe_qk_norm_backward(const void* dq_out, const void* dk_out, const void* q, const void* k,
                                     const void* q_weight, const void* k_weight, void* dq, void* dk, float* partials,
                                     int64_t num_tokens, int64_t heads, int64_t width, int64_t q_stride,
                                     int64_t q_head_stride, int64_t k_stride, int64_t k_head_stride,
                                     int64_t num_partials, double eps, DitMoeDtype dtype, DitMoeDtype weight_dtype,
                                     cudaStream_t stream);

// ---- routing: which experts a token goes to, and where its copies go
//
// E is at most 64 for the router and the softmax, 512 for the plan. x and gate are matrices whose rows are whole
// multiples of 16 bytes, at addresses that are multiples of 16; gate_dtype is fp32 or dtype.

// logits = x gate^T, exact products summed in fp32. An infinite element makes the logit NaN.
//   x (T, D) dtype, gate (E, D) gate_dtype -> logits (T, E) fp32; depth is D
cudaError_t dit_moe_router_logits(const void* x, const void* gate, float* logits, int64_t num_tokens, int64_t depth,
                                  int64_t num_experts, DitMoeDtype dtype, DitMoeDtype gate_dtype, cudaStream_t stream);

// Gradients of the above for x and for the gate, in fp32: dx = each token's rows + dlogits gate, dgate = dlogits^T x.
// The rows and slot_to_row, dx or dgate may be NULL; parts is only needed for the latter. D is at most 2^26, and K is
// at most E. beside: as for dit_moe_permute.
//   dlogits (T, E) fp32, x (T, D), rows (N, D) dtype, slot_to_row (T * K,) int32, -1 for none, gate (E, D) gate_dtype
//   -> dx (T, D) dtype, dgate (E, D) gate_dtype; parts (DIT_MOE_ROUTER_PARTS, E, D) fp32 is workspace
enum { DIT_MOE_ROUTER_PARTS = 256 };
cudaError_t dit_moe_router_gradients(const float* dlogits, const void* x, const void* gate, const void* rows,
                                     const int32_t* slot_to_row, void* dx, void* dgate, float* parts,
                                     int64_t num_tokens, int64_t depth, int64_t num_experts, int64_t top_k,
                                     int32_t beside, DitMoeDtype dtype, DitMoeDtype gate_dtype, cudaStream_t stream);

// probs = softmax(logits) over the experts, then each token's top_k largest in descending order, ties to the lower id.
// A NaN or +inf in a row makes its probs and weights NaN; its ids are distinct and valid all the same.
//   logits (T, E) fp32 -> weights (T, K) fp32, ids (T, K) int32, probs (T, E) fp32
cudaError_t dit_moe_topk_softmax(const float* logits, float* weights, int32_t* ids, float* probs, int64_t num_tokens,
                                 int64_t num_experts, int64_t top_k, cudaStream_t stream);

// dlogits = probs * (g - sum over e of probs * g), with g = dprobs plus dweights at their experts; both may be NULL.
//   dweights (T, K) fp32, dprobs (T, E) fp32, ids (T, K) int32, probs (T, E) fp32 -> dlogits (T, E) fp32
cudaError_t dit_moe_topk_softmax_backward(const float* dweights, const float* dprobs, const int32_t* ids,
                                          const float* probs, float* dlogits, int64_t num_tokens, int64_t num_experts,
                                          int64_t top_k, cudaStream_t stream);

// The result of a stable sort of slots by expert; ids out of range are not routed. tile_expert and tile_row cut each
// expert's rows into tiles of tile_rows; they have ceil(N / tile_rows) + min(E, N) - (N > 0) entries.
typedef struct {
  int32_t* tokens_per_expert;  // (E,)
  int32_t* expert_offsets;     // (E + 1,)
  int32_t* row_to_slot;        // (N,), -1 for an unused row
  int32_t* slot_to_row;        // (N,), -1 for an unrouted slot
  int32_t* tile_expert;        // -1 for an unused entry
  int32_t* tile_row;           // the tile's first row, 0 for an unused entry
  int64_t tile_rows;
} DitMoePlan;

enum { DIT_MOE_ROUTING_WORKSPACE = 2 * 32768 * 4 };  // bytes

//   ids (N,) int32 or int64 by id_bytes, workspace DIT_MOE_ROUTING_WORKSPACE bytes -> plan
cudaError_t dit_moe_routing_plan(const void* ids, int64_t id_bytes, const DitMoePlan* plan, void* workspace,
                                 int64_t num_slots, int64_t num_experts, cudaStream_t stream);

// dit_moe_router_logits, dit_moe_topk_softmax and dit_moe_routing_plan in two launches. balance may be NULL; otherwise
// it is balance_scale * sum over e of tokens_per_expert[e] * (sum over t of probs[t, e]), 0 for a scale of 0. rows may
// be NULL; otherwise they are the tokens as dit_moe_permute puts them, where there are few tokens by the second launch.
//   x (T, D) dtype, gate (E, D) gate_dtype, workspace as above
//   -> weights (T, K) fp32, ids (T, K) int32, probs (T, E) fp32, balance () fp32, plan, rows (T * K, D) dtype
cudaError_t dit_moe_route(const void* x, const void* gate, float* weights, int32_t* ids, float* probs, float* balance,
                          const DitMoePlan* plan, void* rows, void* workspace, int64_t num_tokens, int64_t depth,
                          int64_t num_experts, int64_t top_k, double balance_scale, DitMoeDtype dtype,
                          DitMoeDtype gate_dtype, cudaStream_t stream);

// ---- grouped products, and attention: for Hopper GPUs (sm_90a) only, in fp16 and bf16
//
// E experts' rows lie behind one another: expert e owns the rows expert_offsets[e] to expert_offsets[e + 1] - 1. Rows
// from expert_offsets[E] on are neither used nor written. Where E is 1, expert_offsets may be NULL, but for
// dit_moe_grouped_gemm_dw: the expert owns all rows then. Widths are multiples of 8 and above 0, and pointers of 16
// bytes; otherwise, too, the answer is cudaErrorInvalidValue. Sums are in fp32.

// out[r] = w[e] x[r].
//   x (N, I) dtype, w (E, O, I) dtype, expert_offsets (E + 1,) int32 -> out (N, O) dtype; depth is I, width O
cudaError_t dit_moe_grouped_gemm(const void* x, const void* w, const int32_t* expert_offsets, void* out,
                                 int64_t num_rows, int64_t depth, int64_t width, int64_t num_experts, DitMoeDtype dtype,
                                 cudaStream_t stream);

// dx[r] = grad[r] w[e], the gradient of dit_moe_grouped_gemm for its rows.
//   grad (N, O) dtype, w (E, O, I) dtype, expert_offsets (E + 1,) int32 -> dx (N, I) dtype; depth is O, width I
cudaError_t dit_moe_grouped_gemm_dx(const void* grad, const void* w, const int32_t* expert_offsets, void* dx,
                                    int64_t num_rows, int64_t depth, int64_t width, int64_t num_experts,
                                    DitMoeDtype dtype, cudaStream_t stream);

// h[r] = w13[e] x[r], rounded to dtype, and out[r] = silu(h[r][:F]) * h[r][F:]. h may be NULL, which means not stored.
//   x (N, D) dtype, w13 (E, 2F, D) dtype, expert_offsets (E + 1,) int32 -> out (N, F) dtype, h (N, 2F) dtype;
//   depth is D, width F
cudaError_t dit_moe_grouped_swiglu(const void* x, const void* w13, const int32_t* expert_offsets, void* out, void* h,
                                   int64_t num_rows, int64_t depth, int64_t width, int64_t num_experts,
                                   DitMoeDtype dtype, cudaStream_t stream);

// Backward of dit_moe_grouped_gemm over the outputs of dit_moe_grouped_swiglu, where row r's output has the factor
// w = topk_weights[row_to_slot[r]]. With g = grad[r] w2[e], rounded to dtype, and a = silu(h[r][:F]) * h[r][F:]:
// dh[r] is the gradient of a for h[r] where that for a is w g; weighted_a[r] = w a; dots[i][r] = dot(g, a) over the
// columns from i * DIT_MOE_DSWIGLU_COLUMNS on, whose sum over i is the gradient for w.
//   grad (N, D) dtype, w2 (E, D, F) dtype, expert_offsets (E + 1,) int32, h (N, 2F) dtype, topk_weights (T, K) fp32,
//   row_to_slot (N,) int32 -> dh (N, 2F) dtype, weighted_a (N, F) dtype,
//   dots (ceil(F / DIT_MOE_DSWIGLU_COLUMNS), N) fp32; depth is D, width F
enum { DIT_MOE_DSWIGLU_COLUMNS = 192 };
cudaError_t dit_moe_grouped_dswiglu(const void* grad, const void* w2, const int32_t* expert_offsets, const void* h,
                                    const float* topk_weights, const int32_t* row_to_slot, void* dh, void* weighted_a,
                                    float* dots, int64_t num_rows, int64_t depth, int64_t width, int64_t num_experts,
                                    DitMoeDtype dtype, cudaStream_t stream);

// dw[e] = sum over the rows r of expert e of grad[r]^T x[r], the gradient of dit_moe_grouped_gemm for its weights;
// zeros for an expert without rows. If accumulate is not 0, dw[e] += that, added in fp32. dw_dtype is dtype or fp32.
//   grad (N, O) dtype, x (N, I) dtype, expert_offsets (E + 1,) int32 -> dw (E, O, I) dw_dtype; height is O, width I,
//   N at most 2^30
cudaError_t dit_moe_grouped_gemm_dw(const void* grad, const void* x, const int32_t* expert_offsets, void* dw,
                                    int64_t num_rows, int64_t height, int64_t width, int64_t num_experts,
                                    int32_t accumulate, DitMoeDtype dw_dtype, DitMoeDtype dtype, cudaStream_t stream);

// Attention of every image's tokens among themselves, scaled by width^-0.5, of queries and keys that are LayerNorms
// with these weights and biases of the packed ones; rounded to dtype after the norm (queries with that scale and, for a
// softmax to the base of 2, log2 e) and as shares of the values. width, of a head, is 64, 72 or 88, num_tokens a
// multiple of 128. qkv and out lie at multiples of 16 bytes. weight_dtype is fp32 or dtype.
//   qkv (B, N, 3, H, width) dtype, q_weight, q_bias, k_weight, k_bias (width,) weight_dtype -> out (B, N, H, width)
//   dtype
cudaError_t dit_moe_qk_norm_attention(const void* qkv, const void* q_weight, const void* q_bias, const void* k_weight,
                                      const void* k_bias, void* out, int64_t num_images, int64_t num_tokens,
                                      int64_t num_heads, int64_t width, double eps, DitMoeDtype dtype,
                                      DitMoeDtype weight_dtype, cudaStream_t stream);

// The routed layer where no gradient follows: dit_moe_route with rows, dit_moe_grouped_swiglu, dit_moe_grouped_gemm and
// dit_moe_unpermute, under the conditions of each. addend may be NULL.
//   x (T, D) dtype, gate (E, D) gate_dtype, w13 (E, 2F, D) dtype, w2 (E, D, F) dtype, addend (T, D) dtype, workspace
//   as many bytes as dit_moe_routed_ffn_workspace says (-1 for sizes out of range), at a multiple of 256
//   -> out (T, D) dtype, probs (T, E) fp32, tokens_per_expert (E,) int32; depth is D, hidden F
int64_t dit_moe_routed_ffn_workspace(int64_t num_tokens, int64_t depth, int64_t hidden, int64_t num_experts,
                                     int64_t top_k);
cudaError_t dit_moe_routed_ffn(const void* x, const void* gate, const void* w13, const void* w2, const void* addend,
                               void* out, float* probs, int32_t* tokens_per_expert, void* workspace, int64_t num_tokens,
                               int64_t depth, int64_t hidden, int64_t num_experts, int64_t top_k, DitMoeDtype dtype,
                               DitMoeDtype gate_dtype, cudaStream_t stream);

// The same up to the second product, so that activation, the largest buffer, may go before a result comes, or so that
// what comes next can combine. depth and hidden may be 0 where the size of this workspace is asked for.
//   x, gate, w13, w2, workspace as above -> probs, tokens_per_expert as above, activation (N, F) dtype, and what
//   dit_moe_unpermute takes: rows (N, D) dtype, weights (T, K) fp32, slot_to_row (N,) int32
cudaError_t dit_moe_routed_ffn_products(const void* x, const void* gate, const void* w13, const void* w2, float* probs,
                                        int32_t* tokens_per_expert, void* rows, float* weights, int32_t* slot_to_row,
                                        void* activation, void* workspace, int64_t num_tokens, int64_t depth,
                                        int64_t hidden, int64_t num_experts, int64_t top_k, DitMoeDtype dtype,
                                        DitMoeDtype gate_dtype, cudaStream_t stream);

#ifdef __cplusplus
}  // extern "C"
#endif
