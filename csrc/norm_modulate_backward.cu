// Gradients of norm_modulate, alone or behind a gated residual; see launch.h.
//
// Three launches: each row's statistics; the rows' gradients together with sums of each vector's gradient over a part
// of an image's tokens; and the sums of those.
#include "norm_rows.cuh"

namespace dit_moe {
namespace {

constexpr int kBatch = 2;   // rows that a thread has in flight together, in the second launch
constexpr int kChains = 8;  // sums that a thread keeps, in the third; a power of two

// Of a row: what was normalised has this mean and 1 / standard deviation; grad, its normalised form's gradient, has
// this mean, and grad times the normalised row this one.
struct __align__(16) Statistics {
  float mean, rstd, mean_grad, mean_dot;
};

struct Arguments {
  const void *dout, *dsum, *x, *gate, *y, *scale;
  void *dx, *dy;
  Statistics* statistics;                                    // (B * N,)
  float* partials;                                           // (B, parts, vectors, D)
  int64_t num_rows, total_parts, gate_stride, scale_stride;  // strides in words
  unsigned num_tokens, words, num_parts, part_tokens;        // of an image, a row, an image, a part
  float width, eps;
};

template <typename Layouts, int kWords>
__global__ void __launch_bounds__(kNormThreads) row_statistics_kernel(const Arguments a) {
  using Stream = typename Layouts::Stream;
  using Branch = typename Layouts::Branch;
  const int64_t row = group_index();
  if (row >= a.num_rows) return;
  const unsigned image = static_cast<unsigned>(row) / a.num_tokens;
  const int64_t first = row * a.words;
  const auto shared = [](const auto* address) { return load_shared_row(address); };

  Row<typename Stream::Word, kWords> x;
  Row<typename Branch::Word, kWords> dout, scale;
  x.load(static_cast<const typename Stream::Word*>(a.x) + first, a.words, shared);
  dout.load(static_cast<const typename Branch::Word*>(a.dout) + first, a.words, shared);
  float sum = 0.0f;
  each_word<kWords>(a.words, [&](int i, unsigned column) {
    sum += sum_word<Stream>(x.at(i, column), [](float value) { return value; });
  });
  const float mean = group_sum(sum) / a.width;
  x.keep_packed();
  scale.load(static_cast<const typename Branch::Word*>(a.scale) + image * a.scale_stride, a.words, shared);
  float squares = 0.0f, grads = 0.0f, dots = 0.0f;
  each_word<kWords>(a.words, [&](int i, unsigned column) {
    float value[Layouts::kPack], grad[Layouts::kPack], factor[Layouts::kPack];
    unpack<Stream>(x.at(i, column), value);
    unpack<Branch>(dout.at(i, column), grad);
    unpack<Branch>(scale.at(i, column), factor);
#pragma unroll
    for (int k = 0; k < Layouts::kPack; ++k) {
      const float centred = value[k] - mean, of_normed = grad[k] * (1.0f + factor[k]);
      squares += centred * centred;
      grads += of_normed;
      dots += of_normed * centred;
    }
  });
  squares = group_sum(squares);
  grads = group_sum(grads);
  dots = group_sum(dots);
  if (threadIdx.x != 0) return;
  const float rstd = rsqrtf(squares / a.width + a.eps);
  a.statistics[row] = {mean, rstd, grads / a.width, dots * rstd / a.width};
}

// A thread for each word of each part of an image's tokens.
template <typename Layouts, bool kResidual>
__global__ void __launch_bounds__(kNormThreads) row_gradients_kernel(const Arguments a) {
  using Stream = typename Layouts::Stream;
  using Branch = typename Layouts::Branch;
  constexpr int kPack = Layouts::kPack, kVectors = kResidual ? 3 : 2;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kNormThreads + threadIdx.x;
  const int64_t part = thread / a.words;  // counted over all images
  if (part >= a.total_parts) return;
  const unsigned column = static_cast<unsigned>(thread - part * a.words);
  const unsigned image = static_cast<unsigned>(part / a.num_parts);
  const unsigned first = static_cast<unsigned>(part - static_cast<int64_t>(image) * a.num_parts) * a.part_tokens;
  const unsigned end = min(first + a.part_tokens, a.num_tokens);

  float scale[kPack], gate[kPack], sums[kVectors][kPack] = {};
  const auto* scales = static_cast<const typename Branch::Word*>(a.scale);
  unpack<Branch>(load_shared_row(scales + image * a.scale_stride + column), scale);
  if constexpr (kResidual) {
    const auto* gates = static_cast<const typename Branch::Word*>(a.gate);
    unpack<Branch>(load_shared_row(gates + image * a.gate_stride + column), gate);
  }
  for (unsigned token = first; token < end; token += kBatch) {
    typename Stream::Word x_word[kBatch], dsum_word[kBatch];
    typename Branch::Word dout_word[kBatch], y_word[kBatch];
    Statistics row[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (token + b >= end) continue;
      const int64_t index = static_cast<int64_t>(image) * a.num_tokens + token + b, place = index * a.words + column;
      x_word[b] = load_once(static_cast<const typename Stream::Word*>(a.x) + place);
      dout_word[b] = load_once(static_cast<const typename Branch::Word*>(a.dout) + place);
      if constexpr (kResidual) {
        dsum_word[b] = load_once(static_cast<const typename Stream::Word*>(a.dsum) + place);
        y_word[b] = load_once(static_cast<const typename Branch::Word*>(a.y) + place);
      }
      const float4 loaded = load_shared_row(reinterpret_cast<const float4*>(a.statistics + index));
      row[b] = {loaded.x, loaded.y, loaded.z, loaded.w};
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (token + b >= end) continue;
      const int64_t place = (static_cast<int64_t>(image) * a.num_tokens + token + b) * a.words + column;
      float x[kPack], dout[kPack];
      unpack<Stream>(x_word[b], x);
      unpack<Branch>(dout_word[b], dout);
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        const float normed = (x[k] - row[b].mean) * row[b].rstd;
        sums[0][k] += dout[k];
        sums[1][k] += dout[k] * normed;
        x[k] = (dout[k] * (1.0f + scale[k]) - row[b].mean_grad - normed * row[b].mean_dot) * row[b].rstd;
      }
      if constexpr (kResidual) {
        float dsum[kPack], y[kPack];
        unpack<Stream>(dsum_word[b], dsum);
        unpack<Branch>(y_word[b], y);
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          x[k] += dsum[k];
          sums[2][k] += x[k] * y[k];
          dout[k] = x[k] * gate[k];
        }
        store(static_cast<typename Branch::Word*>(a.dy) + place, pack<Branch>(dout));
      }
      store(static_cast<typename Stream::Word*>(a.dx) + place, pack<Stream>(x));
    }
  }
  using Sums = Layout<float, kPack == 1 ? 1 : 4>;
  constexpr int kSumWords = kPack / Sums::kPack;
  auto* partial = reinterpret_cast<typename Sums::Word*>(a.partials);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int w = 0; w < kSumWords; ++w) {
      float values[Sums::kPack];
#pragma unroll
      for (int k = 0; k < Sums::kPack; ++k) values[k] = sums[v][w * Sums::kPack + k];
      partial[((part * kVectors + v) * a.words + column) * kSumWords + w] = pack<Sums>(values);
    }
  }
}

