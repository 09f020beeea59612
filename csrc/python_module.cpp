// Binds launch.h to the Python module dit_moe_kernels._C. Tensors come as integers (Tensor.data_ptr()), and so does the
// stream, hence no PyTorch header is needed and one build serves every PyTorch release.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t stream_handle(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

void check(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": CUDA error " + std::to_string(error) + " (" + cudaGetErrorName(error) +
                           "): " + cudaGetErrorString(error));
}

void permute(Address x, Address row_to_slot, Address slot_to_row, Address out, int64_t num_tokens, int64_t width,
             int64_t top_k, int32_t beside, DitMoeDtype dtype, Address stream) {
  check("permute", dit_moe_permute(pointer(x), pointer<int32_t>(row_to_slot), pointer<int32_t>(slot_to_row),
                                   pointer(out), num_tokens, width, top_k, beside, dtype, stream_handle(stream)));
}

void unpermute(Address y, Address weights, Address addend, Address slot_to_row, Address out, int64_t num_tokens,
               int64_t width, int64_t top_k, DitMoeDtype dtype, Address stream) {
  check("unpermute",
        dit_moe_unpermute(pointer(y), pointer<float>(weights), pointer(addend), pointer<int32_t>(slot_to_row),
                          pointer(out), num_tokens, width, top_k, dtype, stream_handle(stream)));
}

void unpermute_backward(Address dout, Address y, Address weights, Address row_to_slot, Address dy, Address dweights,
                        int64_t num_rows, int64_t width, int64_t top_k, DitMoeDtype dtype, Address stream) {
  check("unpermute_backward",
        dit_moe_unpermute_backward(pointer(dout), pointer(y), pointer<float>(weights), pointer<int32_t>(row_to_slot),
                                   pointer(dy), pointer<float>(dweights), num_rows, width, top_k, dtype,
                                   stream_handle(stream)));
}

void swiglu(Address h, Address out, int64_t num_rows, int64_t width, DitMoeDtype dtype, Address stream) {
  check("swiglu", dit_moe_swiglu(pointer(h), pointer(out), num_rows, width, dtype, stream_handle(stream)));
}

void swiglu_backward(Address dout, Address h, Address dh, int64_t num_rows, int64_t width, DitMoeDtype dtype,
                     Address stream) {
  check("swiglu_backward",
        dit_moe_swiglu_backward(pointer(dout), pointer(h), pointer(dh), num_rows, width, dtype, stream_handle(stream)));
}

void norm_modulate(Address x, Address gate, Address y, Address weights, Address addend, Address slot_to_row,
                   Address shift, Address scale, Address total, Address out, int64_t num_images, int64_t num_tokens,
                   int64_t width, int64_t top_k, int64_t gate_stride, int64_t shift_stride, int64_t scale_stride,
                   double eps, DitMoeDtype dtype, DitMoeDtype branch_dtype, Address stream) {
  check("norm_modulate",
        dit_moe_norm_modulate(pointer(x), pointer(gate), pointer(y), pointer<float>(weights), pointer(addend),
                              pointer<int32_t>(slot_to_row), pointer(shift), pointer(scale), pointer(total),
                              pointer(out), num_images, num_tokens, width, top_k, gate_stride, shift_stride,
                              scale_stride, eps, dtype, branch_dtype, stream_handle(stream)));
}

void norm_modulate_backward(Address dout, Address dsum, Address x, Address gate, Address y, Address scale, Address dx,
                            Address dy, Address dshift, Address dscale, Address dgate, Address statistics,
                            Address partials, int64_t num_images, int64_t num_tokens, int64_t width,
                            int64_t gate_stride, int64_t scale_stride, int64_t num_parts, double eps, DitMoeDtype dtype,
                            DitMoeDtype branch_dtype, Address stream) {
  check("norm_modulate_backward",
        dit_moe_norm_modulate_backward(pointer(dout), pointer(dsum), pointer(x), pointer(gate), pointer(y),
                                       pointer(scale), pointer(dx), pointer(dy), pointer(dshift), pointer(dscale),
                                       pointer(dgate), pointer<float>(statistics), pointer<float>(partials), num_images,
                                       num_tokens, width, gate_stride, scale_stride, num_parts, eps, dtype,
                                       branch_dtype, stream_handle(stream)));
}

