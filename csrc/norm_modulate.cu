// norm_modulate, alone or behind a gated residual, whose branch may be routed rows still to be combined; see launch.h.
#include "combine.cuh"
#include "norm_rows.cuh"

namespace dit_moe {
namespace {

enum class Branch { kNone, kDense, kRouted };

struct Arguments {
  const void *x, *gate, *y, *shift, *scale;
  void *total, *out;
  int64_t num_rows, gate_stride, shift_stride, scale_stride;  // strides in words
  unsigned num_tokens, words;
  float width, eps;
};

struct RoutedArguments : Arguments {
  RoutedRows routed;  // of y
};

template <Branch kBranch>
using ArgumentsOf = std::conditional_t<kBranch == Branch::kRouted, RoutedArguments, Arguments>;

// x + gate * y, rounded to the stream's dtype.
template <typename Layouts>
__device__ __forceinline__ typename Layouts::Stream::Word add_gated(const typename Layouts::Stream::Word& x_word,
                                                                    const typename Layouts::Branch::Word& gate_word,
                                                                    const typename Layouts::Branch::Word& y_word) {
  float x[Layouts::kPack], gate[Layouts::kPack], y[Layouts::kPack];
  unpack<typename Layouts::Stream>(x_word, x);
  unpack<typename Layouts::Branch>(gate_word, gate);
  unpack<typename Layouts::Branch>(y_word, y);
#pragma unroll
  for (int i = 0; i < Layouts::kPack; ++i) x[i] += gate[i] * y[i];
  return pack<typename Layouts::Stream>(x);
}

template <typename Layouts>
__device__ __forceinline__ typename Layouts::Branch::Word modulate(const typename Layouts::Stream::Word& x_word,
                                                                   float mean, float rstd,
                                                                   const typename Layouts::Branch::Word& shift_word,
                                                                   const typename Layouts::Branch::Word& scale_word) {
  float x[Layouts::kPack], shift[Layouts::kPack], scale[Layouts::kPack];
  unpack<typename Layouts::Stream>(x_word, x);
  unpack<typename Layouts::Branch>(shift_word, shift);
  unpack<typename Layouts::Branch>(scale_word, scale);
#pragma unroll
  for (int i = 0; i < Layouts::kPack; ++i) x[i] = (x[i] - mean) * rstd * (1.0f + scale[i]) + shift[i];
  return pack<typename Layouts::Branch>(x);
}

// A group of lanes for each row, which it keeps in registers between its statistics and its output unless kWords is 0.
template <typename Layouts, int kWords, Branch kBranch>
__global__ void __launch_bounds__(kNormThreads) norm_modulate_kernel(const ArgumentsOf<kBranch> a) {
  using Word = typename Layouts::Stream::Word;
  using BranchWord = typename Layouts::Branch::Word;
  const int64_t row = group_index();
  if (row >= a.num_rows) return;
  const unsigned image = static_cast<unsigned>(row) / a.num_tokens;
  const int64_t first = row * a.words;
  const auto once = [](const auto* address) { return load_once(address); };
  const auto shared = [](const auto* address) { return load_shared_row(address); };

  Row<Word, kWords> x;
  x.load(static_cast<const Word*>(a.x) + first, a.words, once);
  float sum = 0.0f;
  if constexpr (kBranch != Branch::kNone) {
    std::conditional_t<kBranch == Branch::kRouted, CombinedRow<typename Layouts::Branch, kWords>,
                       Row<BranchWord, kWords>>
        y;
    Row<BranchWord, kWords> gate;
    if constexpr (kBranch == Branch::kRouted) {
      y.load(static_cast<const BranchWord*>(a.y), a.routed, row, a.words);
    } else {
      y.load(static_cast<const BranchWord*>(a.y) + first, a.words, once);
    }
    gate.load(static_cast<const BranchWord*>(a.gate) + image * a.gate_stride, a.words, shared);
    Word* total = static_cast<Word*>(a.total) + first;
    each_word<kWords>(a.words, [&](int i, unsigned column) {
      const Word word = add_gated<Layouts>(x.at(i, column), gate.at(i, column), y.at(i, column));
      store(total + column, word);
      x.set(i, word);
      sum += sum_word<typename Layouts::Stream>(word, [](float value) { return value; });
    });
    x.moved_to(total);
  } else {
    each_word<kWords>(a.words, [&](int i, unsigned column) {
      sum += sum_word<typename Layouts::Stream>(x.at(i, column), [](float value) { return value; });
    });
  }
  x.keep_packed();

  const float mean = group_sum(sum) / a.width;
  Row<BranchWord, kWords> shift, scale;  // on their way while the squares are summed
  shift.load(static_cast<const BranchWord*>(a.shift) + image * a.shift_stride, a.words, shared);
  scale.load(static_cast<const BranchWord*>(a.scale) + image * a.scale_stride, a.words, shared);
  float squares = 0.0f;
  each_word<kWords>(a.words, [&](int i, unsigned column) {
    squares += sum_word<typename Layouts::Stream>(x.at(i, column),
                                                  [&](float value) { return (value - mean) * (value - mean); });
  });
  x.keep_packed();
  shift.keep_packed();
  scale.keep_packed();
  const float rstd = rsqrtf(group_sum(squares) / a.width + a.eps);
  auto* out = static_cast<BranchWord*>(a.out) + first;
  each_word<kWords>(a.words, [&](int i, unsigned column) {
    store(out + column, modulate<Layouts>(x.at(i, column), mean, rstd, shift.at(i, column), scale.at(i, column)));
  });
}

template <Branch kBranch>
cudaError_t launch(RoutedArguments a, int64_t width, DitMoeDtype dtype, DitMoeDtype branch_dtype, cudaStream_t stream) {
  const std::initializer_list<Rows> branches = {{a.y, width},
                                                {a.routed.addend, width},
                                                {a.gate, a.gate_stride},
                                                {a.shift, a.shift_stride},
                                                {a.scale, a.scale_stride},
                                                {a.out, width}};
  return with_norm_layouts(dtype, branch_dtype, {{a.x, width}, {a.total, width}}, branches, [&](auto layouts) {
    using Layouts = decltype(layouts);
    const int64_t words = width / Layouts::kPack;
    if (a.num_rows == 0 || words == 0) return cudaSuccess;
    a.words = static_cast<unsigned>(words);
    for (int64_t* stride : {&a.gate_stride, &a.shift_stride, &a.scale_stride}) *stride /= Layouts::kPack;
    const auto [blocks, threads] = geometry(a.num_rows, words, kNormThreads);
    return with_words<Layouts::kPack>(words, [&, blocks = blocks, threads = threads](auto count) {
      norm_modulate_kernel<Layouts, count.value, kBranch><<<blocks, threads, 0, stream>>>(a);
      return cudaGetLastError();
    });
  });
}

}  // namespace
}  // namespace dit_moe

