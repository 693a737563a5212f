// How a warp multiplies: 16 MT x 8 NT accumulators, one form a precision, all with the layout of mma's D:
// lane 4 g + t holds of the 16 x 8 block (mt, nt) rows g (d[0], d[1]) and g + 8 (d[2], d[3]), columns 2t and
// 2t + 1.
//
// Operands lie in shared memory in rows of kRowBytes along the reduction, as 16-byte chunks; chunk c of row r
// is at place c ^ (r / 2 mod 4), so that 8 consecutive rows' chunks c lie in different banks (two rows are a
// line of 128 bytes).
#pragma once

#include <cstdint>

#include "tensor_core.cuh"

namespace maskcore {

constexpr int kRowBytes = 64;
constexpr int kRowChunks = kRowBytes / 16;

/// Where chunk 0 of a row is. Chunk c is at row_start(row) ^ 16 c; and 8 rows further, 512 bytes further.
__device__ __forceinline__ int row_start(int row) { return row * kRowBytes + (row >> 1 & 3) * 16; }
__device__ __forceinline__ int swizzled(int row, int chunk) { return row_start(row) ^ chunk * 16; }

/// mma.m16n8k8 on float32 rounded to TF32, 16 channels a row.
struct Tf32 {
  using Shared = float;
  static constexpr int kLanes = 4;
  static constexpr bool kFragments = true;

  static __device__ __forceinline__ uint4 pack(const float (&v)[4]) {
    return make_uint4(to_tf32(v[0]), to_tf32(v[1]), to_tf32(v[2]), to_tf32(v[3]));
  }
  /// Of a fragment that was copied into shared memory as it was.
  static __device__ __forceinline__ void round(uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = to_tf32(__uint_as_float(a[i]));
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_tf32(d, a, b);
  }
  template <int NT>
  static __device__ __forceinline__ void wgmma(float (&d)[NT][4], const uint32_t (&a)[4], uint64_t b) {
    wgmma_tf32(d, a, b);
  }
};

/// mma.m16n8k16 on bfloat16, 32 channels a row.
struct Bf16 {
  using Shared = struct bf16;
  static constexpr int kLanes = 8;
  static constexpr bool kFragments = true;

  static __device__ __forceinline__ uint4 pack(const float (&v)[8]) {
    return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                      pack_bf16(v[6], v[7]));
  }
  static __device__ __forceinline__ void round(uint32_t (&)[4]) {}
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_bf16(d, a, b);
  }
  template <int NT>
  static __device__ __forceinline__ void wgmma(float (&d)[NT][4], const uint32_t (&a)[4], uint64_t b) {
    wgmma_bf16(d, a, b);
  }
};

/// float32 multiply-adds, 16 channels a row.
struct Ieee {
  using Shared = float;
  static constexpr int kLanes = 4;
  static constexpr bool kFragments = false;

  static __device__ __forceinline__ uint4 pack(const float (&v)[4]) {
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                      __float_as_uint(v[3]));
  }
};

/// The rows of A that a lane names: each 16-row block's row lane % 16 for ldmatrix, or the two whose results
/// it holds.
template <class Math>
constexpr int kRowsPerBlock = Math::kFragments ? 1 : 2;

template <class Math>
__device__ __forceinline__ int named_row(int i, int lane) {
  return Math::kFragments ? 16 * i + (lane & 15) : 8 * i + (lane >> 2);
}

/// Lanes with the same one name the same rows.
template <class Math>
__device__ __forceinline__ int first_named_row(int lane) {
  return Math::kFragments ? lane & 15 : lane >> 2;
}

/// acc += A B over one row of kRowBytes. Row i of A that the lane names is a[byte i of rows + offset]; b is
/// the first of B's 8 NT rows, 8 rows are a whole number of swizzles.
template <class Math, int MT, int NT>
__device__ __forceinline__ void multiply_rows(float (&acc)[MT][NT][4], const unsigned char* a, uint32_t rows,
                                              int offset, const unsigned char* b, int lane) {
  const auto row = [=](int i) { return static_cast<int>(__byte_perm(rows, 0, 0x4440 + i)) + offset; };
  static_assert(NT % 2 == 0);
  if constexpr (Math::kFragments) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t b_fragment[NT / 2][4];
#pragma unroll
      for (int nt = 0; nt < NT / 2; ++nt) {
        const int n = (lane & 7) + (lane >> 4 << 3);
        ldmatrix_x4(b_fragment[nt], b + swizzled(n, 2 * step + (lane >> 3 & 1)) + 16 * nt * kRowBytes);
      }
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
        uint32_t a_fragment[4];
        ldmatrix_x4(a_fragment, a + swizzled(row(mt), 2 * step + (lane >> 4)));
        Math::round(a_fragment);
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          const uint32_t (&pair)[4] = b_fragment[nt / 2];
          Math::mma(acc[mt][nt], a_fragment, {pair[nt % 2 * 2], pair[nt % 2 * 2 + 1]});
        }
      }
    }
  } else {
    // Two blocks of columns at a time: 16 registers of B, each A read NT / 2 times.
#pragma unroll 1
    for (int chunk = 0; chunk < kRowChunks; ++chunk) {
#pragma unroll
      for (int nt = 0; nt < NT; nt += 2) {
        float4 b_values[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int n = 8 * (nt + j / 2) + j % 2;  // and 2 t, which alone is in the swizzle
          b_values[j] = *reinterpret_cast<const float4*>(b + swizzled(2 * (lane & 3), chunk) + n * kRowBytes);
        }
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
          const float4 a_values = *reinterpret_cast<const float4*>(a + swizzled(row(i), chunk));
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float& d = acc[i / 2][nt + j / 2][i % 2 * 2 + j % 2];
            d = fmaf(a_values.x, b_values[j].x, d);
            d = fmaf(a_values.y, b_values[j].y, d);
            d = fmaf(a_values.z, b_values[j].z, d);
            d = fmaf(a_values.w, b_values[j].w, d);
          }
        }
      }
    }
  }
}

}  // namespace maskcore
