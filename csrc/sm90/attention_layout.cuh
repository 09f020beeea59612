// What the attention kernel is told, and how it lays queries, keys and values out in shared memory.
//
// A head is 64, 72 or 88 columns wide. A slot holds queries or keys as a tile of 64 columns and, behind it, a narrow
// one with the rest and with zeros up to a multiple of 16, which the copy engine puts where a head ends; values as
// tiles of 32 columns, of which one instruction takes as many columns as a head has.
#pragma once

#include "pipeline.cuh"

namespace dit_moe::sm90 {

constexpr int kSlotRows = 128;

struct AttentionArguments {
  const void* weights[4];  // LayerNorm's for queries: weight, bias, (width,); then for keys
  void* out;               // (images, tokens, heads, width)
  int tokens, heads;
  int query_blocks;  // of 128 queries of an image
  int passes;        // query blocks that keys and values stay for: 1, or all of them
  int blocks;        // of a cluster, 1 or 2: each takes other queries, and half of the keys and values for both
  int items;         // heads of the queries that a cluster takes at a time
  float eps;
  bool weights_fp32;  // otherwise they are Elements
};

template <typename Element_, int kWidth_>
struct AttentionConfig {
  using Element = Element_;
  static constexpr int kWidth = kWidth_;                          // of a head
  static constexpr int kChunks = kWidth / 8;                      // of 16 bytes
  static constexpr int kRest = (kWidth - 64 + 15) / 16 * 16;      // columns of the narrow tile
  static constexpr int kRestBytes = kRest == 0 ? 32 : 2 * kRest;  // of its rows
  static constexpr int kTileBytes = kSlotRows * kSwizzleBytes;    // of 64 columns
  static constexpr int kKeyBytes = kTileBytes + kSlotRows * 2 * kRest;
  static constexpr int kValueRowBytes = 64;
  static constexpr int kValueTileBytes = kSlotRows * kValueRowBytes;
  static constexpr int kValueTiles = (kWidth + 31) / 32;
  static constexpr int kValueBytes = kValueTiles * kValueTileBytes;
  static constexpr int kSlotBytes = kValueBytes > kKeyBytes ? kValueBytes : kKeyBytes;
  static constexpr int kQuerySlots = 3;
  static constexpr int kKeySlots = kRest == 0 ? 8 : 6;  // keys and values by turns
  static constexpr int kSlots = kQuerySlots + kKeySlots;
  static constexpr int kWeightBytes = 4 * kWidth * 4;
  static constexpr int kOtherBytes = kWeightBytes + 3 * kSlots * 8 + 1024;  // with room to align the base
  static constexpr int kWeightsAt = kSlots * kSlotBytes;
  static constexpr int kBarriersAt = kWeightsAt + kWeightBytes;
  static constexpr int kDynamicBytes = kSlots * kSlotBytes + kOtherBytes;
  static_assert(kWidth % 8 == 0 && (kRest == 0 || kRest == 16 || kRest == 32), "no tile for the rest of a head");
  static_assert(kSlotBytes % 1024 == 0 && kDynamicBytes <= kMaxSharedBytes, "swizzled tiles that fit");
};

}  // namespace dit_moe::sm90
