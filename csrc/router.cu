// The router in one pass over x: scores of all experts, softmax, the top_k choices and their counts; see launch.h.
//
// Scores are exact fp32 products summed in fp32, at the tensor cores' speed: a float is the sum of at most three bf16
// (fp16: two, bf16: one), products of bf16 are exact in the tensor core, and those of parts whose product lies below
// fp32's last digit are left out. An accumulator takes 32 columns at most before it is added to the sum outside, since
// the tensor core truncates where fp32 additions round. A float part is cut off, not rounded, so it cannot overflow; an
// infinite element of x or of the gate makes the score NaN.
#include "early_start.cuh"
#include "routing.cuh"
#include "softmax_topk.cuh"

namespace dit_moe {
namespace {

constexpr int kRouterWarps = 4;  // of a block; they share its tokens and take every fourth step of the depth
constexpr int kBlock = kRouterWarps * kWarp;
constexpr int kStep = 32;  // columns of x and gate
constexpr int kTileTokens = 16;
constexpr int64_t kManyTokens = 16384;  // from here on, two tiles a block share the gate and still fill the GPU

struct Arguments {
  const void* x;     // (T, D)
  const void* gate;  // (E, D)
  float* scores;     // (T, E): probabilities, or logits where there are no weights
  float* weights;    // (T, K), or null: then only the logits are wanted
  int32_t* ids;      // (T, K)
  int32_t* counts;   // (ranges, E)
  float* prob_sums;  // (ranges, E)
  int64_t num_tokens;
  int64_t range;  // tokens of a block, a multiple of its tile
  int depth, num_experts, top_k;
};

// ---- eight elements of a row, and their bf16 parts

template <typename T>
struct Chunk {
  static constexpr int kWords = sizeof(T) / 2;
  uint4 word[kWords];
};

template <typename T>
constexpr int kParts = sizeof(T) == 4              ? 3
                       : std::is_same_v<T, __half> ? 2
                                                   : 1;

// x is not read again by this kernel; the gate stays in the first-level cache.
template <bool kStream>
__device__ __forceinline__ uint4 load_word(const void* address) {
  if constexpr (!kStream) return __ldg(static_cast<const uint4*>(address));
  uint4 word;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(address));
  return word;
}

// The eight columns of a step that belong to lane t of four, kSpan by kSpan: in x, a span is 16 bytes, so that the four
// lanes read 64 neighbouring bytes. Columns beyond the depth are zero. Which lane holds which column is free, as long
// as x and gate agree.
template <typename T, int kSpan, bool kStream>
__device__ __forceinline__ Chunk<T> load_chunk(const T* row, int first, int t, int depth) {
  Chunk<T> chunk;
#pragma unroll
  for (int w = 0; w < Chunk<T>::kWords; ++w) {
    constexpr int kPerWord = 8 / Chunk<T>::kWords;
    const int element = w * kPerWord;
    const int column = first + element / kSpan * (4 * kSpan) + t * kSpan + element % kSpan;
    chunk.word[w] = column < depth ? load_word<kStream>(row + column) : uint4{};
  }
  return chunk;
}

template <typename T>
__device__ __forceinline__ void split(const Chunk<T>& chunk, uint32_t (&parts)[kParts<T>][4]) {
  if constexpr (kParts<T> == 1) {
    memcpy(parts[0], chunk.word, sizeof(parts[0]));
  } else {
    T elements[8];
    memcpy(elements, chunk.word, sizeof(elements));
    float value[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) value[j] = to_float(elements[j]);
#pragma unroll
    for (int p = 0; p < kParts<T>; ++p) {
#pragma unroll
      for (int j = 0; j < 8; j += 2) {  // the upper halves of two floats, in one register
        parts[p][j / 2] = __byte_perm(__float_as_uint(value[j]), __float_as_uint(value[j + 1]), 0x7632);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) value[j] -= __uint_as_float(__float_as_uint(value[j]) & 0xffff0000u);
    }
  }
}

// sum (16 tokens x 8 experts) += a (16 x 16) b (16 x 8)
__device__ __forceinline__ void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// One step of 16 tokens and 8 experts. Lane (g, t) = (lane / 4, lane % 4) holds its columns of tokens g and g + 8, and
// of expert g; of the sum it holds tokens g (first two) and g + 8 at experts 2t and 2t + 1.
template <int kXParts, int kGateParts>
__device__ __forceinline__ void multiply_parts(float (&sum)[4], const uint32_t (&low)[kXParts][4],
                                               const uint32_t (&high)[kXParts][4],
                                               const uint32_t (&gate)[kGateParts][4]) {
  constexpr int kDigits = 3;  // parts of a float
  float leading[4] = {}, rest[4] = {};
#pragma unroll
  for (int half = 0; half < 4; half += 2) {
#pragma unroll
    for (int i = 0; i < kXParts; ++i) {
#pragma unroll
      for (int j = 0; j < kGateParts; ++j) {
        if (i + j >= kDigits) continue;
        multiply(i + j == 0 ? leading : rest, low[i][half], high[i][half], low[i][half + 1], high[i][half + 1],
                 gate[j][half], gate[j][half + 1]);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) sum[c] += kXParts + kGateParts > 2 ? leading[c] + rest[c] : leading[c];
}

// ---- the kernel

// The scores of this warp's share of the depth, for the tokens from `first` on, into warp_scores (tokens, E).
template <typename X, typename Gate, int kGroups, int kTiles>
__device__ __forceinline__ void partial_scores(const Arguments& arguments, int64_t first, int warp, int lane,
                                               float* warp_scores) {
  // By registers: how many steps' loads are in flight together, and whether the gate's are among them.
  constexpr bool kLight = sizeof(X) == 2 && sizeof(Gate) == 2 && kGroups <= 2;
  constexpr bool kHeavy = sizeof(X) == 4 || kGroups > 2;
  constexpr int kBatch = (kLight ? 6 : kHeavy ? 2 : 4) / kTiles;
  constexpr int kSpan = 16 / sizeof(X);
  const int g = lane / 4, t = lane % 4, depth = arguments.depth, num_experts = arguments.num_experts;
  const X* x[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // rows out of range repeat the last: their scores are not used
      const int64_t token = min(first + m * kTileTokens + r * 8 + g, arguments.num_tokens - 1);
      x[m][r] = static_cast<const X*>(arguments.x) + token * depth;
    }
  }
  const Gate* gate[kGroups];
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
    gate[n] = static_cast<const Gate*>(arguments.gate) + static_cast<int64_t>(min(n * 8 + g, num_experts - 1)) * depth;
  }

  float sum[kTiles][kGroups][4] = {};
  for (int column = warp * kStep; column < depth; column += kBatch * kRouterWarps * kStep) {
    Chunk<X> chunk[kBatch][kTiles][2];
    Chunk<Gate> gate_chunk[kBatch][kGroups];
    const auto load_gate = [&](int b, int n) {
      return load_chunk<Gate, kSpan, false>(gate[n], column + b * kRouterWarps * kStep, t, depth);
    };
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int n = 0; n < (kLight ? kGroups : 0); ++n) gate_chunk[b][n] = load_gate(b, n);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          chunk[b][m][r] = load_chunk<X, kSpan, true>(x[m][r], column + b * kRouterWarps * kStep, t, depth);
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int step = column + b * kRouterWarps * kStep;
      if (step >= depth) break;
      uint32_t parts[kTiles][2][kParts<X>][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) split(chunk[b][m][r], parts[m][r]);
      }
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        uint32_t gate_parts[kParts<Gate>][4];
        split(kLight ? gate_chunk[b][n] : load_gate(b, n), gate_parts);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) multiply_parts(sum[m][n], parts[m][0], parts[m][1], gate_parts);
      }
    }
  }

