// LayerNorm of one head's query or key, by one thread, where it lies in shared memory.
#pragma once

#include "epilogue.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace dit_moe::sm90 {

// address(i): of the row's i-th 8 elements. weights: (2, 8 * kChunks) fp32 in shared memory, weight and bias. In fp32;
// the row stays packed, and is unpacked anew for each of the three passes.
template <typename Element, int kChunks, typename Address>
__device__ __forceinline__ void normalise_row(const Address& address, const float* weights, float eps) {
  constexpr int width = 8 * kChunks;
  uint32_t pairs[width / 2];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const uint4 word = load_shared(address(i));
    pairs[4 * i] = word.x;
    pairs[4 * i + 1] = word.y;
    pairs[4 * i + 2] = word.z;
    pairs[4 * i + 3] = word.w;
  }
  float2 sum = {}, squares = {};
#pragma unroll
  for (int i = 0; i < width / 2; ++i) {
    const float2 x = widen_pair<Element>(pairs[i]);
    sum.x += x.x;
    sum.y += x.y;
  }
  pin(pairs);
  const float mean = (sum.x + sum.y) / width;
#pragma unroll
  for (int i = 0; i < width / 2; ++i) {
    const float2 x = widen_pair<Element>(pairs[i]);
    squares.x += (x.x - mean) * (x.x - mean);
    squares.y += (x.y - mean) * (x.y - mean);
  }
  pin(pairs);
  const float inverse = rsqrtf((squares.x + squares.y) / width + eps), shift = -mean * inverse;
  const auto normalised = [&](float x, float weight, float bias) {
    return fmaf(fmaf(x, inverse, shift), weight, bias);
  };
#pragma unroll
  for (int i = 0; i < width / 2; i += 2) {
    const float4 w = reinterpret_cast<const float4*>(weights)[i / 2];
    const float4 b = reinterpret_cast<const float4*>(weights + width)[i / 2];
    const float2 x = widen_pair<Element>(pairs[i]), y = widen_pair<Element>(pairs[i + 1]);
    pairs[i] = round_pair<Element>(normalised(x.x, w.x, b.x), normalised(x.y, w.y, b.y));
    pairs[i + 1] = round_pair<Element>(normalised(y.x, w.z, b.z), normalised(y.y, w.w, b.w));
  }
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    store_shared(address(i), uint4{pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]});
  }
}

}  // namespace dit_moe::sm90
