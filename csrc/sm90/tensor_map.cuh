// Host side: descriptors for bulk tensor copies. The driver's encoder is looked up at run time, so that nothing links
// against libcuda and the module loads on a machine without a driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace dit_moe::sm90 {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result);
#endif
    const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return found ? reinterpret_cast<EncodeTiled>(entry) : nullptr;
  }();
  return function;
}

// Rank 2 to 4; sizes[0] are the elements of a row, strides are in bytes and begin with that of dimension 1. Boxes have
// 16, 32 or 64 elements in a row, and the swizzle of that width.
template <int kRank>
cudaError_t encode_map(CUtensorMap* map, const void* address, bool is_bf16, const cuuint64_t (&sizes)[kRank],
                       const cuuint64_t (&strides)[kRank - 1], int box_rows, int box_columns = 64) {
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  cuuint32_t box[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) box[i] = steps[i] = 1;
  box[0] = static_cast<cuuint32_t>(box_columns);
  box[1] = static_cast<cuuint32_t>(box_rows);
  const CUtensorMapSwizzle swizzle = box_columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : box_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                         : CU_TENSOR_MAP_SWIZZLE_32B;
  const CUresult result =
      encode(map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, kRank,
             const_cast<void*>(address), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// A stack of `depth` row-major matrices (rows, columns) of 16-bit elements, read in boxes of box_rows x 64 elements.
// depth = 0: a single matrix, with two coordinates.
inline cudaError_t make_map(CUtensorMap* map, const void* matrices, bool is_bf16, int64_t columns, int64_t rows,
                            int64_t depth, int box_rows) {
  const cuuint64_t width = columns, height = rows, stride = width * 2;
  if (depth == 0) return encode_map<2>(map, matrices, is_bf16, {width, height}, {stride}, box_rows);
  return encode_map<3>(map, matrices, is_bf16, {width, height, static_cast<cuuint64_t>(depth)},
                       {stride, stride * height}, box_rows);
}

// A row-major matrix of which each copy sees the rows [first, end) alone and zeros below them. Row r of them is read at
// the coordinates (column, kRaggedRows - (end - first) + r, end, kRaggedRows): the second meets its bound kRaggedRows
// at the end of the rows, and the others move its origin there. That makes the sum of all strides times coordinates
// kRaggedRows * 2^35 bytes too much, which is nothing in addresses of 64 bits. (The way of Triton's ragged_tma.py.)
constexpr int kRaggedRows = 1 << 30;

inline cudaError_t make_ragged_map(CUtensorMap* map, const void* matrix, bool is_bf16, int64_t columns, int box_rows) {
  constexpr cuuint64_t any = 0x7fff0000, whole = cuuint64_t{1} << 35;
  const cuuint64_t width = columns, stride = width * 2;
  return encode_map<4>(map, matrix, is_bf16, {width, kRaggedRows, any, any}, {stride, stride, whole - stride},
                       box_rows);
}

}  // namespace dit_moe::sm90
