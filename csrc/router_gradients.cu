// Gradients of the router's scores, logits = x gate^T, for x and for the gate; see launch.h.
//
// Products and sums are fp32. A thread owns a few columns, of several tokens for x and of a part of all tokens for the
// gate, whose parts are added up behind. The E numbers of a token all threads of a warp read at the same address.
#include <algorithm>

#include "early_start.cuh"
#include "router_inputs.cuh"

namespace dit_moe {
namespace {

constexpr int kBlockTokens = 16;   // whose results for x a block computes
constexpr int kTokens = 4;         // of these, which a thread has in registers together
constexpr int kChoices = 2;        // rows of a token that a thread loads together
constexpr int kColumns = 4;        // of a thread, whose sums for the gate it has in registers together
constexpr int kInFlight = 8;       // tokens of which a thread loads x together
constexpr int kChunk = 128;        // tokens whose gradients of the scores a block has in shared memory together
constexpr int kFewestTokens = 32;  // of a part
constexpr int kSlices = 8;         // of the parts, added up side by side

struct Arguments {
  const float* dlogits;        // (T, E)
  const void* x;               // (T, D)
  const void* gate;            // (E, D)
  const void* rows;            // (N, D), or null
  const int32_t* slot_to_row;  // (T * K,), -1 for none
  void* dx;                    // (T, D)
  float* parts;                // (parts, E, D): each part's sum over its tokens
  void* dgate;                 // (E, D)
  int64_t num_tokens;
  int64_t part_tokens;
  unsigned words;  // of a row of x
  int depth, num_experts, top_k, num_parts;
  bool beside;  // see launch.h
};

// Neighbouring elements as floats, in whole words of 16 bytes.
template <int kCount, typename T>
__device__ __forceinline__ void load_floats(const T* address, float (&values)[kCount]) {
  static_assert(kCount * sizeof(T) % kWideBytes == 0, "whole words");
  uint4 words[kCount * sizeof(T) / kWideBytes];
  T elements[kCount];
#pragma unroll
  for (unsigned i = 0; i < kCount * sizeof(T) / kWideBytes; ++i) {
    words[i] = __ldg(reinterpret_cast<const uint4*>(address) + i);
  }
  memcpy(elements, words, sizeof(words));
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = to_float(elements[i]);
}

// dx[t] = sum over k of the rows of t's slots + sum over e of dlogits[t, e] gate[e], in the order of k, then of e. The
// next tokens' rows come while those before are multiplied.
template <typename X, typename Gate>
__global__ void __launch_bounds__(kThreads) tokens_kernel(const Arguments arguments) {
  constexpr int kPack = kWideBytes / sizeof(X);
  using L = Layout<X, kPack>;
  using Word = typename L::Word;
  __shared__ int32_t row_of_slot[kBlockTokens * kMaxRouterExperts];  // -1 past the last token too
  __shared__ float factors[kBlockTokens * kMaxRouterExperts];
  const int num_experts = arguments.num_experts, top_k = arguments.top_k;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockTokens;
  const int count = static_cast<int>(min(arguments.num_tokens - first, static_cast<int64_t>(kBlockTokens)));
  for (int i = threadIdx.x; i < kBlockTokens * top_k; i += blockDim.x) {
    row_of_slot[i] = i < count * top_k ? __ldg(arguments.slot_to_row + first * top_k + i) : -1;
  }
  for (int i = threadIdx.x; i < kBlockTokens * num_experts; i += blockDim.x) {
    factors[i] = i < count * num_experts ? __ldg(arguments.dlogits + first * num_experts + i) : 0.0f;
  }
  __syncthreads();
  const unsigned word = blockIdx.y * blockDim.x + threadIdx.x;
  if (word >= arguments.words) return;
  const auto* gate = static_cast<const Gate*>(arguments.gate) + word * kPack;
  const auto* rows = static_cast<const Word*>(arguments.rows) + word;
  auto* dx = static_cast<Word*>(arguments.dx) + first * arguments.words + word;

  // The choices k, k + 1, ... of kTokens tokens, zeros where there is none.
  const auto fetch = [&](int token, int k, Word(&words)[kTokens][kChoices]) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int j = 0; j < kChoices; ++j) {
        const int32_t row = token < count && k + j < top_k ? row_of_slot[(token + t) * top_k + k + j] : -1;
        words[t][j] = row >= 0 ? load_once(rows + static_cast<int64_t>(row) * arguments.words) : Word{};
      }
    }
  };
  Word ahead[kTokens][kChoices];
  fetch(0, 0, ahead);
  for (int token = 0; token < count; token += kTokens) {
    float sum[kTokens][kPack] = {};
    for (int k = 0; k < top_k; k += kChoices) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
#pragma unroll
        for (int j = 0; j < kChoices; ++j) {
          float value[kPack];
          unpack<L>(ahead[t][j], value);
#pragma unroll
          for (int i = 0; i < kPack; ++i) sum[t][i] += value[i];
        }
      }
      const bool last = k + kChoices >= top_k;
      fetch(last ? token + kTokens : token, last ? 0 : k + kChoices, ahead);
    }
