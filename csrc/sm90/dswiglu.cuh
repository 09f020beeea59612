// The gradient of out = silu(gate) * up, from the gradient for out as it leaves the matrix product: what a warp does
// with four rows at a time, eight lanes a row. No lane needs more of a row than the 16 bytes that it loads and stores.
#pragma once

#include "epilogue.cuh"
#include "ptx.cuh"
#include "tile_choice.h"

namespace dit_moe::sm90 {

struct DSwiGLUTensors {
  const void* h;               // (rows, 2 width): gate columns, then up columns
  const float* topk_weights;   // (slots,) the factor of each row's output
  const int32_t* row_to_slot;  // (rows,)
  void* weighted_a;            // (rows, width) = topk weight * silu(gate) * up
  float* dots;                 // (column tiles, rows): sums of g * silu(gate) * up over a tile's columns
};

// Two columns: g without the row's weight, and weight, to the gradients for gate and up, weight * out, and, added up in
// `dot`, g * out.
template <typename Element>
__device__ __forceinline__ void dswiglu_pair(uint32_t g_bits, uint32_t gate_bits, uint32_t up_bits, float weight,
                                             uint32_t& dgate, uint32_t& dup, uint32_t& weighted_a, float& dot) {
  const float2 g = widen_pair<Element>(g_bits);
  const float2 gate = widen_pair<Element>(gate_bits);
  const float2 up = widen_pair<Element>(up_bits);
  const float2 share = {sigmoid(gate.x), sigmoid(gate.y)};
  const float2 up_share = {up.x * share.x, up.y * share.y};
  const float2 a = {gate.x * up_share.x, gate.y * up_share.y};
  const float2 weighted_g = {g.x * weight, g.y * weight};
  dot = fmaf(g.x, a.x, dot);
  dot = fmaf(g.y, a.y, dot);
  weighted_a = round_pair<Element>(a.x * weight, a.y * weight);
  dup = round_pair<Element>(weighted_g.x * (gate.x * share.x), weighted_g.y * (gate.y * share.y));
  // d silu(gate) * up = s (1 + gate (1 - s)) up = s up + a - a s
  dgate = round_pair<Element>(weighted_g.x * fmaf(-a.x, share.x, up_share.x + a.x),
                              weighted_g.y * fmaf(-a.y, share.y, up_share.y + a.y));
}

// A warp's view of a tile of kTileM rows and kSegments times 64 columns. Its rows are four times 16, one after another:
// it takes them in steps of four, lane / 8 being the row and lane % 8 the 16 bytes of a segment.
template <typename Element, int kSegments>
class DSwiGLUTile {
 public:
  static constexpr int kSteps = kTileM / 16;  // of four rows, of which each of four warps takes its own

  struct Chunk {
    uint4 gate, up;
  };

  // row, rows: first row of the tile and how many of it are there, maybe none; column: its first; width: of the matrix.
  __device__ __forceinline__ DSwiGLUTile(const DSwiGLUTensors& tensors, void* dh, int row, int rows, int column,
                                         int width)
      : row_(row), rows_(rows), column_(column), width_(width) {
    const int64_t first = int64_t{row} * width, place = column + lane() % 8 * 8;
    gate_ = static_cast<const Element*>(tensors.h) + 2 * first + place;
    dgate_ = static_cast<Element*>(dh) + 2 * first + place;
    weighted_a_ = static_cast<Element*>(tensors.weighted_a) + first + place;
  }

