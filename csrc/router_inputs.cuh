// Which inputs the router's scores and their gradients take.
#pragma once

#include "common.cuh"

namespace dit_moe {

constexpr int kMaxRouterExperts = 64;

inline bool valid_router(const void* x, const void* gate, int64_t num_tokens, int64_t depth, int64_t num_experts,
                         DitMoeDtype dtype, DitMoeDtype gate_dtype) {
  for (const void* matrix : {x, gate}) {
    if (reinterpret_cast<uintptr_t>(matrix) % kWideBytes != 0) return false;
  }
  const bool valid_dtypes =
      dtype >= DIT_MOE_FLOAT32 && dtype <= DIT_MOE_BFLOAT16 && (gate_dtype == DIT_MOE_FLOAT32 || gate_dtype == dtype);
  const int64_t chunk = kWideBytes / (dtype == DIT_MOE_FLOAT32 ? 4 : 2);
  return valid_dtypes && fits_in_31_bits(num_tokens) && depth > 0 && depth <= 1 << 30 && depth % chunk == 0 &&
         num_experts >= 1 && num_experts <= kMaxRouterExperts;
}

// Calls launch(X{}, Gate{}) for the element types of valid inputs.
template <typename Launch>
cudaError_t with_router_types(DitMoeDtype dtype, DitMoeDtype gate_dtype, const Launch& launch) {
  const bool gate_fp32 = gate_dtype == DIT_MOE_FLOAT32;
  switch (dtype) {
    case DIT_MOE_FLOAT32:
      return launch(float{}, float{});
    case DIT_MOE_FLOAT16:
      return gate_fp32 ? launch(__half{}, float{}) : launch(__half{}, __half{});
    case DIT_MOE_BFLOAT16:
      return gate_fp32 ? launch(__nv_bfloat16{}, float{}) : launch(__nv_bfloat16{}, __nv_bfloat16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace dit_moe