#pragma unroll 4
    for (int e = 0; e < num_experts; ++e) {
      float weight[kPack];
      load_floats(gate + static_cast<int64_t>(e) * arguments.depth, weight);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float factor = factors[(token + t) * num_experts + e];
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[t][i] = fmaf(factor, weight[i], sum[t][i]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (token + t < count) store(dx + (token + t) * static_cast<int64_t>(arguments.words), pack<L>(sum[t]));
    }
  }
  outlast_previous();
}

// parts[p, e] = sum over the tokens t of part p of dlogits[t, e] x[t], in the order of t, for kExperts experts. A
// thread has kColumns of the columns.
template <typename X, int kExperts>
__global__ void __launch_bounds__(kThreads) parts_kernel(const Arguments arguments) {
  __shared__ float4 factors[kChunk][kExperts / 4];  // zeros where there is no expert
  const unsigned quad = blockIdx.x * blockDim.x + threadIdx.x;
  const bool valid = quad * kColumns < static_cast<unsigned>(arguments.depth);
  const int first_expert = blockIdx.z * kExperts, experts = min(arguments.num_experts - first_expert, kExperts);
  const int64_t begin = blockIdx.y * arguments.part_tokens;
  const int64_t end = min(begin + arguments.part_tokens, arguments.num_tokens);
  using L = Layout<X, kColumns>;
  const auto* x = static_cast<const typename L::Word*>(arguments.x) + (valid ? quad : 0);
  typename L::Word ahead[kInFlight];  // the next tokens'; past the last token the last one again, which is not added
  const auto fetch = [&](int64_t token) {
#pragma unroll
    for (int t = 0; t < kInFlight; ++t) ahead[t] = __ldg(x + min(token + t, end - 1) * (arguments.depth / kColumns));
  };
  fetch(begin);
  float sum[kExperts][kColumns] = {};
  for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
    const int count = static_cast<int>(min(end - chunk, static_cast<int64_t>(kChunk)));
    __syncthreads();
    for (int i = threadIdx.x; i < count * kExperts; i += blockDim.x) {
      const int token = i / kExperts, expert = i % kExperts;
      const float* dlogits = arguments.dlogits + (chunk + token) * arguments.num_experts + first_expert;
      reinterpret_cast<float*>(factors[token])[expert] = expert < experts ? __ldg(dlogits + expert) : 0.0f;
    }
    __syncthreads();
    for (int first = 0; first < count; first += kInFlight) {
      float value[kInFlight][kColumns];
#pragma unroll
      for (int t = 0; t < kInFlight; ++t) unpack<L>(ahead[t], value[t]);
      fetch(chunk + first + kInFlight);
#pragma unroll
      for (int t = 0; t < kInFlight; ++t) {
        if (first + t >= count) break;
#pragma unroll
        for (int group = 0; group < kExperts / 4; ++group) {
          const float4 word = factors[first + t][group];
          const float factor[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
          for (int i = 0; i < 4 * kColumns; ++i) {
            float& target = sum[group * 4 + i / kColumns][i % kColumns];
            target = fmaf(factor[i / kColumns], value[t][i % kColumns], target);
          }
        }
      }
    }
  }
  outlast_previous();
  if (!valid) return;
  const int64_t row = static_cast<int64_t>(blockIdx.y) * arguments.num_experts + first_expert;
  float* out = arguments.parts + row * arguments.depth + quad * kColumns;
#pragma unroll
  for (int e = 0; e < kExperts; ++e) {
    if (e >= experts) break;
    *reinterpret_cast<float4*>(out + e * static_cast<int64_t>(arguments.depth)) = {sum[e][0], sum[e][1], sum[e][2],
                                                                                   sum[e][3]};
  }
}

