// Shared by the kernels: words (the unit of memory access), lane groups, checks and dispatch.
//
// Every kernel gives each row (or token) to a group of lanes inside one warp, which walk along it side by side. A lane
// moves one word at a time: 16 bytes where the width and all pointers allow it, otherwise a single element. The same
// templated kernel serves both.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <initializer_list>
#include <limits>
#include <type_traits>

#include "launch.h"

namespace dit_moe {

constexpr unsigned kWarp = 32;
constexpr unsigned kThreads = 256;  // threads of a block
constexpr int64_t kWideBytes = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- words

// kPack neighbouring elements of type T, moved in one access.
template <typename T, int kPackElements>
struct Layout {
  using Element = T;
  static constexpr int kPack = kPackElements;
  static constexpr int kBytes = kPack * sizeof(T);
  using Narrow = std::conditional_t<kBytes == 4, uint32_t, uint16_t>;
  using Word = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, Narrow>>;
  static_assert(sizeof(Word) == kBytes, "no word of this size");
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename L>
__device__ __forceinline__ void unpack(const typename L::Word& word, float (&values)[L::kPack]) {
  typename L::Element elements[L::kPack];
  memcpy(elements, &word, sizeof(word));
#pragma unroll
  for (int i = 0; i < L::kPack; ++i) values[i] = to_float(elements[i]);
}

template <typename L>
__device__ __forceinline__ typename L::Word pack(const float (&values)[L::kPack]) {
  typename L::Element elements[L::kPack];
#pragma unroll
  for (int i = 0; i < L::kPack; ++i)
    elements[i] = static_cast<typename L::Element>(values[i]);  // round to nearest even
  typename L::Word word;
  memcpy(&word, elements, sizeof(word));
  return word;
}

// Data that other rows read again soon goes through the read-only path and stays in L2; data read once, and every
// output, is marked to be evicted first.
template <typename Word>
__device__ __forceinline__ Word load_shared_row(const Word* address) {
  return __ldg(address);
}

template <typename Word>
__device__ __forceinline__ Word load_once(const Word* address) {
  return __ldcs(address);
}

template <typename Word>
__device__ __forceinline__ void store(Word* address, const Word& word) {
  __stcs(address, word);
}

// ---- lane groups: threadIdx.x is the lane, threadIdx.y the group in the block

__device__ __forceinline__ int64_t group_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }

// Calls visit(integral_constant<n>, column) for the words of a row that belong to this lane: column, column + lanes,
// ..., n of them. They come kBatch at a time, so that the visitor can issue all its loads before it waits for one; what
// is left at the end of the row comes in smaller batches.
template <int kBatch, typename Visit>
__device__ __forceinline__ void walk_row(unsigned words, const Visit& visit, unsigned column = threadIdx.x) {
  const unsigned lanes = blockDim.x;
  for (; column + (kBatch - 1) * lanes < words; column += kBatch * lanes) {
    visit(std::integral_constant<int, kBatch>{}, column);
  }
  if constexpr (kBatch > 1) walk_row<kBatch / 2>(words, visit, column);
}

template <typename Word>
__device__ __forceinline__ void store_zeros(Word* row, unsigned words) {
  walk_row<1>(words, [&](auto, unsigned column) { store(row + column, Word{}); });
}

// The sum over the lanes of this thread's group, `lanes` of them, in a fixed order. All lanes of the group must call
// it; other groups of the warp need not.
__device__ __forceinline__ float group_sum(float value, unsigned lanes) {
  const unsigned first = (threadIdx.y * lanes) % kWarp;
  const unsigned mask = (0xffffffffu >> (kWarp - lanes)) << first;
  for (unsigned distance = lanes / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(mask, value, distance);
  return value;
}

__device__ __forceinline__ float group_sum(float value) { return group_sum(value, blockDim.x); }

struct Geometry {
  dim3 blocks, threads;
};

constexpr int64_t kWordsPerLane = 4;  // at most, unless a row has a whole warp

// A warp for wide rows; narrow rows share one, so that a lane still has a few words to keep in flight.
inline Geometry geometry(int64_t rows, int64_t words, unsigned threads = kThreads) {
  unsigned lanes = 8;
  while (lanes < kWarp && lanes * kWordsPerLane < words) lanes *= 2;
  const unsigned groups = threads / lanes;
  const int64_t blocks = (rows + groups - 1) / groups;
  return {dim3(static_cast<unsigned>(blocks)), dim3(lanes, groups)};
}

// ---- checks and dispatch

inline bool fits_in_31_bits(int64_t size) { return size >= 0 && size <= std::numeric_limits<int32_t>::max(); }

inline bool valid_sizes(int64_t num_rows, int64_t width, int64_t top_k) {
  return fits_in_31_bits(num_rows) && fits_in_31_bits(width) && fits_in_31_bits(top_k) && top_k >= 1;
}

template <typename T, typename Launch>
cudaError_t with_layout_of(int64_t width, std::initializer_list<const void*> matrices, const Launch& launch) {
  bool wide = width * static_cast<int64_t>(sizeof(T)) % kWideBytes == 0;
  for (const void* matrix : matrices) wide = wide && reinterpret_cast<uintptr_t>(matrix) % kWideBytes == 0;
  if (wide) return launch(Layout<T, kWideBytes / sizeof(T)>{});
  return launch(Layout<T, 1>{});
}

// Calls launch(Layout<T, kPack>{}) with the dtype's element and the widest word that `width` and the pointers allow.
template <typename Launch>
cudaError_t with_layout(DitMoeDtype dtype, int64_t width, std::initializer_list<const void*> matrices,
                        const Launch& launch) {
  switch (dtype) {
    case DIT_MOE_FLOAT32:
      return with_layout_of<float>(width, matrices, launch);
    case DIT_MOE_FLOAT16:
      return with_layout_of<__half>(width, matrices, launch);
    case DIT_MOE_BFLOAT16:
      return with_layout_of<__nv_bfloat16>(width, matrices, launch);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dit_moe