#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int token = m * kTileTokens + c / 2 * 8 + g, expert = n * 8 + 2 * t + c % 2;
        if (expert < num_experts) warp_scores[token * num_experts + expert] = sum[m][n][c];
      }
    }
  }
}

// A block takes `range` tokens, kTiles * 16 at a time; kGroups * 8 experts at most.
template <typename X, typename Gate, int kGroups, int kTiles>
__global__ void __launch_bounds__(kBlock, kGroups > 4 ? 2 : 3) router_kernel(const Arguments arguments) {
  constexpr int kTokens = kTileTokens * kTiles;
  constexpr int kLanes = kBlock / kTokens;  // of a token in the softmax
  constexpr int kPer = kGroups * 8 / kLanes;
  __shared__ float partial[kRouterWarps][kTokens * kGroups * 8];
  __shared__ int32_t count[kMaxRouterExperts];
  const int thread = threadIdx.x, num_experts = arguments.num_experts;
  const int token_here = thread / kLanes;
  const TokenGroup<kLanes, kPer> group{thread % kLanes, num_experts};
  float* const scores = partial[0];  // (tokens, E) after the warps' parts are added
  float prob_sum = 0.0f;             // of expert `thread`
  if (thread == 0) let_next_start();
  if (thread < kMaxRouterExperts) count[thread] = 0;

  const int64_t begin = blockIdx.x * arguments.range;
  const int64_t end = min(arguments.num_tokens, begin + arguments.range);
  for (int64_t first = begin; first < end; first += kTokens) {
    partial_scores<X, Gate, kGroups, kTiles>(arguments, first, thread / kWarp, thread % kWarp, partial[thread / kWarp]);
    __syncthreads();
    float values[kPer];
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      values[i] = 0.0f;
      if (group.expert(i) >= num_experts) continue;
      const int place = token_here * num_experts + group.expert(i);
#pragma unroll
      for (int w = 0; w < kRouterWarps; ++w) values[i] += partial[w][place];
    }
    if (arguments.weights != nullptr) {
      group.softmax(values);
      group.choose(values, arguments.top_k, [&](int k, int expert, float weight) {
        const int64_t token = first + token_here;
        if (token >= end || group.lane != 0) return;
        arguments.weights[token * arguments.top_k + k] = weight;
        arguments.ids[token * arguments.top_k + k] = expert;
        atomicAdd(&count[expert], 1);  // of whole numbers: the order does not matter
      });
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {  // each place is read and written by one lane
      if (group.expert(i) < num_experts) scores[token_here * num_experts + group.expert(i)] = values[i];
    }
    __syncthreads();
    const int valid = static_cast<int>(min(end - first, static_cast<int64_t>(kTokens)));
    for (int i = thread; i < valid * num_experts; i += kBlock) {
      arguments.scores[first * num_experts + i] = scores[i];
    }
    if (thread < num_experts && arguments.weights != nullptr) {
      for (int token = 0; token < valid; ++token) prob_sum += scores[token * num_experts + thread];
    }
    __syncthreads();
  }
  if (arguments.weights != nullptr && thread < num_experts) {
    const int64_t place = static_cast<int64_t>(blockIdx.x) * num_experts + thread;
    arguments.counts[place] = count[thread];
    arguments.prob_sums[place] = prob_sum;
  }
}

