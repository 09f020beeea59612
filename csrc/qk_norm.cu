// LayerNorm of every head's query and key, and its gradients; see launch.h.
//
// Four lanes, or eight of fp32, take a head's row, 32 columns of it with a word each. Queries and keys are the two rows
// of the grid.
#include "common.cuh"

namespace dit_moe {
namespace {

constexpr unsigned kBlock = 128;
constexpr int kColumns = 32;  // of a row that its lanes cover with a word each
constexpr int kMaxWidth = 128;

// Rows that a group of lanes has in flight together, forward: as many as registers allow.
template <int kWords>
constexpr int kRowsInFlight = kWords > 3 ? 1 : 2;

// Of queries or of keys. Strides are in words.
struct Side {
  const void *x, *weight, *bias, *dout;
  void* out;  // backward: the gradient for x
  int64_t token_stride, head_stride;
};

struct Arguments {
  Side sides[2];
  float* partials;  // (blocks, 2, 2, W), backward
  unsigned num_rows, heads, words;
  float width, eps;
};

template <typename T>
using HeadLayout = Layout<T, kWideBytes / sizeof(T)>;

// The words of a row that belong to this lane, kWords at most, as fp32; what is beyond the row is 0.
template <typename L, int kWords>
struct HeadLane {
  static constexpr int kPack = L::kPack;
  static constexpr unsigned kLanes = kColumns / kPack;
  using Word = typename L::Word;
  using Values = float[kWords][kPack];

  template <typename Visit>
  static __device__ __forceinline__ void each(unsigned words, const Visit& visit) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const unsigned column = threadIdx.x + i * kLanes;
      if (column < words) visit(i, column);
    }
  }

  static __device__ __forceinline__ void load(const Word* row, unsigned words, Word (&loaded)[kWords]) {
    each(words, [&](int i, unsigned column) { loaded[i] = load_once(row + column); });
  }

  // As elements of another dtype, which other rows read too.
  template <typename T>
  static __device__ __forceinline__ void load_shared(const void* row, unsigned words, Values& values) {
    using Part = Layout<T, sizeof(T) == 4 ? 4 : kPack>;
    constexpr int kParts = kPack / Part::kPack;
    each(words, [&](int i, unsigned column) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        float part[Part::kPack];
        unpack<Part>(load_shared_row(static_cast<const typename Part::Word*>(row) + column * kParts + p), part);
#pragma unroll
        for (int k = 0; k < Part::kPack; ++k) values[i][p * Part::kPack + k] = part[k];
      }
    });
  }

  static __device__ __forceinline__ float sum(const Values& values) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
#pragma unroll
      for (int k = 0; k < kPack; ++k) total += values[i][k];
    }
    return group_sum(total, kLanes);
  }

  // Each value less the row's mean, over its standard deviation, whose inverse is returned.
  static __device__ __forceinline__ float normalise(const Word (&loaded)[kWords], const Arguments& a, Values& values) {
    each(a.words, [&](int i, unsigned) { unpack<L>(loaded[i], values[i]); });
    const float mean = sum(values) / a.width;
    float squares = 0.0f;
    each(a.words, [&](int i, unsigned) {
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        values[i][k] -= mean;
        squares += values[i][k] * values[i][k];
      }
    });
    const float rstd = rsqrtf(group_sum(squares, kLanes) / a.width + a.eps);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
#pragma unroll
      for (int k = 0; k < kPack; ++k) values[i][k] *= rstd;
    }
    return rstd;
  }
};

template <typename Word>
__device__ __forceinline__ const Word* row_of(const Side& side, unsigned row, unsigned heads) {
  const unsigned token = row / heads, head = row - token * heads;
  return static_cast<const Word*>(side.x) + token * side.token_stride + head * side.head_stride;
}

template <typename T, typename Weight, int kWords>
__global__ void __launch_bounds__(kBlock) qk_norm_kernel(const Arguments a) {
  using L = HeadLayout<T>;
  using Lane = HeadLane<L, kWords>;
  using Word = typename L::Word;
  constexpr int kRows = kRowsInFlight<kWords>;
  const Side& side = a.sides[blockIdx.y];
  const unsigned first = blockIdx.x * blockDim.y * kRows + threadIdx.y;
  Word loaded[kRows][kWords];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const unsigned row = first + r * blockDim.y;
    if (row < a.num_rows) Lane::load(row_of<Word>(side, row, a.heads), a.words, loaded[r]);
  }
  typename Lane::Values weight = {}, bias = {};
  Lane::template load_shared<Weight>(side.weight, a.words, weight);
  Lane::template load_shared<Weight>(side.bias, a.words, bias);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const unsigned row = first + r * blockDim.y;
    if (row >= a.num_rows) return;
    typename Lane::Values values = {};
    Lane::normalise(loaded[r], a, values);
    Word* out = static_cast<Word*>(side.out) + static_cast<int64_t>(row) * a.words;
    Lane::each(a.words, [&](int i, unsigned column) {
#pragma unroll
      for (int k = 0; k < L::kPack; ++k) values[i][k] = values[i][k] * weight[i][k] + bias[i][k];
      store(out + column, pack<L>(values[i]));
    });
  }
}