// partials: (B, parts, vectors, D) -> dshift, dscale, dgate: (B, D), the last null where there are two vectors.
template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    vector_gradients_kernel(const float* __restrict__ partials, T* __restrict__ dshift, T* __restrict__ dscale,
                            T* __restrict__ dgate, int64_t num_images, unsigned num_parts, unsigned width) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kNormThreads + threadIdx.x;
  const int64_t part_size = (dgate == nullptr ? 2 : 3) * static_cast<int64_t>(width);
  const int64_t image = thread / part_size, place = thread - image * part_size;
  if (image >= num_images) return;
  const float* partial = partials + image * num_parts * part_size + place;
  float sums[kChains] = {};  // side by side: one long sum would lose the last bits of fp32 gradients
  for (unsigned part = 0; part < num_parts; part += kChains) {
#pragma unroll
    for (int c = 0; c < kChains; ++c) sums[c] += part + c < num_parts ? partial[(part + c) * part_size] : 0.0f;
  }
#pragma unroll
  for (int distance = kChains / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int c = 0; c < distance; ++c) sums[c] += sums[c + distance];
  }
  const int64_t vector = place / width;
  T* target = vector == 0 ? dshift : vector == 1 ? dscale : dgate;
  target[image * width + place - vector * width] = static_cast<T>(sums[0]);
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kNormThreads - 1) / kNormThreads); }