extern "C" cudaError_t dit_moe_norm_modulate(const void* x, const void* gate, const void* y, const float* weights,
                                             const void* addend, const int32_t* slot_to_row, const void* shift,
                                             const void* scale, void* total, void* out, int64_t num_images,
                                             int64_t num_tokens, int64_t width, int64_t top_k, int64_t gate_stride,
                                             int64_t shift_stride, int64_t scale_stride, double eps, DitMoeDtype dtype,
                                             DitMoeDtype branch_dtype, cudaStream_t stream) {
  using namespace dit_moe;
  if (!valid_norm(num_images, num_tokens, width)) return cudaErrorInvalidValue;
  if (slot_to_row != nullptr && (top_k < 1 || !fits_in_31_bits(num_images * num_tokens * top_k))) {
    return cudaErrorInvalidValue;
  }
  RoutedArguments a = {};
  a.x = x, a.gate = gate, a.y = y, a.shift = shift, a.scale = scale;
  a.routed = {weights, addend, slot_to_row, static_cast<unsigned>(top_k)};
  a.total = total, a.out = out;
  a.num_rows = num_images * num_tokens, a.num_tokens = static_cast<unsigned>(num_tokens);
  a.gate_stride = gate_stride, a.shift_stride = shift_stride, a.scale_stride = scale_stride;
  a.width = static_cast<float>(width), a.eps = static_cast<float>(eps);
  if (y == nullptr) return launch<Branch::kNone>(a, width, dtype, branch_dtype, stream);
  return slot_to_row == nullptr ? launch<Branch::kDense>(a, width, dtype, branch_dtype, stream)
                                : launch<Branch::kRouted>(a, width, dtype, branch_dtype, stream);
}
