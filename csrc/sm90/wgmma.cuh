// The warpgroup matrix instruction, D (64, kN) fp32 += A (64, 16) B (16, kN), and its shared-memory descriptors.
//
// Operand tiles have rows of 128 bytes in the 128-byte swizzle: 16-byte chunk c of row r lies at chunk c ^ (r % 8).
// Tiles start at multiples of 1024 bytes. Rows are rows of the matrix with 64 elements along K ("K-major"), or, for an
// operand stored the other way round ("transposed"), rows along K with 64 elements along M or N. Narrow tiles have rows
// of 64 or 32 bytes with the swizzle of that width: chunk c lies at c ^ (r / 2 % 4) or c ^ (r / 4 % 2).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

namespace dit_moe::sm90 {

constexpr int kSwizzleBytes = 128;  // a tile row
constexpr int kSwizzleRows = 8;     // the swizzle's period

// leading_bytes: for a transposed operand, from one column of a row's elements to the next; otherwise unused.
// The stride is that of 8 rows.
template <int kRowBytes = kSwizzleBytes>
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t address, uint32_t leading_bytes) {
  static_assert(kRowBytes == 128 || kRowBytes == 64 || kRowBytes == 32, "no swizzle of this width");
  constexpr uint64_t swizzle = uint64_t{kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3} << 62;
  constexpr uint64_t stride = uint64_t{kRowBytes * kSwizzleRows / 16} << 32;
  return swizzle | stride | uint64_t{leading_bytes / 16} << 16 | (address & 0x3ffff) / 16;
}

// Call before the first product of a batch, and after any other use of the accumulators.
__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending of the committed batches are unfinished.
template <int kPending>
__device__ __forceinline__ void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of these registers across this point.
template <int kCount>
__device__ __forceinline__ void pin(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(values[i])::"memory");
}

// Operands 0 to kN / 2 - 1 of the instruction are the accumulators, written here in eights.
#define DIT_MOE_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define DIT_MOE_R1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define DIT_MOE_R2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define DIT_MOE_R3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define DIT_MOE_R4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define DIT_MOE_R5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define DIT_MOE_R6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define DIT_MOE_R7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define DIT_MOE_R8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define DIT_MOE_R9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define DIT_MOE_R10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define DIT_MOE_R11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define DIT_MOE_R12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define DIT_MOE_R13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define DIT_MOE_R14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define DIT_MOE_R15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define DIT_MOE_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define DIT_MOE_D8(i) DIT_MOE_D4(8 * i), DIT_MOE_D4(8 * i + 4)

// The last arguments are the accumulators' constraints; the five before them number the operands that follow.
#define DIT_MOE_MMA(N, TYPE, REGISTERS, A, B, ACCUMULATE, TRANSPOSE_A, TRANSPOSE_B, ...)                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE                                                \
               ", 0;\n"                                                                                      \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " A ", " B \
               ", p, 1, 1, " TRANSPOSE_A ", " TRANSPOSE_B ";\n}\n"                                           \
               : __VA_ARGS__                                                                                 \
               : "l"(a), "l"(b), "r"(accumulate), "n"(int{kTransposeA}), "n"(int{kTransposeB}))