void qk_norm(Address q, Address k, Address q_weight, Address q_bias, Address k_weight, Address k_bias, Address q_out,
             Address k_out, int64_t num_tokens, int64_t heads, int64_t width, int64_t q_stride, int64_t q_head_stride,
             int64_t k_stride, int64_t k_head_stride, double eps, DitMoeDtype dtype, DitMoeDtype weight_dtype,
             Address stream) {
  check("qk_norm",
        dit_moe_qk_norm(pointer(q), pointer(k), pointer(q_weight), pointer(q_bias), pointer(k_weight), pointer(k_bias),
                        pointer(q_out), pointer(k_out), num_tokens, heads, width, q_stride, q_head_stride, k_stride,
                        k_head_stride, eps, dtype, weight_dtype, stream_handle(stream)));
}

void qk_norm_backward(Address dq_out, Address dk_out, Address q, Address k, Address q_weight, Address k_weight,
                      Address dq, Address dk, Address partials, int64_t num_tokens, int64_t heads, int64_t width,
                      int64_t q_stride, int64_t q_head_stride, int64_t k_stride, int64_t k_head_stride,
                      int64_t num_partials, double eps, DitMoeDtype dtype, DitMoeDtype weight_dtype, Address stream) {
  check("qk_norm_backward",
        dit_moe_qk_norm_backward(pointer(dq_out), pointer(dk_out), pointer(q), pointer(k), pointer(q_weight),
                                 pointer(k_weight), pointer(dq), pointer(dk), pointer<float>(partials), num_tokens,
                                 heads, width, q_stride, q_head_stride, k_stride, k_head_stride, num_partials, eps,
                                 dtype, weight_dtype, stream_handle(stream)));
}

void router_logits(Address x, Address gate, Address logits, int64_t num_tokens, int64_t depth, int64_t num_experts,
                   DitMoeDtype dtype, DitMoeDtype gate_dtype, Address stream) {
  check("router_logits", dit_moe_router_logits(pointer(x), pointer(gate), pointer<float>(logits), num_tokens, depth,
                                               num_experts, dtype, gate_dtype, stream_handle(stream)));
}

void router_gradients(Address dlogits, Address x, Address gate, Address rows, Address slot_to_row, Address dx,
                      Address dgate, Address parts, int64_t num_tokens, int64_t depth, int64_t num_experts,
                      int64_t top_k, int32_t beside, DitMoeDtype dtype, DitMoeDtype gate_dtype, Address stream) {
  check("router_gradients", dit_moe_router_gradients(pointer<float>(dlogits), pointer(x), pointer(gate), pointer(rows),
                                                     pointer<int32_t>(slot_to_row), pointer(dx), pointer(dgate),
                                                     pointer<float>(parts), num_tokens, depth, num_experts, top_k,
                                                     beside, dtype, gate_dtype, stream_handle(stream)));
}

void topk_softmax(Address logits, Address weights, Address ids, Address probs, int64_t num_tokens, int64_t num_experts,
                  int64_t top_k, Address stream) {
  check("topk_softmax",
        dit_moe_topk_softmax(pointer<float>(logits), pointer<float>(weights), pointer<int32_t>(ids),
                             pointer<float>(probs), num_tokens, num_experts, top_k, stream_handle(stream)));
}

void topk_softmax_backward(Address dweights, Address dprobs, Address ids, Address probs, Address dlogits,
                           int64_t num_tokens, int64_t num_experts, int64_t top_k, Address stream) {
  check("topk_softmax_backward",
        dit_moe_topk_softmax_backward(pointer<float>(dweights), pointer<float>(dprobs), pointer<int32_t>(ids),
                                      pointer<float>(probs), pointer<float>(dlogits), num_tokens, num_experts, top_k,
                                      stream_handle(stream)));
}

DitMoePlan plan(Address tokens_per_expert, Address expert_offsets, Address row_to_slot, Address slot_to_row,
                Address tile_expert, Address tile_row, int64_t tile_rows) {
  return {pointer<int32_t>(tokens_per_expert),
          pointer<int32_t>(expert_offsets),
          pointer<int32_t>(row_to_slot),
          pointer<int32_t>(slot_to_row),
          pointer<int32_t>(tile_expert),
          pointer<int32_t>(tile_row),
          tile_rows};
}

void routing_plan(Address ids, Address tokens_per_expert, Address expert_offsets, Address row_to_slot,
                  Address slot_to_row, Address tile_expert, Address tile_row, Address workspace, int64_t id_bytes,
                  int64_t num_slots, int64_t num_experts, int64_t tile_rows, Address stream) {
  const DitMoePlan result =
      plan(tokens_per_expert, expert_offsets, row_to_slot, slot_to_row, tile_expert, tile_row, tile_rows);
  check("routing_plan", dit_moe_routing_plan(pointer(ids), id_bytes, &result, pointer(workspace), num_slots,
                                             num_experts, stream_handle(stream)));
}