template <typename Layouts, bool kResidual>
cudaError_t launch_rows(const Arguments& a, cudaStream_t stream) {
  const auto [blocks, threads] = geometry(a.num_rows, a.words, kNormThreads);
  const cudaError_t error = with_words<Layouts::kPack>(a.words, [&, blocks = blocks, threads = threads](auto count) {
    row_statistics_kernel<Layouts, count.value><<<blocks, threads, 0, stream>>>(a);
    return cudaGetLastError();
  });
  if (error != cudaSuccess) return error;
  row_gradients_kernel<Layouts, kResidual><<<blocks_for(a.total_parts * a.words), kNormThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t launch_rows(Arguments a, int64_t width, DitMoeDtype dtype, DitMoeDtype branch_dtype, cudaStream_t stream) {
  const std::initializer_list<Rows> streams = {{a.dsum, width}, {a.x, width}, {a.dx, width}};
  const std::initializer_list<Rows> branches = {
      {a.dout, width}, {a.y, width}, {a.dy, width}, {a.gate, a.gate_stride}, {a.scale, a.scale_stride}};
  return with_norm_layouts(dtype, branch_dtype, streams, branches, [&](auto layouts) {
    using Layouts = decltype(layouts);
    if (a.num_rows == 0 || width == 0) return cudaSuccess;
    a.words = static_cast<unsigned>(width / Layouts::kPack);
    for (int64_t* stride : {&a.gate_stride, &a.scale_stride}) *stride /= Layouts::kPack;
    return a.y == nullptr ? launch_rows<Layouts, false>(a, stream) : launch_rows<Layouts, true>(a, stream);
  });
}

cudaError_t launch_vectors(const float* partials, void* dshift, void* dscale, void* dgate, int64_t num_images,
                           int64_t num_parts, int64_t width, DitMoeDtype dtype, cudaStream_t stream) {
  return with_layout(dtype, 1, {}, [&](auto layout) {
    using T = typename decltype(layout)::Element;
    const int64_t sums = num_images * width * (dgate == nullptr ? 2 : 3);
    if (sums == 0) return cudaSuccess;
    vector_gradients_kernel<T><<<blocks_for(sums), kNormThreads, 0, stream>>>(
        partials, static_cast<T*>(dshift), static_cast<T*>(dscale), static_cast<T*>(dgate), num_images,
        static_cast<unsigned>(num_parts), static_cast<unsigned>(width));
    return cudaGetLastError();
  });
}

}  // namespace
}  // namespace dit_moe

extern "C" cudaError_t dit_moe_norm_modulate_backward(
    const void* dout, const void* dsum, const void* x, const void* gate, const void* y, const void* scale, void* dx,
    void* dy, void* dshift, void* dscale, void* dgate, float* statistics, float* partials, int64_t num_images,
    int64_t num_tokens, int64_t width, int64_t gate_stride, int64_t scale_stride, int64_t num_parts, double eps,
    DitMoeDtype dtype, DitMoeDtype branch_dtype, cudaStream_t stream) {
  using namespace dit_moe;
  if (!valid_norm(num_images, num_tokens, width) || num_parts < (num_tokens > 0) || num_parts > num_tokens) {
    return cudaErrorInvalidValue;
  }
  Arguments a = {};
  a.dout = dout, a.dsum = dsum, a.x = x, a.gate = gate, a.y = y, a.scale = scale;
  a.dx = dx, a.dy = dy;
  a.statistics = reinterpret_cast<Statistics*>(statistics), a.partials = partials;
  a.num_rows = num_images * num_tokens, a.total_parts = num_images * num_parts;
  a.gate_stride = gate_stride, a.scale_stride = scale_stride;
  a.num_tokens = static_cast<unsigned>(num_tokens), a.num_parts = static_cast<unsigned>(num_parts);
  a.part_tokens = static_cast<unsigned>(num_parts > 0 ? (num_tokens + num_parts - 1) / num_parts : 0);
  a.width = static_cast<float>(width), a.eps = static_cast<float>(eps);
  const cudaError_t error = launch_rows(a, width, dtype, branch_dtype, stream);
  if (error != cudaSuccess) return error;
  return launch_vectors(partials, dshift, dscale, dgate, num_images, num_parts, width, branch_dtype, stream);
}