// Registers and constraints of an instruction with that many columns.
#define DIT_MOE_R_16 DIT_MOE_R0
#define DIT_MOE_D_16 DIT_MOE_D8(0)
#define DIT_MOE_R_32 DIT_MOE_R_16 ", " DIT_MOE_R1
#define DIT_MOE_D_32 DIT_MOE_D_16, DIT_MOE_D8(1)
#define DIT_MOE_R_48 DIT_MOE_R_32 ", " DIT_MOE_R2
#define DIT_MOE_D_48 DIT_MOE_D_32, DIT_MOE_D8(2)
#define DIT_MOE_R_64 DIT_MOE_R_48 ", " DIT_MOE_R3
#define DIT_MOE_D_64 DIT_MOE_D_48, DIT_MOE_D8(3)
#define DIT_MOE_R_80 DIT_MOE_R_64 ", " DIT_MOE_R4
#define DIT_MOE_D_80 DIT_MOE_D_64, DIT_MOE_D8(4)
#define DIT_MOE_R_96 DIT_MOE_R_80 ", " DIT_MOE_R5
#define DIT_MOE_D_96 DIT_MOE_D_80, DIT_MOE_D8(5)
#define DIT_MOE_R_112 DIT_MOE_R_96 ", " DIT_MOE_R6
#define DIT_MOE_D_112 DIT_MOE_D_96, DIT_MOE_D8(6)
#define DIT_MOE_R_128 DIT_MOE_R_112 ", " DIT_MOE_R7
#define DIT_MOE_D_128 DIT_MOE_D_112, DIT_MOE_D8(7)
#define DIT_MOE_R_144 DIT_MOE_R_128 ", " DIT_MOE_R8
#define DIT_MOE_D_144 DIT_MOE_D_128, DIT_MOE_D8(8)
#define DIT_MOE_R_160 DIT_MOE_R_144 ", " DIT_MOE_R9
#define DIT_MOE_D_160 DIT_MOE_D_144, DIT_MOE_D8(9)
#define DIT_MOE_R_176 DIT_MOE_R_160 ", " DIT_MOE_R10
#define DIT_MOE_D_176 DIT_MOE_D_160, DIT_MOE_D8(10)
#define DIT_MOE_R_192 DIT_MOE_R_176 ", " DIT_MOE_R11
#define DIT_MOE_D_192 DIT_MOE_D_176, DIT_MOE_D8(11)
#define DIT_MOE_R_208 DIT_MOE_R_192 ", " DIT_MOE_R12
#define DIT_MOE_D_208 DIT_MOE_D_192, DIT_MOE_D8(12)
#define DIT_MOE_R_224 DIT_MOE_R_208 ", " DIT_MOE_R13
#define DIT_MOE_D_224 DIT_MOE_D_208, DIT_MOE_D8(13)
#define DIT_MOE_R_240 DIT_MOE_R_224 ", " DIT_MOE_R14
#define DIT_MOE_D_240 DIT_MOE_D_224, DIT_MOE_D8(14)
#define DIT_MOE_R_256 DIT_MOE_R_240 ", " DIT_MOE_R15
#define DIT_MOE_D_256 DIT_MOE_D_240, DIT_MOE_D8(15)

// The odd eighths that heads of attention have.
#define DIT_MOE_R_72 DIT_MOE_R_64 ", %32, %33, %34, %35"
#define DIT_MOE_D_72 DIT_MOE_D_64, DIT_MOE_D4(32)
#define DIT_MOE_R_88 DIT_MOE_R_80 ", %40, %41, %42, %43"
#define DIT_MOE_D_88 DIT_MOE_D_80, DIT_MOE_D4(40)

