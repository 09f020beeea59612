// unpermute (combine) and the gradients of its weighted form; see launch.h.
#include "combine.cuh"

namespace dit_moe {
namespace {

constexpr int kBatch = 2;  // words of a row that a lane has in flight together, in unpermute times rows of a token

// y: (N, words), out: (T, words).
template <typename L>
__global__ void __launch_bounds__(kThreads)
    unpermute_kernel(const typename L::Word* __restrict__ y, const RoutedRows routed,
                     typename L::Word* __restrict__ out, int64_t num_tokens, unsigned words) {
  const int64_t token = group_index();
  if (token >= num_tokens) return;
  typename L::Word* target = out + token * words;
  const unsigned lanes = blockDim.x;
  walk_row<kBatch>(words, [&](auto count, unsigned column) {
    typename L::Word result[count.value];
    combine_words<L>(y, routed, token, words, column, lanes, [](int) { return true; }, result);
#pragma unroll
    for (int c = 0; c < count.value; ++c) store(target + column + c * lanes, result[c]);
  });
}

// dout: (T, words), y: (N, words), weights: (T, K), row_to_slot: (N,), dy: (N, words), dweights: (T, K).
template <typename L>
__global__ void __launch_bounds__(kThreads)
    unpermute_backward_kernel(const typename L::Word* __restrict__ dout, const typename L::Word* __restrict__ y,
                              const float* __restrict__ weights, const int32_t* __restrict__ row_to_slot,
                              typename L::Word* __restrict__ dy, float* __restrict__ dweights, int64_t num_rows,
                              unsigned words, unsigned top_k) {
  using Word = typename L::Word;
  const int64_t row = group_index();
  if (row >= num_rows) return;
  const int32_t slot = row_to_slot[row];
  Word* dy_row = dy + row * words;
  if (slot < 0) {
    store_zeros(dy_row, words);
    return;
  }
  const float weight = weights[slot];
  const Word* dout_row = dout + static_cast<int64_t>(static_cast<unsigned>(slot) / top_k) * words;
  const Word* y_row = y + row * words;
  const unsigned lanes = blockDim.x;
  float dot = 0.0f;
  walk_row<kBatch>(words, [&](auto count, unsigned column) {
    Word dout_word[count.value], y_word[count.value];
#pragma unroll
    for (int c = 0; c < count.value; ++c) {
      dout_word[c] = load_shared_row(dout_row + column + c * lanes);
      y_word[c] = load_once(y_row + column + c * lanes);
    }
#pragma unroll
    for (int c = 0; c < count.value; ++c) {
      float value[L::kPack], y_value[L::kPack];
      unpack<L>(dout_word[c], value);
      unpack<L>(y_word[c], y_value);
#pragma unroll
      for (int i = 0; i < L::kPack; ++i) {
        dot += value[i] * y_value[i];
        value[i] *= weight;
      }
      store(dy_row + column + c * lanes, pack<L>(value));
    }
  });
  dot = group_sum(dot);
  if (threadIdx.x == 0) dweights[slot] = dot;
}

}  // namespace
}  // namespace dit_moe

extern "C" cudaError_t dit_moe_unpermute(const void* y, const float* weights, const void* addend,
                                         const int32_t* slot_to_row, void* out, int64_t num_tokens, int64_t width,
                                         int64_t top_k, DitMoeDtype dtype, cudaStream_t stream) {
  using namespace dit_moe;
  if (!valid_sizes(num_tokens, width, top_k) || !fits_in_31_bits(num_tokens * top_k)) return cudaErrorInvalidValue;
  return with_layout(dtype, width, {y, addend, out}, [&](auto layout) {
    using L = decltype(layout);
    using Word = typename L::Word;
    const int64_t words = width / L::kPack;
    if (num_tokens == 0 || words == 0) return cudaSuccess;
    const auto [blocks, threads] = geometry(num_tokens, words);
    unpermute_kernel<L><<<blocks, threads, 0, stream>>>(
        static_cast<const Word*>(y), RoutedRows{weights, addend, slot_to_row, static_cast<unsigned>(top_k)},
        static_cast<Word*>(out), num_tokens, static_cast<unsigned>(words));
    return cudaGetLastError();
  });
}

extern "C" cudaError_t dit_moe_unpermute_backward(const void* dout, const void* y, const float* weights,
                                                  const int32_t* row_to_slot, void* dy, float* dweights,
                                                  int64_t num_rows, int64_t width, int64_t top_k, DitMoeDtype dtype,
                                                  cudaStream_t stream) {
  using namespace dit_moe;
  if (!valid_sizes(num_rows, width, top_k)) return cudaErrorInvalidValue;
  return with_layout(dtype, width, {dout, y, dy}, [&](auto layout) {
    using L = decltype(layout);
    using Word = typename L::Word;
    const int64_t words = width / L::kPack;
    if (num_rows == 0 || words == 0) return cudaSuccess;
    const auto [blocks, threads] = geometry(num_rows, words);
    unpermute_backward_kernel<L><<<blocks, threads, 0, stream>>>(
        static_cast<const Word*>(dout), static_cast<const Word*>(y), weights, row_to_slot, static_cast<Word*>(dy),
        dweights, num_rows, static_cast<unsigned>(words), static_cast<unsigned>(top_k));
    return cudaGetLastError();
  });
}