  __device__ __forceinline__ int row() const { return row_; }
  __device__ __forceinline__ int rows() const { return rows_; }
  __device__ __forceinline__ int column() const { return column_; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  // The row of `part` (0 to 3) in a step, counted from the tile's first: a consumer warp hands over 16 rows, and this
  // warp takes those of the first consumer's warp and then those of the second's.
  static __device__ __forceinline__ int row_of(int step, int part) {
    return warp_of(step) * kWarpRows + step % 4 * 4 + part;
  }

  // The consumer warp that hands over the rows of a step.
  static __device__ __forceinline__ int warp_of(int step) { return step / 4 * 4 + threadIdx.x / 32 % 4; }

  // What this lane needs of h for a step.
  __device__ __forceinline__ void load(int step, Chunk (&h)[kSegments]) const {
#pragma unroll
    for (int segment = 0; segment < kSegments; ++segment) h[segment] = load(step, segment);
  }

  // All loads of a loop count on one scoreboard, on which a warp waits until it is empty: so what a step needs moves to
  // other registers, which is where the warp waits, and only then do the loads for the next step start.
  static __device__ __forceinline__ void move(const Chunk (&from)[kSegments], Chunk (&to)[kSegments]) {
#pragma unroll
    for (int segment = 0; segment < kSegments; ++segment) {
      to[segment].gate = copy_of(from[segment].gate);
      to[segment].up = copy_of(from[segment].up);
    }
  }
  static __device__ __forceinline__ uint4 copy_of(const uint4& word) {
    uint4 copy;
    asm volatile("mov.b32 %0, %4;\nmov.b32 %1, %5;\nmov.b32 %2, %6;\nmov.b32 %3, %7;"
                 : "=r"(copy.x), "=r"(copy.y), "=r"(copy.z), "=r"(copy.w)
                 : "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
                 : "memory");
    return copy;
  }

  // This lane's part of h, zeros where there is none. Past the last step there is none.
  __device__ __forceinline__ Chunk load(int step, int segment) const {
    Chunk chunk{};
    const int row = row_of(step, lane() / 8);
    if (row < rows_ && has(segment)) {
      const Element* gate = gate_ + row * 2 * width_ + segment * kStagingColumns;
      chunk.gate = load_once(gate);
      chunk.up = load_once(gate + width_);
    }
    return chunk;
  }

  // Stores the results of a step, whose part of h has been loaded. `buffer` holds the consumer warp's 16 rows of g as
  // stage_columns left them. Returns this lane's part of <g, a>.
  __device__ __forceinline__ float finish(int step, uint32_t buffer, float weight, const Chunk (&h)[kSegments]) const {
    const int row = row_of(step, lane() / 8);
    const int staged_row = step % 4 * 4 + lane() / 8;
    const uint32_t place = buffer + staged_row * 128 + (lane() % 8 ^ staged_row % 8) * 16;
    uint4 g_segments[kSegments];
#pragma unroll
    for (int segment = 0; segment < kSegments; ++segment) {
      g_segments[segment] = load_shared(place + segment * kStagingBytes);
    }
    float dot = 0.0f;
#pragma unroll
    for (int segment = 0; segment < kSegments; ++segment) {
      const Chunk chunk = h[segment];
      const uint4 g = g_segments[segment];
      uint4 dgate, dup, weighted_a;
      dswiglu_pair<Element>(g.x, chunk.gate.x, chunk.up.x, weight, dgate.x, dup.x, weighted_a.x, dot);
      dswiglu_pair<Element>(g.y, chunk.gate.y, chunk.up.y, weight, dgate.y, dup.y, weighted_a.y, dot);
      dswiglu_pair<Element>(g.z, chunk.gate.z, chunk.up.z, weight, dgate.z, dup.z, weighted_a.z, dot);
      dswiglu_pair<Element>(g.w, chunk.gate.w, chunk.up.w, weight, dgate.w, dup.w, weighted_a.w, dot);
      if (row < rows_ && has(segment)) {
        Element* out = dgate_ + row * 2 * width_ + segment * kStagingColumns;
        __stcs(reinterpret_cast<uint4*>(out), dgate);
        __stcs(reinterpret_cast<uint4*>(out + width_), dup);
        __stcs(reinterpret_cast<uint4*>(weighted_a_ + row * width_ + segment * kStagingColumns), weighted_a);
      }
    }
    return dot;
  }

 private:
  // Whether a segment has columns for this lane.
  __device__ __forceinline__ bool has(int segment) const {
    return segment * kStagingColumns + lane() % 8 * 8 < width_ - column_;
  }

  int row_, rows_, column_;
  int64_t width_;
  const Element* gate_;
  Element* dgate_;
  Element* weighted_a_;
};

}  // namespace dit_moe::sm90
