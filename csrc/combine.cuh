// The combine: a token's rows, weighted and added up, with an addend.
#pragma once

#include "common.cuh"

namespace dit_moe {

// Rows sorted by expert, and what makes tokens of them.
struct RoutedRows {
  const float* weights;        // (T, K), or null: ones
  const void* addend;          // (T, width), or null
  const int32_t* slot_to_row;  // (T * K,)
  unsigned top_k;
};

constexpr int kChoices = 2;  // rows of a token that a lane has in flight together

// Words column, column + lanes, ... of a token, kCount of them; `valid(c)` says which are there. y: (N, words). Sums
// are fp32, in the order of k, the addend last.
template <typename L, int kCount, typename Valid>
__device__ __forceinline__ void combine_words(const typename L::Word* __restrict__ y, const RoutedRows& routed,
                                              int64_t token, unsigned words, unsigned column, unsigned lanes,
                                              const Valid& valid, typename L::Word (&result)[kCount]) {
  using Word = typename L::Word;
  const int64_t first_slot = token * routed.top_k;
  const Word* addend = static_cast<const Word*>(routed.addend);
  float sum[kCount][L::kPack] = {};
  Word start[kCount];
  if (addend != nullptr) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      if (valid(c)) start[c] = load_once(addend + token * words + column + c * lanes);
    }
  }
  for (unsigned k = 0; k < routed.top_k; k += kChoices) {
    int32_t row[kChoices];
    float weight[kChoices];
    Word word[kChoices][kCount];
#pragma unroll
    for (int j = 0; j < kChoices; ++j) {
      row[j] = k + j < routed.top_k ? routed.slot_to_row[first_slot + k + j] : -1;
      weight[j] = row[j] >= 0 && routed.weights != nullptr ? routed.weights[first_slot + k + j] : 1.0f;
    }
#pragma unroll
    for (int j = 0; j < kChoices; ++j) {
      const Word* source = y + static_cast<int64_t>(row[j]) * words + column;
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        if (row[j] >= 0 && valid(c)) word[j][c] = load_once(source + c * lanes);
      }
    }
#pragma unroll
    for (int j = 0; j < kChoices; ++j) {
      if (row[j] < 0) continue;
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        float value[L::kPack];
        unpack<L>(word[j][c], value);
#pragma unroll
        for (int i = 0; i < L::kPack; ++i) sum[c][i] += weight[j] * value[i];
      }
    }
  }
  if (addend != nullptr) {  // last, so that its load has the whole loop to come
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      float value[L::kPack];
      unpack<L>(start[c], value);
#pragma unroll
      for (int i = 0; i < L::kPack; ++i) sum[c][i] += value[i];
    }
  }
#pragma unroll
  for (int c = 0; c < kCount; ++c) result[c] = pack<L>(sum[c]);
}

// A Row (norm_rows.cuh) of the combined tokens.
template <typename L, int kWords>
class CombinedRow {
 public:
  using Word = typename L::Word;
  __device__ __forceinline__ void load(const Word* y, const RoutedRows& routed, int64_t token, unsigned words) {
    constexpr int kBatch = kWords % 3 == 0 ? 3 : kWords;  // more, and the sums take most of the registers
    static_assert(kWords % kBatch == 0, "whole batches");
    const unsigned lanes = blockDim.x;
#pragma unroll
    for (int first = 0; first < kWords; first += kBatch) {
      const unsigned column = threadIdx.x + first * lanes;
      Word batch[kBatch];
      combine_words<L>(
          y, routed, token, words, column, lanes, [&](int c) { return column + c * lanes < words; }, batch);
#pragma unroll
      for (int c = 0; c < kBatch; ++c) words_[first + c] = batch[c];
    }
  }
  __device__ __forceinline__ Word at(int i, unsigned) const { return words_[i]; }

 private:
  Word words_[kWords];
};

template <typename L>
class CombinedRow<L, 0> {
 public:
  using Word = typename L::Word;
  __device__ __forceinline__ void load(const Word* y, const RoutedRows& routed, int64_t token, unsigned words) {
    y_ = y, routed_ = &routed, token_ = token, words_ = words;
  }
  __device__ __forceinline__ Word at(int, unsigned column) const {
    Word word[1];
    combine_words<L>(y_, *routed_, token_, words_, column, 0, [](int) { return true; }, word);
    return word[0];
  }

 private:
  const Word* y_;
  const RoutedRows* routed_;
  int64_t token_;
  unsigned words_;
};

}  // namespace dit_moe
