// permute (dispatch): gather each row's token; see launch.h.
#include "common.cuh"

namespace dit_moe {
namespace {

constexpr int kBatch = 4;  // words of a row that a lane has in flight together

// x: (T, words), row_to_slot: (N,), out: (N, words). A copy, so only the word's size matters, not the dtype.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    permute_kernel(const Word* __restrict__ x, const int32_t* __restrict__ row_to_slot, Word* __restrict__ out,
                   int64_t num_rows, unsigned words, unsigned top_k) {
  const int64_t row = group_index();
  if (row >= num_rows) return;
  const int32_t slot = row_to_slot[row];
  Word* target = out + row * words;
  if (slot < 0) {
    store_zeros(target, words);
    return;
  }
  const Word* source = x + static_cast<int64_t>(static_cast<unsigned>(slot) / top_k) * words;
  const unsigned lanes = blockDim.x;
  walk_row<kBatch>(words, [&](auto count, unsigned column) {
    Word word[count.value];
#pragma unroll
    for (int c = 0; c < count.value; ++c) word[c] = load_shared_row(source + column + c * lanes);
#pragma unroll
    for (int c = 0; c < count.value; ++c) store(target + column + c * lanes, word[c]);
  });
}

}  // namespace
}  // namespace dit_moe

extern "C" cudaError_t dit_moe_permute(const void* x, const int32_t* row_to_slot, void* out, int64_t num_rows,
                                       int64_t width, int64_t top_k, DitMoeDtype dtype, cudaStream_t stream) {
  using namespace dit_moe;
  if (!valid_sizes(num_rows, width, top_k)) return cudaErrorInvalidValue;
  return with_layout(dtype, width, {x, out}, [&](auto layout) {
    using L = decltype(layout);
    using Word = typename L::Word;
    const int64_t words = width / L::kPack;
    if (num_rows == 0 || words == 0) return cudaSuccess;
    const auto [blocks, threads] = geometry(num_rows, words);
    permute_kernel<Word><<<blocks, threads, 0, stream>>>(static_cast<const Word*>(x), row_to_slot,
                                                         static_cast<Word*>(out), num_rows,
                                                         static_cast<unsigned>(words), static_cast<unsigned>(top_k));
    return cudaGetLastError();
  });
}
