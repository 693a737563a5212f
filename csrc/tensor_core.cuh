// The instructions of sm_80 that C++ has no words for, one function an instruction: asynchronous copies into
// shared memory, matrix loads, matrix products, conversions; and of sm_90a the products of a warpgroup. The
// only file with inline PTX. Under MASKCORE_CUDA_EMULATION tests/cuda_emulator supplies the same functions.
//
// Fragments, as the PTX ISA lays them over a warp; lane = 4 g + t, so g = 0..7 and t = 0..3:
//   mma_tf32  A 16 x 8   a[0..3] = (g, t)  (g+8, t)  (g, t+4)  (g+8, t+4)
//             B  8 x 8   b[0..1] = (k = t, n = g)  (t+4, g)
//   mma_bf16  A 16 x 16  a[0..3] = (g, 2t..2t+1)  (g+8, 2t..)  (g, 2t+8..2t+9)  (g+8, 2t+8..)
//             B 16 x 8   b[0..1] = (k = 2t..2t+1, n = g)  (2t+8.., g)            low half = lower index
//   both      D 16 x 8   d[0..3] = (g, 2t)  (g, 2t+1)  (g+8, 2t)  (g+8, 2t+1)
//   ldmatrix  lane i of 8j..8j+7 names row i - 8j of the j-th 8 x 8 matrix of 16-bit elements; r[j] = (g,
//   2t..2t+1)
//             of it, or of its transpose. Rows of 4 floats are such rows: r[j] = (g, t), never transposed.
#pragma once

#ifdef MASKCORE_CUDA_EMULATION
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>

#include <cstdint>

// Of sm_90a alone, as which sm_90 is compiled (setup.py); elsewhere no launcher starts what uses wgmma.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define MASKCORE_WGMMA
#endif

namespace maskcore {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// cp.async.cg.shared.global: 16 bytes past L1, both addresses multiples of 16; zeros where not valid, and
// then global is not read. Only the thread that copied may read them after cp_async_wait; the others after a
// barrier that follows it.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// cp.async.ca.shared.global: 8 bytes through L1.
__device__ __forceinline__ void cp_async_8(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 8 : 0)
               : "memory");
}

// cp.async.ca.shared.global: 4 bytes through L1.
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}

// prefetch.global.L2: the line that holds the byte is on its way to L2; no register waits for it.
__device__ __forceinline__ void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(global));
}

// cp.async.commit_group: this thread's copies since the last commit become one group, which may be empty.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// cp.async.wait_group: returns when all but the latest kPending groups of this thread have arrived.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// ldmatrix.sync.aligned.m8n8.x4.shared.b16: four 8 x 8 matrices; all 32 lanes name a row of 16 aligned bytes.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16: the same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// ldmatrix.sync.aligned.m8n8.x2.shared.b16: two matrices, rows named by lanes 0..15.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
}

// ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
}

// ldmatrix.sync.aligned.m8n8.x1.shared.b16: one matrix, rows named by lanes 0..7.
__device__ __forceinline__ void ldmatrix_x1(uint32_t (&r)[1], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];\n"
               : "=r"(r[0])
               : "r"(shared_address(shared_row))
               : "memory");
}

// mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32: d += a b. The low 13 bits of an operand are ignored,
// that is, cut off: round with to_tf32 first.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32: d += a b.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- sm_90a: the products of a warpgroup, which is four warps from a multiple of four on ---------

