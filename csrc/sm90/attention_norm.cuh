// LayerNorm of one head's query or key, where it lies in shared memory.
#pragma once

#include "epilogue.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace dit_moe::sm90 {

// address(i): of the row's i-th 8 elements. weights: (2, 8 * kChunks) fp32 in shared memory, weight and bias. In fp32.
// kLanes, 1 or 2: neighbouring lanes that share a row.
template <typename Element, int kChunks, int kLanes, typename Address>
__device__ __forceinline__ void normalise_row(const Address& address, const float* weights, float eps) {
  constexpr int width = 8 * kChunks;
  constexpr float share = 1.0f / width;
  constexpr int mine = (kChunks + kLanes - 1) / kLanes;  // chunks of a lane; the last of the second may not be there
  const int first = threadIdx.x % kLanes * mine;
  const auto exists = [&](int i) { return (kLanes - 1) * mine + i < kChunks || first + i < kChunks; };
  const auto over_lanes = [](float x) { return kLanes == 1 ? x : x + __shfl_xor_sync(0xffffffffu, x, 1); };
  float2 row[4 * mine] = {};
#pragma unroll
  for (int i = 0; i < mine; ++i) {
    if (!exists(i)) continue;
    const uint4 word = load_shared(address(first + i));
    row[4 * i] = widen_pair<Element>(word.x);
    row[4 * i + 1] = widen_pair<Element>(word.y);
    row[4 * i + 2] = widen_pair<Element>(word.z);
    row[4 * i + 3] = widen_pair<Element>(word.w);
  }
  float2 sum = {}, squares = {};
#pragma unroll
  for (const float2& x : row) {
    sum.x += x.x;
    sum.y += x.y;
  }
  const float mean = over_lanes(sum.x + sum.y) * share;
#pragma unroll
  for (int i = 0; i < 4 * mine; ++i) {
    if (!exists(i / 4)) continue;
    squares.x += (row[i].x - mean) * (row[i].x - mean);
    squares.y += (row[i].y - mean) * (row[i].y - mean);
  }
  const float inverse = rsqrtf(over_lanes(squares.x + squares.y) * share + eps), shift = -mean * inverse;
  const auto pair = [&](float2 x, float w, float b, float v, float c) {
    return round_pair<Element>(fmaf(fmaf(x.x, inverse, shift), w, b), fmaf(fmaf(x.y, inverse, shift), v, c));
  };
#pragma unroll
  for (int i = 0; i < mine; ++i) {
    if (!exists(i)) continue;
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float4 w = reinterpret_cast<const float4*>(weights)[2 * (first + i) + j];
      const float4 b = reinterpret_cast<const float4*>(weights + width)[2 * (first + i) + j];
      pairs[2 * j] = pair(row[4 * i + 2 * j], w.x, b.x, w.y, b.y);
      pairs[2 * j + 1] = pair(row[4 * i + 2 * j + 1], w.z, b.z, w.w, b.w);
    }
    store_shared(address(first + i), uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
  }
}

}  // namespace dit_moe::sm90