// dgate = the sum of the parts. Each of a block's rows of threads adds up every kSlices-th part, in their order, and
// the first then the rows' sums.
template <typename Gate>
__global__ void __launch_bounds__(kWarp* kSlices) gate_kernel(const Arguments arguments) {
  __shared__ float sums[kSlices][kWarp];
  const int64_t size = static_cast<int64_t>(arguments.num_experts) * arguments.depth;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  float sum = 0.0f;
  if (place < size) {
#pragma unroll 8
    for (int part = threadIdx.y; part < arguments.num_parts; part += kSlices) {
      sum += __ldg(arguments.parts + part * size + place);
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || place >= size) return;
  for (int slice = 1; slice < kSlices; ++slice) sum += sums[slice][threadIdx.x];
  static_cast<Gate*>(arguments.dgate)[place] = static_cast<Gate>(sum);
}

// Blocks of threads, each with as many of `units` of a row.
struct Columns {
  unsigned blocks, threads;
  explicit Columns(unsigned units) {
    blocks = (units + kThreads - 1) / kThreads;
    threads = ((units + blocks - 1) / blocks + kWarp - 1) / kWarp * kWarp;
  }
};

// Sets part_tokens and num_parts.
template <typename X>
cudaError_t launch_parts(Arguments& arguments, cudaStream_t stream) {
  arguments.num_parts = 0;
  if (arguments.num_tokens == 0) return cudaSuccess;
  const int64_t fewest = std::max<int64_t>(ceil_div(arguments.num_tokens, DIT_MOE_ROUTER_PARTS), kFewestTokens);
  arguments.part_tokens = ceil_div(fewest, kInFlight) * kInFlight;
  arguments.num_parts = static_cast<int>(ceil_div(arguments.num_tokens, arguments.part_tokens));
  const Columns columns(arguments.depth / kColumns);
  const bool few = arguments.num_experts <= 8;
  const dim3 grid(columns.blocks, static_cast<unsigned>(arguments.num_parts),
                  static_cast<unsigned>(ceil_div(arguments.num_experts, few ? 8 : 16)));
  const auto kernel = few ? parts_kernel<X, 8> : parts_kernel<X, 16>;
  return launch_kernel(kernel, grid, columns.threads, arguments.beside, stream, arguments);
}

template <typename X, typename Gate>
cudaError_t launch(Arguments arguments, cudaStream_t stream) {
  arguments.words = static_cast<unsigned>(arguments.depth / (kWideBytes / static_cast<int64_t>(sizeof(X))));
  if (arguments.dx != nullptr && arguments.num_tokens > 0) {
    const Columns columns(arguments.words);
    const dim3 grid(static_cast<unsigned>(ceil_div(arguments.num_tokens, kBlockTokens)), columns.blocks);
    const cudaError_t error =
        launch_kernel(tokens_kernel<X, Gate>, grid, columns.threads, arguments.beside, stream, arguments);
    if (error != cudaSuccess || arguments.dgate == nullptr) return error;
    arguments.beside = false;  // the next one's predecessor is this one
  }
  if (arguments.dgate == nullptr) return cudaSuccess;
  if (const cudaError_t error = launch_parts<X>(arguments, stream); error != cudaSuccess) return error;
  const int64_t size = static_cast<int64_t>(arguments.num_experts) * arguments.depth;
  gate_kernel<Gate><<<static_cast<unsigned>(ceil_div(size, kWarp)), dim3(kWarp, kSlices), 0, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace
}  // namespace dit_moe

extern "C" cudaError_t dit_moe_router_gradients(const float* dlogits, const void* x, const void* gate, const void* rows,
                                                const int32_t* slot_to_row, void* dx, void* dgate, float* parts,
                                                int64_t num_tokens, int64_t depth, int64_t num_experts, int64_t top_k,
                                                int32_t beside, DitMoeDtype dtype, DitMoeDtype gate_dtype,
                                                cudaStream_t stream) {
  using namespace dit_moe;
  constexpr int64_t max_depth = 1 << 26;  // a grid's second dimension
  if (!valid_router(x, gate, num_tokens, depth, num_experts, dtype, gate_dtype) || depth > max_depth) {
    return cudaErrorInvalidValue;
  }
  if (rows != nullptr &&
      (slot_to_row == nullptr || top_k < 1 || top_k > num_experts || !fits_in_31_bits(num_tokens * top_k))) {
    return cudaErrorInvalidValue;
  }
  for (const void* matrix : {rows, const_cast<const void*>(dx), static_cast<const void*>(parts)}) {
    if (reinterpret_cast<uintptr_t>(matrix) % kWideBytes != 0) return cudaErrorInvalidValue;
  }
  Arguments arguments{};
  arguments.dlogits = dlogits;
  arguments.x = x;
  arguments.gate = gate;
  arguments.rows = rows;
  arguments.slot_to_row = slot_to_row;
  arguments.top_k = rows == nullptr ? 0 : static_cast<int>(top_k);
  arguments.dx = dx;
  arguments.parts = parts;
  arguments.dgate = dgate;
  arguments.num_tokens = num_tokens;
  arguments.depth = static_cast<int>(depth);
  arguments.num_experts = static_cast<int>(num_experts);
  arguments.beside = beside != 0;
  return with_router_types(dtype, gate_dtype, [&](auto x_type, auto gate_type) {
    return launch<decltype(x_type), decltype(gate_type)>(arguments, stream);
  });
}