// ---- host side

template <typename X, typename Gate>
cudaError_t launch_tiles(Arguments arguments, CountTable& table, cudaStream_t stream) {
  return with_expert_groups(arguments.num_experts, [&](auto groups) {
    const auto run = [&](auto tiles) {
      const int64_t tokens = kTileTokens * tiles.value;
      arguments.range = tokens * units_per_range(ceil_div(arguments.num_tokens, tokens), arguments.num_experts);
      table.rows = static_cast<int>(ceil_div(arguments.num_tokens, arguments.range));
      table.slots = static_cast<int>(arguments.range * arguments.top_k);
      router_kernel<X, Gate, groups.value, tiles.value>
          <<<static_cast<unsigned>(table.rows), kBlock, 0, stream>>>(arguments);
      return cudaGetLastError();
    };
    if constexpr (groups.value <= 2) {
      if (arguments.num_tokens >= kManyTokens) return run(std::integral_constant<int, 2>{});
    }
    return run(std::integral_constant<int, 1>{});
  });
}

cudaError_t launch_router(const Arguments& arguments, CountTable& table, DitMoeDtype dtype, DitMoeDtype gate_dtype,
                          cudaStream_t stream) {
  return with_router_types(dtype, gate_dtype, [&](auto x, auto gate) {
    return launch_tiles<decltype(x), decltype(gate)>(arguments, table, stream);
  });
}

}  // namespace
}  // namespace dit_moe