// fence.proxy.async: what this thread has written to shared memory, cp.async's copies that it has waited for
// included, may be read by the wgmmas that follow, those of other warps after a barrier.
__device__ __forceinline__ void wgmma_operand_fence() {
#ifdef MASKCORE_WGMMA
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

// wgmma.fence: registers that this warp has written may be read by the wgmmas that follow.
__device__ __forceinline__ void wgmma_fence() {
#ifdef MASKCORE_WGMMA
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}

// wgmma.commit_group: this warp's wgmmas since the last commit become one group.
__device__ __forceinline__ void wgmma_commit() {
#ifdef MASKCORE_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}

// wgmma.wait_group: returns when all but the latest kPending groups of this warp have been computed. Until
// then their sums may not be read, their fragments and operands in shared memory not be written.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
#ifdef MASKCORE_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
#endif
}

#define MASKCORE_16_SUMS(i)                                                                          \
  "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3]), "+f"(d[i + 1][0]), "+f"(d[i + 1][1]),  \
      "+f"(d[i + 1][2]), "+f"(d[i + 1][3]), "+f"(d[i + 2][0]), "+f"(d[i + 2][1]), "+f"(d[i + 2][2]), \
      "+f"(d[i + 2][3]), "+f"(d[i + 3][0]), "+f"(d[i + 3][1]), "+f"(d[i + 3][2]), "+f"(d[i + 3][3])
#define MASKCORE_WGMMA_64_COLUMNS(depth_and_types, of_b)                                                     \
  asm volatile(                                                                                              \
      "wgmma.mma_async.sync.aligned.m64n64" depth_and_types                                                  \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "         \
      "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1" of_b \
      ";\n"                                                                                                  \
      : MASKCORE_16_SUMS(0), MASKCORE_16_SUMS(4)                                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define MASKCORE_WGMMA_128_COLUMNS(depth_and_types, of_b)                                               \
  asm volatile(                                                                                         \
      "wgmma.mma_async.sync.aligned.m64n128" depth_and_types                                            \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "    \
      "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, " \
      "%39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, " \
      "%58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1" of_b ";\n"                    \
      : MASKCORE_16_SUMS(0), MASKCORE_16_SUMS(4), MASKCORE_16_SUMS(8), MASKCORE_16_SUMS(12)             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// wgmma.mma_async.sync.aligned.m64n(8 NT)k16.f32.bf16.bf16: d += a b. Of the 64 rows of a each of the four
// warps holds 16, as mma_bf16's A, and of the sums mma's D of its rows and the columns from 8 i on in d[i]; b
// is the matrix descriptor of 8 NT rows, the same for all threads.
template <int NT>
__device__ __forceinline__ void wgmma_bf16(float (&d)[NT][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(NT == 8 || NT == 16);
#ifdef MASKCORE_WGMMA
  if constexpr (NT == 8) {
    MASKCORE_WGMMA_64_COLUMNS("k16.f32.bf16.bf16", ", 0");
  } else {
    MASKCORE_WGMMA_128_COLUMNS("k16.f32.bf16.bf16", ", 0");
  }
#endif
}

// The same of a b whose descriptor is wgmma_columns': imm-trans-b, which TF32 does not have.
template <int NT>
__device__ __forceinline__ void wgmma_bf16_trans(float (&d)[NT][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(NT == 8);
#ifdef MASKCORE_WGMMA
  MASKCORE_WGMMA_64_COLUMNS("k16.f32.bf16.bf16", ", 1");
#endif
}

// wgmma.mma_async.sync.aligned.m64n(8 NT)k8.f32.tf32.tf32: the same, a as mma_tf32's A.
template <int NT>
__device__ __forceinline__ void wgmma_tf32(float (&d)[NT][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(NT == 8 || NT == 16);
#ifdef MASKCORE_WGMMA
  if constexpr (NT == 8) {
    MASKCORE_WGMMA_64_COLUMNS("k8.f32.tf32.tf32", "");
  } else {
    MASKCORE_WGMMA_128_COLUMNS("k8.f32.tf32.tf32", "");
  }
#endif
}
#undef MASKCORE_WGMMA_128_COLUMNS
#undef MASKCORE_WGMMA_64_COLUMNS
#undef MASKCORE_16_SUMS

// cvt.rna.tf32.f32: to the nearest number with 10 mantissa bits, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "f"(x));
  return rounded;
}

// cvt.rn.bf16x2.f32: two bfloat16, each to the nearest, ties to even; lo in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

// cvt.rn.relu.bf16x2.f32: the same of max(lo, 0) and max(hi, 0); 0x7fff, a NaN, of a NaN.
__device__ __forceinline__ uint32_t pack_relu_bf16(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

// max.NaN.bf16x2: of each half the larger one, +0 above -0; 0x7fff, a NaN, where either is one.
__device__ __forceinline__ uint32_t max_nan_bf16(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.NaN.bf16x2 %0, %1, %2;\n" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}

// prmt.b32 with replicated signs: the lower half is all ones where byte kLow of x has its upper bit set, else
// zeros, the upper half so by byte kHigh.
template <int kLow, int kHigh>
__device__ __forceinline__ uint32_t sign_masks(uint32_t x) {
  uint32_t masks;
  asm("prmt.b32 %0, %1, 0, %2;\n" : "=r"(masks) : "r"(x), "n"(0x8888 + kLow * 0x0011 + kHigh * 0x1100));
  return masks;
}

}  // namespace maskcore
#endif

namespace maskcore {

// threadIdx.x, read anew each time: what is computed from it is not kept in registers from one call to the
// next.
__device__ __forceinline__ int fresh_thread() {
#ifdef MASKCORE_CUDA_EMULATION
  return static_cast<int>(threadIdx.x);
#else
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  __builtin_assume(thread >= 0 && thread < 1024);  // its quotients need no care of signs
  return thread;
#endif
}

// The same value, which is then kept in one register, not made again of those it came from.
__device__ __forceinline__ int in_a_register(int value) {
#ifndef MASKCORE_CUDA_EMULATION
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// Waits for all wgmmas; their sums are read after it.
template <int NT>
__device__ __forceinline__ void wgmma_wait_for(float (&d)[NT][4]) {
  wgmma_wait<0>();
#ifndef MASKCORE_CUDA_EMULATION
#pragma unroll
  for (int i = 0; i < NT; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(d[i][j])::"memory");
  }
#else
  (void)d;
#endif
}

// The matrix descriptor of rows of 64 bytes along the reduction, whose 16-byte chunks are swizzled by bits 7
// and 8 of their addresses ("64-Byte swizzling mode", K-major): eight rows further, 512 bytes further. `rows`
// is the first of them, on a multiple of 512 bytes, or 32 bytes behind it, where the next step's operand
// begins.
__device__ __forceinline__ uint64_t wgmma_rows_of_64(const void* rows) {
  constexpr uint64_t kSwizzle64 = 2, kUnused = 1, kEightRows = 512;
  return kSwizzle64 << 62 | kEightRows >> 4 << 32 | kUnused << 16 | (shared_address(rows) & 0x3ffffu) >> 4;
}

// The matrix descriptor of an operand whose reduction goes over rows of 16 bytes, eight adjacent columns of
// bfloat16 each ("no-swizzle mode", MN-major): eight rows lie one behind the other from `first` on, the next
// eight of a step's sixteen `eight_rows` bytes further, the next eight columns `eight_columns` bytes further;
// all multiples of 16.
__device__ __forceinline__ uint64_t wgmma_columns(const void* first, int eight_rows, int eight_columns) {
  const auto encoded = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffffu) >> 4); };
  return encoded(static_cast<uint32_t>(eight_columns)) << 32 |
         encoded(static_cast<uint32_t>(eight_rows)) << 16 | encoded(shared_address(first));
}

// That of the same operand from `sixteens` times 16 bytes further on. In 32 bits, which its beginning does
// not leave: a carry into the upper half would be computed, where that is a constant.
__device__ __forceinline__ uint64_t wgmma_columns_from(uint64_t columns, int sixteens) {
  constexpr uint64_t kUpper = 0xffffffffull << 32;
  return (columns & kUpper) | (static_cast<uint32_t>(columns) + static_cast<uint32_t>(sixteens));
}

// The inverse of pack_bf16, exact: a bfloat16 is a float's upper half.
__device__ __forceinline__ float2 unpack_bf16(uint32_t packed) {
  return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
}

}  // namespace maskcore
