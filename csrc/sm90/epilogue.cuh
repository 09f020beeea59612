// From a warp's accumulators (16 rows) to device memory, through a small staging buffer of the warp's own, so that rows
// are stored in whole 128-byte lines and no warp waits for another.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

#include "ptx.cuh"

namespace dit_moe::sm90 {

constexpr int kWarpRows = 16;
constexpr int kStagingColumns = 64;  // of 16-bit elements: 128 bytes
constexpr int kStagingBytes = kWarpRows * kStagingColumns * 2;

// Two elements in 32 bits, the first in the low half; rounded to nearest even.
template <typename Element>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}

// Neighbours among accumulators, rounded and packed.
template <typename Element, int kCount>
__device__ __forceinline__ void round_pairs(const float (&accumulators)[2 * kCount], uint32_t (&pairs)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) pairs[i] = round_pair<Element>(accumulators[2 * i], accumulators[2 * i + 1]);
}

template <typename Element>
__device__ __forceinline__ float2 widen_pair(uint32_t bits) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(bits));
  }
}

// 1 / (1 + exp(-x)) within a few units of fp32's last place; x = -inf gives 0, inf gives 1.
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + power_of_two(-kLog2E * x)); }

// silu(gate) * up of two columns, from packed pairs.
template <typename Element>
__device__ __forceinline__ uint32_t swiglu_pair(uint32_t gate_bits, uint32_t up_bits) {
  const float2 gate = widen_pair<Element>(gate_bits);
  const float2 up = widen_pair<Element>(up_bits);
  return round_pair<Element>(gate.x * sigmoid(gate.x) * up.x, gate.y * sigmoid(gate.y) * up.y);
}

// Where this warp's 16 rows go.
template <typename Element>
struct RowBlock {
  Element* out;  // first row, first column of the matrix
  int64_t stride;
  int rows;  // valid rows, may be <= 0
};

// Puts kColumns (a multiple of 16, at most 64) columns of the warp's rows into a staging buffer.
// fragment(i, q): two packed elements of the accumulator layout, for columns 16 i + 8 (q / 2) and row half q % 2.
template <int kColumns, typename Fragment>
__device__ __forceinline__ void stage_columns(uint32_t staging, const Fragment& fragment) {
  static_assert(kColumns % 16 == 0 && kColumns <= kStagingColumns, "one staging buffer");
  const int lane = threadIdx.x % 32;
  // The 128-byte swizzle keeps both directions free of bank conflicts. Chunk numbers are combined by xor: staging is
  // aligned to more than a row, and 2 i + lane / 16 = 2 i ^ lane / 16.
  const uint32_t write_address = staging + lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
#pragma unroll
  for (int i = 0; i < kColumns / 16; ++i) {
    const uint32_t fragments[4] = {fragment(i, 0), fragment(i, 1), fragment(i, 2), fragment(i, 3)};
    store_matrices(write_address ^ (2 * i * 16), fragments);
  }
}

// Stores kColumns columns from `column` on, given as to stage_columns; those from `width` on are dropped.
template <int kColumns, typename Element, typename Fragment>
__device__ __forceinline__ void store_columns(uint32_t staging, const RowBlock<Element>& block, int column, int width,
                                              const Fragment& fragment) {
  const int lane = threadIdx.x % 32;
  stage_columns<kColumns>(staging, fragment);
  __syncwarp();
  // Eight lanes store one row of 128 bytes; four rows at a time.
  const int chunk = lane % 8;
  const int row = lane / 8;
  const int place = column + chunk * 8;
  const bool valid = chunk < kColumns / 8 && place < width;
  const int64_t step = 4 * block.stride;
  Element* out = block.out + row * block.stride + place;
  const uint32_t read_address = staging + row * 128 + (chunk ^ row) * 16;
  uint4 values[kWarpRows / 4];
#pragma unroll
  for (int i = 0; i < kWarpRows / 4; ++i) {
    values[i] = load_shared((read_address ^ (i % 2 * 4 * 16)) + 4 * i * 128);
  }
#pragma unroll
  for (int i = 0; i < kWarpRows / 4; ++i) {
    if (valid && row + 4 * i < block.rows) __stcs(reinterpret_cast<uint4*>(out + i * step), values[i]);
  }
  __syncwarp();
}

// All columns of a tile, up to 64 at a time; pair(i) gives the values at accumulators 2 i and 2 i + 1.
template <int kColumns, int kFirst = 0, typename Element, typename PairAt>
__device__ __forceinline__ void store_tile(uint32_t staging, const RowBlock<Element>& block, int column, int width,
                                           const PairAt& pair) {
  constexpr int count = kColumns - kFirst < kStagingColumns ? kColumns - kFirst : kStagingColumns;
  store_columns<count>(staging, block, column + kFirst, width,
                       [&](int i, int q) { return pair(kFirst / 4 + 4 * i + q); });
  if constexpr (kFirst + count < kColumns) store_tile<kColumns, kFirst + count>(staging, block, column, width, pair);
}