void route(Address x, Address gate, Address weights, Address ids, Address probs, Address balance,
           Address tokens_per_expert, Address expert_offsets, Address row_to_slot, Address slot_to_row,
           Address tile_expert, Address tile_row, Address workspace, int64_t num_tokens, int64_t depth,
           int64_t num_experts, int64_t top_k, int64_t tile_rows, double balance_scale, DitMoeDtype dtype,
           DitMoeDtype gate_dtype, Address stream) {
  const DitMoePlan result =
      plan(tokens_per_expert, expert_offsets, row_to_slot, slot_to_row, tile_expert, tile_row, tile_rows);
  check("route",
        dit_moe_route(pointer(x), pointer(gate), pointer<float>(weights), pointer<int32_t>(ids), pointer<float>(probs),
                      pointer<float>(balance), &result, nullptr, pointer(workspace), num_tokens, depth, num_experts,
                      top_k, balance_scale, dtype, gate_dtype, stream_handle(stream)));
}

#if DIT_MOE_SM90A
void grouped_gemm(Address x, Address w, Address expert_offsets, Address out, int64_t num_rows, int64_t depth,
                  int64_t width, int64_t num_experts, DitMoeDtype dtype, Address stream) {
  check("grouped_gemm", dit_moe_grouped_gemm(pointer(x), pointer(w), pointer<int32_t>(expert_offsets), pointer(out),
                                             num_rows, depth, width, num_experts, dtype, stream_handle(stream)));
}

void grouped_gemm_dx(Address grad, Address w, Address expert_offsets, Address dx, int64_t num_rows, int64_t depth,
                     int64_t width, int64_t num_experts, DitMoeDtype dtype, Address stream) {
  check("grouped_gemm_dx",
        dit_moe_grouped_gemm_dx(pointer(grad), pointer(w), pointer<int32_t>(expert_offsets), pointer(dx), num_rows,
                                depth, width, num_experts, dtype, stream_handle(stream)));
}

void grouped_gemm_dw(Address grad, Address x, Address expert_offsets, Address dw, int64_t num_rows, int64_t height,
                     int64_t width, int64_t num_experts, int32_t accumulate, DitMoeDtype dw_dtype, DitMoeDtype dtype,
                     Address stream) {
  check("grouped_gemm_dw",
        dit_moe_grouped_gemm_dw(pointer(grad), pointer(x), pointer<int32_t>(expert_offsets), pointer(dw), num_rows,
                                height, width, num_experts, accumulate, dw_dtype, dtype, stream_handle(stream)));
}

void grouped_swiglu(Address x, Address w13, Address expert_offsets, Address out, Address h, int64_t num_rows,
                    int64_t depth, int64_t width, int64_t num_experts, DitMoeDtype dtype, Address stream) {
  check("grouped_swiglu",
        dit_moe_grouped_swiglu(pointer(x), pointer(w13), pointer<int32_t>(expert_offsets), pointer(out), pointer(h),
                               num_rows, depth, width, num_experts, dtype, stream_handle(stream)));
}

void grouped_dswiglu(Address grad, Address w2, Address expert_offsets, Address h, Address topk_weights,
                     Address row_to_slot, Address dh, Address weighted_a, Address dots, int64_t num_rows, int64_t depth,
                     int64_t width, int64_t num_experts, DitMoeDtype dtype, Address stream) {
  check("grouped_dswiglu",
        dit_moe_grouped_dswiglu(pointer(grad), pointer(w2), pointer<int32_t>(expert_offsets), pointer(h),
                                pointer<float>(topk_weights), pointer<int32_t>(row_to_slot), pointer(dh),
                                pointer(weighted_a), pointer<float>(dots), num_rows, depth, width, num_experts, dtype,
                                stream_handle(stream)));
}

void qk_norm_attention(Address qkv, Address q_weight, Address q_bias, Address k_weight, Address k_bias, Address out,
                       int64_t num_images, int64_t num_tokens, int64_t num_heads, int64_t width, double eps,
                       DitMoeDtype dtype, DitMoeDtype weight_dtype, Address stream) {
  check("qk_norm_attention",
        dit_moe_qk_norm_attention(pointer(qkv), pointer(q_weight), pointer(q_bias), pointer(k_weight), pointer(k_bias),
                                  pointer(out), num_images, num_tokens, num_heads, width, eps, dtype, weight_dtype,
                                  stream_handle(stream)));
}

