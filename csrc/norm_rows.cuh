// What the kernels of norm_modulate and of its gradients share: mixtures of dtypes, and rows that stay in registers.
#pragma once

#include "common.cuh"

namespace dit_moe {

// ---- mixtures of dtypes

// Words of as many columns in the residual stream and in all else: branch, images' vectors, result. The stream's
// elements are not the smaller ones.
template <typename StreamElement, typename BranchElement, int kPackElements>
struct NormLayouts {
  static constexpr int kPack = kPackElements;
  using Stream = Layout<StreamElement, kPack>;
  using Branch = Layout<BranchElement, kPack>;
};

// A matrix whose rows are `stride` elements apart; null is a matrix that is not there.
struct Rows {
  const void* address;
  int64_t stride;
};

template <typename L>
bool in_whole_words(std::initializer_list<Rows> matrices) {
  for (const Rows& rows : matrices) {
    if (reinterpret_cast<uintptr_t>(rows.address) % L::kBytes != 0 || rows.stride % L::kPack != 0) return false;
  }
  return true;
}

template <typename Stream, typename Branch, typename Launch>
cudaError_t with_norm_layouts_of(std::initializer_list<Rows> streams, std::initializer_list<Rows> branches,
                                 const Launch& launch) {
  using Wide = NormLayouts<Stream, Branch, kWideBytes / sizeof(Stream)>;
  const bool wide = in_whole_words<typename Wide::Stream>(streams) && in_whole_words<typename Wide::Branch>(branches);
  if (wide) return launch(Wide{});
  return launch(NormLayouts<Stream, Branch, 1>{});
}

// Calls launch(NormLayouts<...>{}) with the widest words that strides and addresses allow, for one dtype throughout and
// for an fp32 stream among 16-bit numbers.
template <typename Launch>
cudaError_t with_norm_layouts(DitMoeDtype stream, DitMoeDtype branch, std::initializer_list<Rows> streams,
                              std::initializer_list<Rows> branches, const Launch& launch) {
  const auto is = [&](DitMoeDtype s, DitMoeDtype b) { return stream == s && branch == b; };
  constexpr DitMoeDtype f32 = DIT_MOE_FLOAT32, f16 = DIT_MOE_FLOAT16, bf16 = DIT_MOE_BFLOAT16;
  if (is(f32, f32)) return with_norm_layouts_of<float, float>(streams, branches, launch);
  if (is(f16, f16)) return with_norm_layouts_of<__half, __half>(streams, branches, launch);
  if (is(bf16, bf16)) return with_norm_layouts_of<__nv_bfloat16, __nv_bfloat16>(streams, branches, launch);
  if (is(f32, f16)) return with_norm_layouts_of<float, __half>(streams, branches, launch);
  if (is(f32, bf16)) return with_norm_layouts_of<float, __nv_bfloat16>(streams, branches, launch);
  return cudaErrorInvalidValue;
}

inline bool valid_norm(int64_t num_images, int64_t num_tokens, int64_t width) {
  return fits_in_31_bits(num_images) && fits_in_31_bits(num_tokens) && fits_in_31_bits(width) &&
         fits_in_31_bits(num_images * num_tokens);
}

// ---- rows

// Calls visit(i, column) for the words of a row that belong to this lane: kWords of them at most, or any number, all
// with i = 0, if kWords is 0.
template <int kWords, typename Visit>
__device__ __forceinline__ void each_word(unsigned words, const Visit& visit) {
  if constexpr (kWords > 0) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const unsigned column = threadIdx.x + i * blockDim.x;
      if (column < words) visit(i, column);
    }
  } else {
    for (unsigned column = threadIdx.x; column < words; column += blockDim.x) visit(0, column);
  }
}

// Makes the compiler forget what it knows of a word.
__device__ __forceinline__ void hide(uint4& word) {
  asm volatile("" : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w));
}
__device__ __forceinline__ void hide(uint2& word) { asm volatile("" : "+r"(word.x), "+r"(word.y)); }

// This lane's words of a row: loaded at once into registers, or, if kWords is 0, left in memory until they are asked
// for.
template <typename Word, int kWords>
class Row {
 public:
  template <typename Load>
  __device__ __forceinline__ void load(const Word* row, unsigned words, const Load& load_word) {
    each_word<kWords>(words, [&](int i, unsigned column) { words_[i] = load_word(row + column); });
  }
  __device__ __forceinline__ Word at(int i, unsigned) const { return words_[i]; }
  __device__ __forceinline__ void set(int i, const Word& word) { words_[i] = word; }
  // What was set is in memory here, too: where words stay in memory, these take the place of those loaded.
  __device__ __forceinline__ void moved_to(const Word*) {}
  // The compiler may not keep what it has made of the words before: unpacked, a row takes twice the registers.
  __device__ __forceinline__ void keep_packed() {
#pragma unroll
    for (Word& word : words_) hide(word);
  }

 private:
  Word words_[kWords];
};

template <typename Word>
class Row<Word, 0> {
 public:
  template <typename Load>
  __device__ __forceinline__ void load(const Word* row, unsigned, const Load&) {
    row_ = row;
  }
  __device__ __forceinline__ Word at(int, unsigned column) const { return row_[column]; }
  __device__ __forceinline__ void set(int, const Word&) {}
  __device__ __forceinline__ void moved_to(const Word* row) { row_ = row; }
  __device__ __forceinline__ void keep_packed() {}

 private:
  const Word* row_;
};

constexpr unsigned kNormThreads = 128;
constexpr int kWideColumns = 1536;  // of the widest rows that stay in the registers of a warp

// Calls launch(integral_constant<kWords>{}) for rows of so many words, under `geometry`.
template <int kPack, typename Launch>
cudaError_t with_words(int64_t words, const Launch& launch) {
  if constexpr (kPack > 1) {
    constexpr int wide = kWideColumns / static_cast<int>(kWarp) / kPack;
    if (words <= kWarp * kWordsPerLane) return launch(std::integral_constant<int, kWordsPerLane>{});
    if (words <= kWarp * wide) return launch(std::integral_constant<int, wide>{});
  }
  return launch(std::integral_constant<int, 0>{});
}

// The sum over a word's columns of f(i), as a chain of fp32 additions.
template <typename L, typename F>
__device__ __forceinline__ float sum_word(const typename L::Word& word, const F& f) {
  float values[L::kPack], sum = 0.0f;
  unpack<L>(word, values);
#pragma unroll
  for (int i = 0; i < L::kPack; ++i) sum += f(values[i]);
  return sum;
}

}  // namespace dit_moe