// ---- fp32 sums, on top of what is there

// Four neighbouring elements of a row.
template <typename Sum>
using Quad = std::conditional_t<std::is_same_v<Sum, float>, float4, uint2>;

template <typename Sum>
__device__ __forceinline__ Quad<Sum> add_quad(const Quad<Sum>& old, const uint4& sums) {
  const float x = __uint_as_float(sums.x), y = __uint_as_float(sums.y);
  const float z = __uint_as_float(sums.z), w = __uint_as_float(sums.w);
  if constexpr (std::is_same_v<Sum, float>) {
    return {old.x + x, old.y + y, old.z + z, old.w + w};
  } else {
    const float2 a = widen_pair<Sum>(old.x), b = widen_pair<Sum>(old.y);
    return {round_pair<Sum>(a.x + x, a.y + y), round_pair<Sum>(b.x + z, b.y + w)};
  }
}

// Asks for a warp's rows to come to the L2 cache; add_tile will read them.
template <int kColumns, typename Sum>
__device__ __forceinline__ void prefetch_rows(const RowBlock<Sum>& block, int column, int width) {
  constexpr int line = 128 / sizeof(Sum);
  const int row = threadIdx.x % kWarpRows;
  if (row >= block.rows) return;
  for (int i = threadIdx.x % 32 / kWarpRows * line; i < kColumns && column + i < width; i += 2 * line) {
    prefetch_line(block.out + row * block.stride + column + i);
  }
}

// Stores kColumns columns (a multiple of 16) of accumulators, in fp32 all the way, plus what is there if `accumulate`.
// 32 columns at a time, and the next ones are read before these are written.
template <int kColumns, typename Sum>
__device__ __forceinline__ void add_tile(uint32_t staging, const RowBlock<Sum>& block, int column, int width,
                                         bool accumulate, const float (&sums)[kColumns / 2]) {
  constexpr int pass_columns = 32;
  constexpr int passes = (kColumns + pass_columns - 1) / pass_columns;
  const int lane = threadIdx.x % 32;
  // 16-byte chunk c of row r lies at chunk c ^ 2 (r % 4), which keeps writes of 8 bytes and reads of 16 free of bank
  // conflicts. Staging is aligned to more than a row, hence xor again.
  const uint32_t write_address = staging + lane / 4 * 128 + (lane / 4 % 4 * 2 ^ lane % 4 / 2) * 16 + lane % 2 * 8;
  const int chunk = lane % 8;
  const int row = lane / 8;
  const uint32_t read_address = staging + row * 128 + (chunk ^ row * 2) * 16;
  const int64_t step = 4 * block.stride;
  const int place = column + chunk * 4;
  Sum* out = block.out + row * block.stride + place;
  const auto valid = [&](int pass, int i) {
    const int first = pass * pass_columns;
    const bool inside = kColumns % pass_columns == 0 || first + chunk * 4 < kColumns;
    return inside && place + first < width && row + 4 * i < block.rows;
  };
  Quad<Sum> old[2][kWarpRows / 4];
  const auto fetch = [&](int pass) {
#pragma unroll
    for (int i = 0; i < kWarpRows / 4; ++i) {
      old[pass % 2][i] = {};
      if (accumulate && valid(pass, i)) {
        old[pass % 2][i] = __ldcs(reinterpret_cast<const Quad<Sum>*>(out + i * step + pass * pass_columns));
      }
    }
  };
  fetch(0);
#pragma unroll
  for (int pass = 0; pass < passes; ++pass) {
    if (pass + 1 < passes) fetch(pass + 1);
#pragma unroll
    for (int j = 0; j < pass_columns / 8; ++j) {
      const int first = pass * pass_columns / 2 + 4 * j;
      if (first < kColumns / 2) {
        store_shared(write_address ^ (2 * j * 16), make_float2(sums[first], sums[first + 1]));
        store_shared((write_address ^ (2 * j * 16)) + 8 * 128, make_float2(sums[first + 2], sums[first + 3]));
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kWarpRows / 4; ++i) {
      const Quad<Sum> sum = add_quad<Sum>(old[pass % 2][i], load_shared(read_address + 4 * i * 128));
      if (valid(pass, i)) __stcs(reinterpret_cast<Quad<Sum>*>(out + i * step + pass * pass_columns), sum);
    }
    __syncwarp();
  }
}

}  // namespace dit_moe::sm90