void routed_ffn(Address x, Address gate, Address w13, Address w2, Address addend, Address out, Address probs,
                Address tokens_per_expert, Address workspace, int64_t num_tokens, int64_t depth, int64_t hidden,
                int64_t num_experts, int64_t top_k, DitMoeDtype dtype, DitMoeDtype gate_dtype, Address stream) {
  check("routed_ffn",
        dit_moe_routed_ffn(pointer(x), pointer(gate), pointer(w13), pointer(w2), pointer(addend), pointer(out),
                           pointer<float>(probs), pointer<int32_t>(tokens_per_expert), pointer(workspace), num_tokens,
                           depth, hidden, num_experts, top_k, dtype, gate_dtype, stream_handle(stream)));
}

void routed_ffn_products(Address x, Address gate, Address w13, Address w2, Address probs, Address tokens_per_expert,
                         Address rows, Address weights, Address slot_to_row, Address activation, Address workspace,
                         int64_t num_tokens, int64_t depth, int64_t hidden, int64_t num_experts, int64_t top_k,
                         DitMoeDtype dtype, DitMoeDtype gate_dtype, Address stream) {
  check("routed_ffn_products",
        dit_moe_routed_ffn_products(pointer(x), pointer(gate), pointer(w13), pointer(w2), pointer<float>(probs),
                                    pointer<int32_t>(tokens_per_expert), pointer(rows), pointer<float>(weights),
                                    pointer<int32_t>(slot_to_row), pointer(activation), pointer(workspace), num_tokens,
                                    depth, hidden, num_experts, top_k, dtype, gate_dtype, stream_handle(stream)));
}

int64_t routed_ffn_workspace(int64_t num_tokens, int64_t depth, int64_t hidden, int64_t num_experts, int64_t top_k) {
  const int64_t bytes = dit_moe_routed_ffn_workspace(num_tokens, depth, hidden, num_experts, top_k);
  if (bytes < 0) check("routed_ffn_workspace", cudaErrorInvalidValue);
  return bytes;
}
#endif