// Adds up the lanes' sums over all rows' groups of the block, in a fixed order, into `partial` (W,).
template <typename Lane, int kWords>
__device__ __forceinline__ void store_block_sums(const float (&sums)[kWords][Lane::kPack], unsigned words,
                                                 float* __restrict__ partial) {
  constexpr unsigned kWarps = kBlock / kWarp;
  __shared__ float warp_sums[kWarps][kMaxWidth];
  const unsigned thread = threadIdx.y * Lane::kLanes + threadIdx.x;
  const bool first_group = thread % kWarp < Lane::kLanes;
  const unsigned width = words * Lane::kPack;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
#pragma unroll
    for (int k = 0; k < Lane::kPack; ++k) {
      float sum = sums[i][k];
#pragma unroll
      for (unsigned distance = Lane::kLanes; distance < kWarp; distance *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      }
      const unsigned column = (threadIdx.x + i * Lane::kLanes) * Lane::kPack + k;
      if (first_group && column < width) warp_sums[thread / kWarp][column] = sum;
    }
  }
  __syncthreads();
  for (unsigned column = thread; column < width; column += kBlock) {
    float sum = 0.0f;
#pragma unroll
    for (unsigned warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp][column];
    partial[column] = sum;
  }
  __syncthreads();  // before the next sums take the place of these
}

template <typename T, typename Weight, int kWords>
__global__ void __launch_bounds__(kBlock) qk_norm_backward_kernel(const Arguments a) {
  using L = HeadLayout<T>;
  using Lane = HeadLane<L, kWords>;
  using Word = typename L::Word;
  const Side& side = a.sides[blockIdx.y];
  typename Lane::Values weight = {}, dweight = {}, dbias = {};
  Lane::template load_shared<Weight>(side.weight, a.words, weight);
  for (unsigned row = blockIdx.x * blockDim.y + threadIdx.y; row < a.num_rows; row += gridDim.x * blockDim.y) {
    const int64_t first = static_cast<int64_t>(row) * a.words;
    Word loaded[kWords], dout_loaded[kWords];
    Lane::load(row_of<Word>(side, row, a.heads), a.words, loaded);
    Lane::load(static_cast<const Word*>(side.dout) + first, a.words, dout_loaded);
    typename Lane::Values normed = {}, grad = {};
    const float rstd = Lane::normalise(loaded, a, normed);
    float dots = 0.0f;
    Lane::each(a.words, [&](int i, unsigned) {
      unpack<L>(dout_loaded[i], grad[i]);
#pragma unroll
      for (int k = 0; k < L::kPack; ++k) {
        dweight[i][k] += grad[i][k] * normed[i][k];
        dbias[i][k] += grad[i][k];
        grad[i][k] *= weight[i][k];
        dots += grad[i][k] * normed[i][k];
      }
    });
    const float mean_grad = Lane::sum(grad) / a.width;
    const float mean_dot = group_sum(dots, Lane::kLanes) / a.width;
    Word* dx = static_cast<Word*>(side.out) + first;
    Lane::each(a.words, [&](int i, unsigned column) {
#pragma unroll
      for (int k = 0; k < L::kPack; ++k) grad[i][k] = (grad[i][k] - mean_grad - normed[i][k] * mean_dot) * rstd;
      store(dx + column, pack<L>(grad[i]));
    });
  }
  const unsigned width = a.words * L::kPack;
  float* partial = a.partials + (static_cast<int64_t>(blockIdx.x) * 2 + blockIdx.y) * 2 * width;
  store_block_sums<Lane>(dweight, a.words, partial);
  store_block_sums<Lane>(dbias, a.words, partial + width);
}

// Calls launch(T{}, Weight{}, integral_constant<kWords>{}), a.words being set and strides being in words; refuses what
// is not whole words.
template <typename T, typename Weight, typename Launch>
cudaError_t with_types(Arguments& a, int64_t width, const Launch& launch) {
  constexpr int kPack = HeadLayout<T>::kPack;
  for (Side& side : a.sides) {
    for (const void* matrix : {side.x, side.weight, side.bias, side.dout, static_cast<const void*>(side.out)}) {
      if (reinterpret_cast<uintptr_t>(matrix) % kWideBytes != 0) return cudaErrorInvalidValue;
    }
    for (int64_t* stride : {&side.token_stride, &side.head_stride}) {
      if (*stride % kPack != 0) return cudaErrorInvalidValue;
      *stride /= kPack;
    }
  }
  a.words = static_cast<unsigned>(width / kPack);
  if (width <= 3 * kColumns) return launch(T{}, Weight{}, std::integral_constant<int, 3>{});
  return launch(T{}, Weight{}, std::integral_constant<int, 4>{});
}