// One width; A and the four numbers after it are those of the operands behind the accumulators.
#define DIT_MOE_MMA_WIDTH(N, A, B, C, D, E)                                                         \
  if constexpr (kN == N) {                                                                          \
    if constexpr (is_bf16) {                                                                        \
      DIT_MOE_MMA(N, "bf16", DIT_MOE_R_##N, "%" #A, "%" #B, "%" #C, "%" #D, "%" #E, DIT_MOE_D_##N); \
    } else {                                                                                        \
      DIT_MOE_MMA(N, "f16", DIT_MOE_R_##N, "%" #A, "%" #B, "%" #C, "%" #D, "%" #E, DIT_MOE_D_##N);  \
    }                                                                                               \
  }

// d = a b + (accumulate ? d : 0), asynchronously, kN being a multiple of 16. Lane l of warp w holds rows 16 w + l / 4
// (+ 8) and columns 8 j + 2 (l % 4) (+ 1): d[4 j], d[4 j + 1] in the first row, d[4 j + 2], d[4 j + 3] in the second.
template <typename Element, int kN, bool kTransposeA, bool kTransposeB>
__device__ __forceinline__ void mma(float* d, uint64_t a, uint64_t b, int accumulate) {
  constexpr bool is_bf16 = std::is_same_v<Element, __nv_bfloat16>;
  static_assert(is_bf16 || std::is_same_v<Element, __half>, "bf16 or fp16");
  static_assert(kN % 16 == 0 && kN > 0 && kN <= 256, "no instruction of this width here");
  DIT_MOE_MMA_WIDTH(16, 8, 9, 10, 11, 12)
  DIT_MOE_MMA_WIDTH(32, 16, 17, 18, 19, 20)
  DIT_MOE_MMA_WIDTH(48, 24, 25, 26, 27, 28)
  DIT_MOE_MMA_WIDTH(64, 32, 33, 34, 35, 36)
  DIT_MOE_MMA_WIDTH(80, 40, 41, 42, 43, 44)
  DIT_MOE_MMA_WIDTH(96, 48, 49, 50, 51, 52)
  DIT_MOE_MMA_WIDTH(112, 56, 57, 58, 59, 60)
  DIT_MOE_MMA_WIDTH(128, 64, 65, 66, 67, 68)
  DIT_MOE_MMA_WIDTH(144, 72, 73, 74, 75, 76)
  DIT_MOE_MMA_WIDTH(160, 80, 81, 82, 83, 84)
  DIT_MOE_MMA_WIDTH(176, 88, 89, 90, 91, 92)
  DIT_MOE_MMA_WIDTH(192, 96, 97, 98, 99, 100)
  DIT_MOE_MMA_WIDTH(208, 104, 105, 106, 107, 108)
  DIT_MOE_MMA_WIDTH(224, 112, 113, 114, 115, 116)
  DIT_MOE_MMA_WIDTH(240, 120, 121, 122, 123, 124)
  DIT_MOE_MMA_WIDTH(256, 128, 129, 130, 131, 132)
}

// The same with A in registers, of which lane l of warp w holds elements (16 w + l / 4, 2 (l % 4)) and its neighbour,
// the pair 8 rows below, and both once more 8 columns on; B is transposed.
#define DIT_MOE_MMA_REGISTERS(N, TYPE, REGISTERS, A0, A1, A2, A3, B, ACCUMULATE, ...)                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE                                                   \
               ", 0;\n"                                                                                         \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, {" A0 ", " A1 \
               ", " A2 ", " A3 "}, " B ", p, 1, 1, 1;\n}\n"                                                     \
               : __VA_ARGS__                                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

#define DIT_MOE_MMA_REGISTERS_WIDTH(N, A0, A1, A2, A3, B, C)                                              \
  if constexpr (kN == N) {                                                                                \
    if constexpr (is_bf16) {                                                                              \
      DIT_MOE_MMA_REGISTERS(N, "bf16", DIT_MOE_R_##N, "%" #A0, "%" #A1, "%" #A2, "%" #A3, "%" #B, "%" #C, \
                            DIT_MOE_D_##N);                                                               \
    } else {                                                                                              \
      DIT_MOE_MMA_REGISTERS(N, "f16", DIT_MOE_R_##N, "%" #A0, "%" #A1, "%" #A2, "%" #A3, "%" #B, "%" #C,  \
                            DIT_MOE_D_##N);                                                               \
    }                                                                                                     \
  }

template <typename Element, int kN>
__device__ __forceinline__ void mma_registers(float (&d)[kN / 2], const uint32_t* a, uint64_t b, int accumulate) {
  constexpr bool is_bf16 = std::is_same_v<Element, __nv_bfloat16>;
  static_assert(is_bf16 || std::is_same_v<Element, __half>, "bf16 or fp16");
  static_assert(kN == 64 || kN == 72 || kN == 88, "no instruction of this width here");
  DIT_MOE_MMA_REGISTERS_WIDTH(64, 32, 33, 34, 35, 36, 37)
  DIT_MOE_MMA_REGISTERS_WIDTH(72, 36, 37, 38, 39, 40, 41)
  DIT_MOE_MMA_REGISTERS_WIDTH(88, 44, 45, 46, 47, 48, 49)
}

}  // namespace dit_moe::sm90