py::dict build_info() {
  py::dict info;
  info["cuda_version"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["archs"] = DIT_MOE_BUILD_ARCHS;  // a string literal, defined by setup.py
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CUDA kernels of dit_moe_kernels: raw launches on device addresses, without any check of them.";
  module.attr("FLOAT32") = static_cast<int>(DIT_MOE_FLOAT32);
  module.attr("FLOAT16") = static_cast<int>(DIT_MOE_FLOAT16);
  module.attr("BFLOAT16") = static_cast<int>(DIT_MOE_BFLOAT16);
  module.attr("ROUTING_WORKSPACE") = static_cast<int>(DIT_MOE_ROUTING_WORKSPACE);

  // A launch blocks while the stream's queue is full: let other Python threads run meanwhile.
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.def("permute", &permute, Unlocked(), py::arg("x"), py::arg("row_to_slot"), py::arg("slot_to_row"),
             py::arg("out"), py::arg("num_tokens"), py::arg("width"), py::arg("top_k"), py::arg("beside"),
             py::arg("dtype"), py::arg("stream"));
  module.def("unpermute", &unpermute, Unlocked(), py::arg("y"), py::arg("weights"), py::arg("addend"),
             py::arg("slot_to_row"), py::arg("out"), py::arg("num_tokens"), py::arg("width"), py::arg("top_k"),
             py::arg("dtype"), py::arg("stream"));
  module.def("unpermute_backward", &unpermute_backward, Unlocked(), py::arg("dout"), py::arg("y"), py::arg("weights"),
             py::arg("row_to_slot"), py::arg("dy"), py::arg("dweights"), py::arg("num_rows"), py::arg("width"),
             py::arg("top_k"), py::arg("dtype"), py::arg("stream"));
  module.def("swiglu", &swiglu, Unlocked(), py::arg("h"), py::arg("out"), py::arg("num_rows"), py::arg("width"),
             py::arg("dtype"), py::arg("stream"));
  module.def("swiglu_backward", &swiglu_backward, Unlocked(), py::arg("dout"), py::arg("h"), py::arg("dh"),
             py::arg("num_rows"), py::arg("width"), py::arg("dtype"), py::arg("stream"));
  module.def("norm_modulate", &norm_modulate, Unlocked(), py::arg("x"), py::arg("gate"), py::arg("y"),
             py::arg("weights"), py::arg("addend"), py::arg("slot_to_row"), py::arg("shift"), py::arg("scale"),
             py::arg("total"), py::arg("out"), py::arg("num_images"), py::arg("num_tokens"), py::arg("width"),
             py::arg("top_k"), py::arg("gate_stride"), py::arg("shift_stride"), py::arg("scale_stride"), py::arg("eps"),
             py::arg("dtype"), py::arg("branch_dtype"), py::arg("stream"));
  module.def("norm_modulate_backward", &norm_modulate_backward, Unlocked(), py::arg("dout"), py::arg("dsum"),
             py::arg("x"), py::arg("gate"), py::arg("y"), py::arg("scale"), py::arg("dx"), py::arg("dy"),
             py::arg("dshift"), py::arg("dscale"), py::arg("dgate"), py::arg("statistics"), py::arg("partials"),
             py::arg("num_images"), py::arg("num_tokens"), py::arg("width"), py::arg("gate_stride"),
             py::arg("scale_stride"), py::arg("num_parts"), py::arg("eps"), py::arg("dtype"), py::arg("branch_dtype"),
             py::arg("stream"));
  module.def("qk_norm", &qk_norm, Unlocked(), py::arg("q"), py::arg("k"), py::arg("q_weight"), py::arg("q_bias"),
             py::arg("k_weight"), py::arg("k_bias"), py::arg("q_out"), py::arg("k_out"), py::arg("num_tokens"),
             py::arg("heads"), py::arg("width"), py::arg("q_stride"), py::arg("q_head_stride"), py::arg("k_stride"),
             py::arg("k_head_stride"), py::arg("eps"), py::arg("dtype"), py::arg("weight_dtype"), py::arg("stream"));
  module.def("qk_norm_backward", &qk_norm_backward, Unlocked(), py::arg("dq_out"), py::arg("dk_out"), py::arg("q"),
             py::arg("k"), py::arg("q_weight"), py::arg("k_weight"), py::arg("dq"), py::arg("dk"), py::arg("partials"),
             py::arg("num_tokens"), py::arg("heads"), py::arg("width"), py::arg("q_stride"), py::arg("q_head_stride"),
             py::arg("k_stride"), py::arg("k_head_stride"), py::arg("num_partials"), py::arg("eps"), py::arg("dtype"),
             py::arg("weight_dtype"), py::arg("stream"));
  module.def("router_logits", &router_logits, Unlocked(), py::arg("x"), py::arg("gate"), py::arg("logits"),
             py::arg("num_tokens"), py::arg("depth"), py::arg("num_experts"), py::arg("dtype"), py::arg("gate_dtype"),
             py::arg("stream"));
  module.def("router_gradients", &router_gradients, Unlocked(), py::arg("dlogits"), py::arg("x"), py::arg("gate"),
             py::arg("rows"), py::arg("slot_to_row"), py::arg("dx"), py::arg("dgate"), py::arg("parts"),
             py::arg("num_tokens"), py::arg("depth"), py::arg("num_experts"), py::arg("top_k"), py::arg("beside"),
             py::arg("dtype"), py::arg("gate_dtype"), py::arg("stream"));
  module.def("topk_softmax", &topk_softmax, Unlocked(), py::arg("logits"), py::arg("weights"), py::arg("ids"),
             py::arg("probs"), py::arg("num_tokens"), py::arg("num_experts"), py::arg("top_k"), py::arg("stream"));
  module.def("topk_softmax_backward", &topk_softmax_backward, Unlocked(), py::arg("dweights"), py::arg("dprobs"),
             py::arg("ids"), py::arg("probs"), py::arg("dlogits"), py::arg("num_tokens"), py::arg("num_experts"),
             py::arg("top_k"), py::arg("stream"));
  module.def("routing_plan", &routing_plan, Unlocked(), py::arg("ids"), py::arg("tokens_per_expert"),
             py::arg("expert_offsets"), py::arg("row_to_slot"), py::arg("slot_to_row"), py::arg("tile_expert"),
             py::arg("tile_row"), py::arg("workspace"), py::arg("id_bytes"), py::arg("num_slots"),
             py::arg("num_experts"), py::arg("tile_rows"), py::arg("stream"));
  module.def("route", &route, Unlocked(), py::arg("x"), py::arg("gate"), py::arg("weights"), py::arg("ids"),
             py::arg("probs"), py::arg("balance"), py::arg("tokens_per_expert"), py::arg("expert_offsets"),
             py::arg("row_to_slot"), py::arg("slot_to_row"), py::arg("tile_expert"), py::arg("tile_row"),
             py::arg("workspace"), py::arg("num_tokens"), py::arg("depth"), py::arg("num_experts"), py::arg("top_k"),
             py::arg("tile_rows"), py::arg("balance_scale"), py::arg("dtype"), py::arg("gate_dtype"),
             py::arg("stream"));
#if DIT_MOE_SM90A
  module.def("grouped_gemm", &grouped_gemm, Unlocked(), py::arg("x"), py::arg("w"), py::arg("expert_offsets"),
             py::arg("out"), py::arg("num_rows"), py::arg("depth"), py::arg("width"), py::arg("num_experts"),
             py::arg("dtype"), py::arg("stream"));
  module.def("grouped_gemm_dx", &grouped_gemm_dx, Unlocked(), py::arg("grad"), py::arg("w"), py::arg("expert_offsets"),
             py::arg("dx"), py::arg("num_rows"), py::arg("depth"), py::arg("width"), py::arg("num_experts"),
             py::arg("dtype"), py::arg("stream"));
  module.def("grouped_gemm_dw", &grouped_gemm_dw, Unlocked(), py::arg("grad"), py::arg("x"), py::arg("expert_offsets"),
             py::arg("dw"), py::arg("num_rows"), py::arg("height"), py::arg("width"), py::arg("num_experts"),
             py::arg("accumulate"), py::arg("dw_dtype"), py::arg("dtype"), py::arg("stream"));
  module.def("grouped_swiglu", &grouped_swiglu, Unlocked(), py::arg("x"), py::arg("w13"), py::arg("expert_offsets"),
             py::arg("out"), py::arg("h"), py::arg("num_rows"), py::arg("depth"), py::arg("width"),
             py::arg("num_experts"), py::arg("dtype"), py::arg("stream"));
  module.attr("ROUTER_PARTS") = static_cast<int>(DIT_MOE_ROUTER_PARTS);
  module.attr("DSWIGLU_COLUMNS") = static_cast<int>(DIT_MOE_DSWIGLU_COLUMNS);
  module.def("grouped_dswiglu", &grouped_dswiglu, Unlocked(), py::arg("grad"), py::arg("w2"), py::arg("expert_offsets"),
             py::arg("h"), py::arg("topk_weights"), py::arg("row_to_slot"), py::arg("dh"), py::arg("weighted_a"),
             py::arg("dots"), py::arg("num_rows"), py::arg("depth"), py::arg("width"), py::arg("num_experts"),
             py::arg("dtype"), py::arg("stream"));
  module.def("qk_norm_attention", &qk_norm_attention, Unlocked(), py::arg("qkv"), py::arg("q_weight"),
             py::arg("q_bias"), py::arg("k_weight"), py::arg("k_bias"), py::arg("out"), py::arg("num_images"),
             py::arg("num_tokens"), py::arg("num_heads"), py::arg("width"), py::arg("eps"), py::arg("dtype"),
             py::arg("weight_dtype"), py::arg("stream"));
  module.def("routed_ffn", &routed_ffn, Unlocked(), py::arg("x"), py::arg("gate"), py::arg("w13"), py::arg("w2"),
             py::arg("addend"), py::arg("out"), py::arg("probs"), py::arg("tokens_per_expert"), py::arg("workspace"),
             py::arg("num_tokens"), py::arg("depth"), py::arg("hidden"), py::arg("num_experts"), py::arg("top_k"),
             py::arg("dtype"), py::arg("gate_dtype"), py::arg("stream"));
  module.def("routed_ffn_products", &routed_ffn_products, Unlocked(), py::arg("x"), py::arg("gate"), py::arg("w13"),
             py::arg("w2"), py::arg("probs"), py::arg("tokens_per_expert"), py::arg("rows"), py::arg("weights"),
             py::arg("slot_to_row"), py::arg("activation"), py::arg("workspace"), py::arg("num_tokens"),
             py::arg("depth"), py::arg("hidden"), py::arg("num_experts"), py::arg("top_k"), py::arg("dtype"),
             py::arg("gate_dtype"), py::arg("stream"));
  module.def("routed_ffn_workspace", &routed_ffn_workspace, py::arg("num_tokens"), py::arg("depth"), py::arg("hidden"),
             py::arg("num_experts"), py::arg("top_k"));
#endif
  module.def("build_info", &build_info, "CUDA version and GPU architectures that this module was compiled for.");
}