template <typename Launch>
cudaError_t dispatch(Arguments& a, int64_t num_tokens, int64_t heads, int64_t width, double eps, DitMoeDtype dtype,
                     DitMoeDtype weight_dtype, const Launch& launch) {
  if (!fits_in_31_bits(num_tokens) || !fits_in_31_bits(heads) || !fits_in_31_bits(num_tokens * heads)) {
    return cudaErrorInvalidValue;
  }
  if (width < 0 || width > kMaxWidth || width % 8 != 0) return cudaErrorInvalidValue;
  a.num_rows = static_cast<unsigned>(num_tokens * heads), a.heads = static_cast<unsigned>(heads);
  a.width = static_cast<float>(width), a.eps = static_cast<float>(eps);
  const bool fp32_weight = weight_dtype == DIT_MOE_FLOAT32;
  if (!fp32_weight && weight_dtype != dtype) return cudaErrorInvalidValue;
  switch (dtype) {
    case DIT_MOE_FLOAT32:
      return with_types<float, float>(a, width, launch);
    case DIT_MOE_FLOAT16:
      return fp32_weight ? with_types<__half, float>(a, width, launch) : with_types<__half, __half>(a, width, launch);
    case DIT_MOE_BFLOAT16:
      return fp32_weight ? with_types<__nv_bfloat16, float>(a, width, launch)
                         : with_types<__nv_bfloat16, __nv_bfloat16>(a, width, launch);
  }
  return cudaErrorInvalidValue;
}

// Lanes of a row by rows of a block.
template <typename T>
dim3 block_of() {
  constexpr unsigned lanes = kColumns / HeadLayout<T>::kPack;
  return dim3(lanes, kBlock / lanes);
}

}  // namespace
}  // namespace dit_moe

extern "C" cudaError_t dit_moe_qk_norm(const void* q, const void* k, const void* q_weight, const void* q_bias,
                                       const void* k_weight, const void* k_bias, void* q_out, void* k_out,
                                       int64_t num_tokens, int64_t heads, int64_t width, int64_t q_stride,
                                       int64_t q_head_stride, int64_t k_stride, int64_t k_head_stride, double eps,
                                       DitMoeDtype dtype, DitMoeDtype weight_dtype, cudaStream_t stream) {
  using namespace dit_moe;
  Arguments a = {};
  a.sides[0] = {q, q_weight, q_bias, nullptr, q_out, q_stride, q_head_stride};
  a.sides[1] = {k, k_weight, k_bias, nullptr, k_out, k_stride, k_head_stride};
  return dispatch(a, num_tokens, heads, width, eps, dtype, weight_dtype, [&](auto x, auto weight, auto count) {
    if (a.num_rows == 0 || a.words == 0) return cudaSuccess;
    const dim3 threads = block_of<decltype(x)>();
    const dim3 blocks((a.num_rows - 1) / (threads.y * kRowsInFlight<count.value>)+1, 2);
    qk_norm_kernel<decltype(x), decltype(weight), count.value><<<blocks, threads, 0, stream>>>(a);
    return cudaGetLastError();
  });
}

extern "C" cudaError_t dit_moe_qk_norm_backward(const void* dq_out, const void* dk_out, const void* q, const void* k,
                                                const void* q_weight, const void* k_weight, void* dq, void* dk,
                                                float* partials, int64_t num_tokens, int64_t heads, int64_t width,
                                                int64_t q_stride, int64_t q_head_stride, int64_t k_stride,
                                                int64_t k_head_stride, int64_t num_partials, double eps,
                                                DitMoeDtype dtype, DitMoeDtype weight_dtype, cudaStream_t stream) {
  using namespace dit_moe;
  if (!fits_in_31_bits(num_partials)) return cudaErrorInvalidValue;
  Arguments a = {};
  a.sides[0] = {q, q_weight, nullptr, dq_out, dq, q_stride, q_head_stride};
  a.sides[1] = {k, k_weight, nullptr, dk_out, dk, k_stride, k_head_stride};
  a.partials = partials;
  return dispatch(a, num_tokens, heads, width, eps, dtype, weight_dtype, [&](auto x, auto weight, auto count) {
    if (num_partials == 0 || a.words == 0) return cudaSuccess;
    const dim3 threads = block_of<decltype(x)>(), blocks(static_cast<unsigned>(num_partials), 2);
    qk_norm_backward_kernel<decltype(x), decltype(weight), count.value><<<blocks, threads, 0, stream>>>(a);
    return cudaGetLastError();
  });
}
