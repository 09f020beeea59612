// From a warpgroup's accumulators to rows of tokens in device memory. A thread holds neighbouring tokens of a column,
// so the tile is turned in shared memory, 32 tokens at a time, and stored in whole 128-byte lines.
#pragma once

#include "epilogue.cuh"

namespace dit_moe::sm90 {

// Stores `rows` tokens of 64 columns from `out` on, or of `columns` if these are fewer.
// staging: the warpgroup's. pairs[2 j] of warp w's lane l holds tokens 8 j + 2 (l % 4) (+ 1) of column 16 w + l / 4,
// rounded, and pairs[2 j + 1] those of column 16 w + l / 4 + 8.
template <int kHeight, typename Element>
__device__ __forceinline__ void store_token_pairs(uint32_t staging, int group, Element* out, int64_t stride, int rows,
                                                  int columns, const uint32_t* pairs) {
  constexpr int tokens = 32;  // of a chunk; two take turns
  constexpr int chunk_bytes = tokens * 128;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int place = threadIdx.x % 8 * 8, token = threadIdx.x % 128 / 8;  // of the 16 bytes that this thread stores
  // The 128-byte swizzle keeps both directions free of bank conflicts.
  const auto address = [](int token, int column) { return token * 128 + (column / 8 ^ token % 8) * 16; };
  const uint32_t written = address(lane / 16 * 8 + lane % 8, warp * 16 + lane / 8 % 2 * 8);
  const uint32_t read = address(token, place);
  const bool valid = place < columns;
  out += token * stride + place;
  synchronize_group(group);  // some may still read what was stored before
#pragma unroll
  for (int first = 0; first < kHeight; first += tokens) {
    if (first >= rows) break;
    const uint32_t buffer = staging + first / tokens % 2 * chunk_bytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pair = first / 4 + half * 4;
      const uint32_t fragments[4] = {pairs[pair], pairs[pair + 1], pairs[pair + 2], pairs[pair + 3]};
      store_matrices_turned(buffer + half * chunk_bytes / 2 + written, fragments);
    }
    synchronize_group(group);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 value = load_shared(buffer + half * chunk_bytes / 2 + read);
      const int row = first + half * tokens / 2;
      if (valid && token + row < rows) __stcs(reinterpret_cast<uint4*>(out + row * stride), value);
    }
  }
}

// The same from accumulators.
template <typename Element, int kHeight>
__device__ __forceinline__ void store_tokens(uint32_t staging, int group, Element* out, int64_t stride, int rows,
                                             int columns, const float (&accumulators)[kHeight / 2]) {
  uint32_t pairs[kHeight / 4];
  round_pairs<Element, kHeight / 4>(accumulators, pairs);
  store_token_pairs<kHeight>(staging, group, out, stride, rows, columns, pairs);
}

}  // namespace dit_moe::sm90
