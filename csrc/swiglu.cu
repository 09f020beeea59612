// SwiGLU of packed pre-activations and its gradient, element by element; see launch.h.
#include "common.cuh"

namespace dit_moe {
namespace {

constexpr int kBatch = 2;  // words of each half that a lane has in flight together

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// h: (N, 2 * words), gate words first, out: (N, words).
template <typename L>
__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(const typename L::Word* __restrict__ h, typename L::Word* __restrict__ out, int64_t num_rows,
                  unsigned words) {
  using Word = typename L::Word;
  const int64_t row = group_index();
  if (row >= num_rows) return;
  const Word* gate_row = h + 2 * row * words;
  const Word* up_row = gate_row + words;
  const unsigned lanes = blockDim.x;
  walk_row<kBatch>(words, [&](auto count, unsigned column) {
    Word gate_word[count.value], up_word[count.value];
#pragma unroll
    for (int c = 0; c < count.value; ++c) {
      gate_word[c] = load_once(gate_row + column + c * lanes);
      up_word[c] = load_once(up_row + column + c * lanes);
    }
#pragma unroll
    for (int c = 0; c < count.value; ++c) {
      float gate[L::kPack], up[L::kPack];
      unpack<L>(gate_word[c], gate);
      unpack<L>(up_word[c], up);
#pragma unroll
      for (int i = 0; i < L::kPack; ++i) up[i] *= gate[i] * sigmoid(gate[i]);
      store(out + row * words + column + c * lanes, pack<L>(up));
    }
  });
}

// dout: (N, words), h and dh: (N, 2 * words).
template <typename L>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(const typename L::Word* __restrict__ dout, const typename L::Word* __restrict__ h,
                           typename L::Word* __restrict__ dh, int64_t num_rows, unsigned words) {
  using Word = typename L::Word;
  const int64_t row = group_index();
  if (row >= num_rows) return;
  const Word* dout_row = dout + row * words;
  const Word* gate_row = h + 2 * row * words;
  Word* dgate_row = dh + 2 * row * words;
  const unsigned lanes = blockDim.x;
  walk_row<kBatch>(words, [&](auto count, unsigned column) {
    Word dout_word[count.value], gate_word[count.value], up_word[count.value];
#pragma unroll
    for (int c = 0; c < count.value; ++c) {
      dout_word[c] = load_once(dout_row + column + c * lanes);
      gate_word[c] = load_once(gate_row + column + c * lanes);
      up_word[c] = load_once(gate_row + words + column + c * lanes);
    }
#pragma unroll
    for (int c = 0; c < count.value; ++c) {
      float grad[L::kPack], gate[L::kPack], up[L::kPack];
      unpack<L>(dout_word[c], grad);
      unpack<L>(gate_word[c], gate);
      unpack<L>(up_word[c], up);
#pragma unroll
      for (int i = 0; i < L::kPack; ++i) {
        const float share = sigmoid(gate[i]), silu = gate[i] * share;
        gate[i] = grad[i] * up[i] * share * (1.0f + gate[i] - silu);
        up[i] = grad[i] * silu;
      }
      store(dgate_row + column + c * lanes, pack<L>(gate));
      store(dgate_row + words + column + c * lanes, pack<L>(up));
    }
  });
}

bool valid(int64_t num_rows, int64_t width) { return fits_in_31_bits(num_rows) && fits_in_31_bits(width); }

}  // namespace
}  // namespace dit_moe

extern "C" cudaError_t dit_moe_swiglu(const void* h, void* out, int64_t num_rows, int64_t width, DitMoeDtype dtype,
                                      cudaStream_t stream) {
  using namespace dit_moe;
  if (!valid(num_rows, width)) return cudaErrorInvalidValue;
  return with_layout(dtype, width, {h, out}, [&](auto layout) {
    using L = decltype(layout);
    using Word = typename L::Word;
    const int64_t words = width / L::kPack;
    if (num_rows == 0 || words == 0) return cudaSuccess;
    const auto [blocks, threads] = geometry(num_rows, words);
    swiglu_kernel<L><<<blocks, threads, 0, stream>>>(static_cast<const Word*>(h), static_cast<Word*>(out), num_rows,
                                                     static_cast<unsigned>(words));
    return cudaGetLastError();
  });
}

extern "C" cudaError_t dit_moe_swiglu_backward(const void* dout, const void* h, void* dh, int64_t num_rows,
                                               int64_t width, DitMoeDtype dtype, cudaStream_t stream) {
  using namespace dit_moe;
  if (!valid(num_rows, width)) return cudaErrorInvalidValue;
  return with_layout(dtype, width, {dout, h, dh}, [&](auto layout) {
    using L = decltype(layout);
    using Word = typename L::Word;
    const int64_t words = width / L::kPack;
    if (num_rows == 0 || words == 0) return cudaSuccess;
    const auto [blocks, threads] = geometry(num_rows, words);
    swiglu_backward_kernel<L><<<blocks, threads, 0, stream>>>(static_cast<const Word*>(dout),
                                                              static_cast<const Word*>(h), static_cast<Word*>(dh),
                                                              num_rows, static_cast<unsigned>(words));
    return cudaGetLastError();
  });
}
