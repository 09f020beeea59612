// permute (dispatch): copy each token to its rows; see launch.h.
#include "common.cuh"
#include "early_start.cuh"

namespace dit_moe {
namespace {

constexpr int kBatch = 4;  // words of a token that a lane has in flight together

// x: (T, words), row_to_slot, slot_to_row: (N,), out: (N, words). A copy, so only the word's size matters, not the
// dtype. It goes by tokens, so that each is read once; a row that no slot owns is cleared by the group that has its
// number.
template <typename Word>
__device__ __forceinline__ void copy_token(const Word* __restrict__ x, const int32_t* __restrict__ row_to_slot,
                                           const int32_t* __restrict__ slot_to_row, Word* __restrict__ out,
                                           int64_t token, unsigned words, unsigned top_k) {
  const int64_t first_slot = token * top_k;
  for (unsigned k = 0; k < top_k; ++k) {
    if (row_to_slot[first_slot + k] < 0) store_zeros(out + (first_slot + k) * words, words);
  }
  const Word* source = x + token * words;
  const unsigned lanes = blockDim.x;
  walk_row<kBatch>(words, [&](auto count, unsigned column) {
    Word word[count.value];
#pragma unroll
    for (int c = 0; c < count.value; ++c) word[c] = load_once(source + column + c * lanes);
    for (unsigned k = 0; k < top_k; ++k) {
      const int64_t row = slot_to_row[first_slot + k];
      if (row < 0) continue;
#pragma unroll
      for (int c = 0; c < count.value; ++c) store(out + row * words + column + c * lanes, word[c]);
    }
  });
}

template <typename Word>
__global__ void __launch_bounds__(kThreads)
    permute_kernel(const Word* __restrict__ x, const int32_t* __restrict__ row_to_slot,
                   const int32_t* __restrict__ slot_to_row, Word* __restrict__ out, int64_t num_tokens, unsigned words,
                   unsigned top_k) {
  const int64_t token = group_index();
  if (token < num_tokens) copy_token(x, row_to_slot, slot_to_row, out, token, words, top_k);
  outlast_previous();
}

}  // namespace
}  // namespace dit_moe

extern "C" cudaError_t dit_moe_permute(const void* x, const int32_t* row_to_slot, const int32_t* slot_to_row, void* out,
                                       int64_t num_tokens, int64_t width, int64_t top_k, int32_t beside,
                                       DitMoeDtype dtype, cudaStream_t stream) {
  using namespace dit_moe;
  if (!valid_sizes(num_tokens, width, top_k) || !fits_in_31_bits(num_tokens * top_k)) return cudaErrorInvalidValue;
  return with_layout(dtype, width, {x, out}, [&](auto layout) {
    using L = decltype(layout);
    using Word = typename L::Word;
    const int64_t words = width / L::kPack;
    if (num_tokens == 0 || words == 0) return cudaSuccess;
    const auto [blocks, threads] = geometry(num_tokens, words);
    return launch_kernel(permute_kernel<Word>, blocks, threads, beside != 0, stream, static_cast<const Word*>(x),
                         row_to_slot, slot_to_row, static_cast<Word*>(out), num_tokens, words, top_k);
  });
}