extern "C" cudaError_t dit_moe_router_logits(const void* x, const void* gate, float* logits, int64_t num_tokens,
                                             int64_t depth, int64_t num_experts, DitMoeDtype dtype,
                                             DitMoeDtype gate_dtype, cudaStream_t stream) {
  using namespace dit_moe;
  if (!valid_router(x, gate, num_tokens, depth, num_experts, dtype, gate_dtype)) return cudaErrorInvalidValue;
  if (num_tokens == 0) return cudaSuccess;
  Arguments arguments{};
  arguments.x = x;
  arguments.gate = gate;
  arguments.scores = logits;
  arguments.num_tokens = num_tokens;
  arguments.depth = static_cast<int>(depth);
  arguments.num_experts = static_cast<int>(num_experts);
  CountTable unused{};
  return launch_router(arguments, unused, dtype, gate_dtype, stream);
}

namespace dit_moe {

cudaError_t route(const void* x, const void* gate, float* weights, int32_t* ids, float* probs, float* balance,
                  const DitMoePlan& plan, void* rows, void* workspace, int64_t num_tokens, int64_t depth,
                  int64_t num_experts, int64_t top_k, double balance_scale, DitMoeDtype dtype, DitMoeDtype gate_dtype,
                  bool overlaps, cudaStream_t stream) {
  const int64_t num_slots = num_tokens * top_k;
  if (!valid_router(x, gate, num_tokens, depth, num_experts, dtype, gate_dtype) || top_k < 1 || top_k > num_experts ||
      !valid_plan(plan, num_slots, num_experts) || reinterpret_cast<uintptr_t>(rows) % kWideBytes != 0) {
    return cudaErrorInvalidValue;
  }
  int32_t* const counts = static_cast<int32_t*>(workspace);
  float* const prob_sums = reinterpret_cast<float*>(counts + kTableSize);
  CountTable table{counts, prob_sums, 0, 1};
  if (num_tokens > 0) {
    const Arguments arguments{x,
                              gate,
                              probs,
                              weights,
                              ids,
                              counts,
                              prob_sums,
                              num_tokens,
                              0,
                              static_cast<int>(depth),
                              static_cast<int>(num_experts),
                              static_cast<int>(top_k)};
    const cudaError_t error = launch_router(arguments, table, dtype, gate_dtype, stream);
    if (error != cudaSuccess) return error;
  }
  const bool at_once = rows != nullptr && may_dispatch(table, num_experts);
  Dispatch dispatch{};
  if (at_once) {
    const int64_t row_bytes = depth * (dtype == DIT_MOE_FLOAT32 ? 4 : 2);
    dispatch = {static_cast<const uint4*>(x), static_cast<uint4*>(rows), static_cast<unsigned>(row_bytes / kWideBytes),
                static_cast<unsigned>(top_k)};
  }
  const Balance wanted{balance, static_cast<float>(balance_scale)};
  const cudaError_t error =
      launch_place(ids, table, plan, wanted, dispatch, num_slots, num_experts, overlaps && num_tokens > 0, stream);
  if (error != cudaSuccess || rows == nullptr || at_once) return error;
  return dit_moe_permute(x, plan.row_to_slot, plan.slot_to_row, rows, num_tokens, depth, top_k, 0, dtype, stream);
}

}  // namespace dit_moe

extern "C" cudaError_t dit_moe_route(const void* x, const void* gate, float* weights, int32_t* ids, float* probs,
                                     float* balance, const DitMoePlan* plan, void* rows, void* workspace,
                                     int64_t num_tokens, int64_t depth, int64_t num_experts, int64_t top_k,
                                     double balance_scale, DitMoeDtype dtype, DitMoeDtype gate_dtype,
                                     cudaStream_t stream) {
  return dit_moe::route(x, gate, weights, ids, probs, balance, *plan, rows, workspace, num_tokens, depth, num_experts,
                        top_k, balance_scale, dtype, gate_dtype, false, stream);
}
