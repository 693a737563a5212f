// 3x3 convolution of pictures, C <= 3 input channels: forward, and the filter's gradient. The halo tile's
// slabs of 16 or 32 channels would be padding for the most part, and nine taps of it. Here the 9 C numbers
// that an output pixel is made of are one row of a matrix:
//   col[pixel][tap, c] = x[n, p + r - padding, q + s - padding, c],   zeros up to whole slabs of 64 bytes
//   out[pixel][k] = sum over i of col[pixel][i] w[k][i]
//   dw[k][i] = sum over pixels of g[pixel][k] col[pixel][i]
// One slab of 32 in bf16 and two of 16 in float32 for C = 3 (27 numbers) where the halo tile has nine and
// nine. The patch of x under a tile is brought into shared memory as float32, element by element: rows of a
// picture are contiguous, but nothing in them is aligned. There a thread gathers its own pixel's row, which
// only its warp reads: two barriers a tile, for the patch and its position. The next tile's patch is loaded
// meanwhile.
//
// Both are bound by memory (an image of 256 x 256: 4.1 MB out in bf16, 0.11 GFLOP); what they do beside must
// fit into the time that memory takes, of 32 pixels of 3 -> 32 channels on an A100 (13.4 bytes a cycle, SM):
//   forward, bf16   32 * (64 + 6) bytes = 167 cycles. Shared memory, in lines of 128 bytes: 27 of the patch,
//                   16 + 16 of rows written and read, 16 of filter, 64 of sums staged, and with moments 12 of
//                   pivots: 151
//   forward, TF32   32 * (128 + 12) = 334 cycles; 27 + 32 + 32 + 32 + 64 + 12 = 199
//   gradient, bf16  32 * (2 * 64 + 6) = 320 cycles; 27 + 16 + 16 of rows, 16 + 16 of g: 91
//
// Budget
//   shared     forward: two patches of 192 * 3 floats, filter 2 or 4 KB, of each warp 2,560 bytes (bf16) or
//              4,096 of rows, over which sums are staged, records 1,552: 18,576 bytes in bf16, 26,768 in
//              TF32, three blocks in 100 KB. gradient: two patches of 384 * 3 floats and of each of 8 warps
//              (16 + 32) * 80 bytes in bf16, 160 in float32, at least 40,960 of sums: 40,960 and 70,688, of
//              which 100 KB hold one
//   registers  forward: 32 accumulators, 12 of fragments, 5 of the next patch: within 65,536 / (4 * 128) =
//              128. gradient: 32 accumulators, 12 of fragments, 8 of the bias, 16 to 38 of g on its way, 5 of
//              the patch: within 65,536 / (2 * 256) = 128
//   occupancy  forward: 4 blocks * 4 = 16 warps of 64 (25 %), 3 * 4 = 12 of 48 (25 %); gradient: 2 blocks * 8
//              = 16 of 64 (25 %), one of 100 KB 8 of 48 (17 %) in float32, whose loads, 8 warps * 2 KB, are
//              more than such an SM gets in a microsecond (RTX 4090: 8 KB)
//
// C = 4 would be 36 numbers, two slabs in bf16 as of the halo tile's nine; no picture has four channels here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "conv_halo_tile.cuh"
#include "conv_weight_gradient.cuh"

namespace maskcore {

constexpr int kPictureChannels = 3;

/// What the two kernels share. Channels that x lacks are zeros.
template <class Math_, int kThreads_, int kPatch_>
struct PictureTile {
  using Math = Math_;
  static constexpr int kChannels = kPictureChannels, kTileN = 32, MT = 2, NT = 4;
  static constexpr int kThreads = kThreads_, kWarps = kThreads / 32;
  static constexpr int kTileM = kThreads;  // pixels: a thread gathers one
  static constexpr int kPixels = kTileM, kMaxPatch = kPatch_;
  static constexpr int kPatchFloats = kMaxPatch * kChannels;
  static constexpr int kLoads = (kPatchFloats + kThreads - 1) / kThreads;
  static constexpr int kNumbers = kTaps * kChannels;  // of a row, as they are
  static constexpr int kSlab = kRowChunks * Math::kLanes;
};

/// A tile's patch, [pixel][kChannels] as float32, on its way from memory through registers.
template <class Tile, class T>
struct PicturePatch {
  float v[Tile::kLoads];

  static __device__ __forceinline__ bool has(int i, const Tiling& tiling) {
    return static_cast<int>(threadIdx.x) + i * Tile::kThreads < tiling.patch_pixels * Tile::kChannels;
  }
  __device__ __forceinline__ void start(const Activation<T>& x, const Tiling& tiling,
                                        const Tiling::Position& at) {
#pragma unroll
    for (int i = 0; i < Tile::kLoads; ++i) {
      const int number = static_cast<int>(threadIdx.x) + i * Tile::kThreads;
      const int pixel = number / Tile::kChannels, c = number % Tile::kChannels;
      v[i] = 0.0f;
      if (has(i, tiling) && c < x.C) {
        const Pixel from = tiling.input(at, pixel);
        if (from.inside) v[i] = element(*x.at(from, c));
      }
    }
  }
  __device__ __forceinline__ void finish(const Tiling& tiling, float* patch) const {
#pragma unroll
    for (int i = 0; i < Tile::kLoads; ++i) {
      if (has(i, tiling)) patch[static_cast<int>(threadIdx.x) + i * Tile::kThreads] = v[i];
    }
  }

 private:
  static __device__ __forceinline__ float element(float v) { return v; }
  static __device__ __forceinline__ float element(bf16 v) {
    return __uint_as_float(static_cast<uint32_t>(v.bits) << 16);
  }
};

/// A pixel's row of kNumbers, whose window begins at `window`, in chunks of 16 bytes: store(chunk, packed).
template <class Tile, int kChunks, class Store>
__device__ __forceinline__ void gather_row(const float* window, int pitch, Store store) {
  constexpr int kLanes = Tile::Math::kLanes, C = Tile::kChannels;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    float v[kLanes];
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      const int i = chunk * kLanes + lane, r = i / (3 * C);
      v[lane] = i < Tile::kNumbers ? window[r * pitch * C + i - r * 3 * C] : 0.0f;
    }
    store(chunk, Tile::Math::pack(v));
  }
}

// ---- forward -------------------------------------------------------------------------------------

/// Four warps of 32 pixels x 32 output channels.
template <class Math>
struct FirstLayerTile : PictureTile<Math, 128, kPatchPixels> {
  using Base = PictureTile<Math, 128, kPatchPixels>;
  static constexpr int kWarpsM = Base::kWarps, kWarpsN = 1, kBlocks = 4;
  static constexpr int kSlabs = (Base::kNumbers + Base::kSlab - 1) / Base::kSlab;
  static constexpr int kFilterBytes = kSlabs * Base::kTileN * kRowBytes;
  // A warp's sums are staged where its rows were.
  static constexpr int kWarpBytes = std::max(kSlabs * 32 * kRowBytes, kStageBytes);
  static constexpr int kPatchBegin = 128;  // behind two positions
  static constexpr int kFilterBegin = kPatchBegin + 2 * Base::kPatchFloats * 4;
  static constexpr int kRowsBegin = kFilterBegin + kFilterBytes;
  static constexpr int kRecordsBegin = kRowsBegin + Base::kWarps * kWarpBytes;
  static constexpr int kSharedBytes = kRecordsBegin + (kWarpsM * 3 * Base::kTileN + Base::kWarps) * 4;
  static_assert(kFilterBegin % 128 == 0 && kRowsBegin % 128 == 0 && kWarpBytes % 128 == 0);
};

template <class T, class Epilogue>
struct FirstLayerConvolution {
  Tiling tiling;
  Activation<T> x;
  Epilogue epilogue;
  const float* weight;  // [K,C,3,3]
  int k_tiles;
};

/// A block goes through tiles, tile + gridDim.x / k_tiles the next, with the filter of 32 output channels.
template <class Tile, class T, class Epilogue>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    conv_first_layer_kernel(const FirstLayerConvolution<T, Epilogue> conv) {
  using Math = typename Tile::Math;
  int4* const positions = dynamic_shared<int4>();  // of this tile and of the next one
  unsigned char* const shared = dynamic_shared<unsigned char>();
  float* const patches = reinterpret_cast<float*>(shared + Tile::kPatchBegin);
  unsigned char* const filter = shared + Tile::kFilterBegin;
  float* const records = reinterpret_cast<float*>(shared + Tile::kRecordsBegin);
  float* const pixels = records + Tile::kWarpsM * 3 * Tile::kTileN;  // of each warp
  const Tiling& tiling = conv.tiling;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  unsigned char* const rows = shared + Tile::kRowsBegin + warp * Tile::kWarpBytes;
  const int k0 = static_cast<int>(blockIdx.x) % conv.k_tiles * Tile::kTileN;
  const int stride = static_cast<int>(gridDim.x) / conv.k_tiles;
  int tile = static_cast<int>(blockIdx.x) / conv.k_tiles;

  if (thread < 2) tiling.store_position(tile + thread * stride, positions + thread);
  for (int i = thread; i < Tile::kFilterBytes / 16; i += Tile::kThreads) {
    const int chunk = i % kRowChunks, row = i / kRowChunks % Tile::kTileN;
    float v[Math::kLanes];
#pragma unroll
    for (int j = 0; j < Math::kLanes; ++j) {
      const int number = (i / kRowChunks / Tile::kTileN * kRowChunks + chunk) * Math::kLanes + j;
      const int tap = number / Tile::kChannels, c = number % Tile::kChannels;
      const bool there = tap < kTaps && c < conv.x.C && k0 + row < conv.epilogue.K;
      v[j] = there ? conv.weight[(static_cast<int64_t>(k0 + row) * conv.x.C + c) * kTaps + tap] : 0.0f;
    }
    *reinterpret_cast<uint4*>(filter + i / kRowChunks / Tile::kTileN * Tile::kTileN * kRowBytes +
                              swizzled(row, chunk)) = Math::pack(v);
  }
  uint32_t named = 0;
#pragma unroll
  for (int i = 0; i < Tile::MT * kRowsPerBlock<Math>; ++i) {
    named |= static_cast<uint32_t>(named_row<Math>(i, lane)) << (8 * i);
  }
  {
    PicturePatch<Tile, T> first;
    first.start(conv.x, tiling, tiling.position(tile));
    first.finish(tiling, patches);
  }

#pragma unroll 1
  for (int turn = 0;; turn ^= 1) {
    __syncthreads();  // the patch is there, the other one is free
    const Tiling::Position at = Tiling::load(positions + turn);
    const bool more = tile + stride < tiling.tiles;
    PicturePatch<Tile, T> next;
    if (more) next.start(conv.x, tiling, Tiling::load(positions + (turn ^ 1)));
    const float* const window = patches + turn * Tile::kPatchFloats +
                                tiling.window(at, tiling.place<Epilogue::kWindows>(thread)) * Tile::kChannels;
    gather_row<Tile, Tile::kSlabs * kRowChunks>(window, tiling.pitch, [&](int chunk, const uint4& packed) {
      *reinterpret_cast<uint4*>(rows + chunk / kRowChunks * 32 * kRowBytes +
                                swizzled(lane, chunk % kRowChunks)) = packed;
    });
    __syncwarp();  // the warp's rows are there
    float acc[Tile::MT][Tile::NT][4] = {};
#pragma unroll 1
    for (int slab = 0; slab < Tile::kSlabs; ++slab) {
      multiply_rows<Math>(acc, rows + slab * 32 * kRowBytes, named, 0,
                          filter + slab * Tile::kTileN * kRowBytes, lane);
    }
    if (more) next.finish(tiling, patches + (turn ^ 1) * Tile::kPatchFloats);
    store_warp<Tile>(acc, tiling, at, conv.epilogue, 32 * warp, k0, reinterpret_cast<float*>(rows),
                     records + warp * 3 * Tile::kTileN, pixels + warp);
    if constexpr (Epilogue::kStatistics) {
      __syncthreads();
      store_moments<Tile>(thread, records, pixels, tiling, at, tile, k0, conv.epilogue);
    }
    if (!more) return;
    __syncthreads();  // all have read this tile's position
    if (thread == 0) tiling.store_position(tile + 2 * stride, positions + turn);
    tile += stride;
  }
}

// ---- the filter's gradient -----------------------------------------------------------------------

/// Eight warps, each with the sums of 32 output channels x all numbers over its own 32 pixels of a tile.
template <class Math>
struct FirstLayerGradientTile : PictureTile<Math, 256, 384> {
  using Base = PictureTile<Math, 256, 384>;
  static constexpr int MT = Base::MT, NT = Base::NT, kBlocks = 2;
  static constexpr int kTileK = Base::kTileN, kTileC = Base::kChannels;
  static_assert(kTileK == 32 && 8 * NT == 32 && Base::kNumbers <= 32);
  static constexpr int kChunks = 32 / Math::kLanes;  // of a pixel's numbers, and of its channels of g
  // A pixel's row of either is 80 bytes, 8 rows of which lie in different banks, or 160, of which 4 rows' 8
  // floats do.
  static constexpr int kRow = 80 * 8 / Math::kLanes;
  static constexpr int kHalf = 16;  // pixels of g at a time: all 32 would leave an A100 room for one block
  static constexpr int kItems = kHalf * kChunks / 32;  // of g, a lane
  static constexpr int kPatchBegin = 2 * 16;
  static constexpr int kRowsBegin = kPatchBegin + 2 * Base::kPatchFloats * 4;
  static constexpr int kWarpBytes = (kHalf + 32) * kRow;
  // At the end the warps' sums and the lanes' bias lie in all of it.
  static constexpr int kWarpSums = 32 * 8 * NT;
  static constexpr int kSumBytes = (Base::kWarps * kWarpSums + Base::kThreads * Math::kLanes) * 4;
  static constexpr int kSharedBytes = std::max(kRowsBegin + Base::kWarps * kWarpBytes, kSumBytes);

  /// acc += the products of kHalf pixels: rows g and columns col, [pixel][kRow bytes] both.
  static __device__ __forceinline__ void multiply(float (&acc)[MT][NT][4], const unsigned char* g,
                                                  const unsigned char* col, int lane) {
    if constexpr (std::is_same_v<Math, Bf16>) {
      uint32_t a[MT][4];
      const unsigned char* const from = g + ((lane & 7) + (lane >> 4 << 3)) * kRow + (lane >> 3 & 1) * 16;
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) ldmatrix_x4_trans(a[mt], from + 32 * mt);
#pragma unroll
      for (int nt = 0; nt < NT; nt += 2) {  // lanes 16..31 name the second one's rows
        uint32_t b[4];
        ldmatrix_x4_trans(b, col + (lane & 15) * kRow + (nt + (lane >> 4)) * 16);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
          mma_bf16(acc[mt][nt], a[mt], {b[0], b[1]});
          mma_bf16(acc[mt][nt + 1], a[mt], {b[2], b[3]});
        }
      }
    } else if constexpr (std::is_same_v<Math, Tf32>) {
      const int offset = (lane & 3) * kRow + (lane >> 2) * 4;
#pragma unroll 1
      for (int pixel = 0; pixel < kHalf; pixel += 8) {
        const auto at = [&](const unsigned char* of, int pixels, int channels) {
          return *reinterpret_cast<const uint32_t*>(of + offset + (pixel + pixels) * kRow + channels * 4);
        };
        uint32_t a[MT][4];
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
          for (int i = 0; i < 4; ++i) a[mt][i] = at(g, i / 2 * 4, 16 * mt + i % 2 * 8);
        }
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          const uint32_t b[2] = {at(col, 0, 8 * nt), at(col, 4, 8 * nt)};
#pragma unroll
          for (int mt = 0; mt < MT; ++mt) mma_tf32(acc[mt][nt], a[mt], b);
        }
      }
    } else {
#pragma unroll 1
      for (int pixel = 0; pixel < kHalf; ++pixel) {
        float a[2 * MT];
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
          a[i] = *reinterpret_cast<const float*>(g + pixel * kRow + (8 * i + (lane >> 2)) * 4);
        }
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          const float2 b =
              *reinterpret_cast<const float2*>(col + pixel * kRow + (8 * nt + 2 * (lane & 3)) * 4);
#pragma unroll
          for (int i = 0; i < 2 * MT; ++i) {
            float (&d)[4] = acc[i / 2][nt];
            d[i % 2 * 2] = fmaf(a[i], b.x, d[i % 2 * 2]);
            d[i % 2 * 2 + 1] = fmaf(a[i], b.y, d[i % 2 * 2 + 1]);
          }
        }
      }
    }
  }
};

/// A block has the tiles of one split and 32 output channels. Pixels past an image's end are rows of zeros on
/// both sides, so that nothing that is not finite comes in beside them.
template <class Tile, class T, class Gradient>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    conv_first_layer_gradient_kernel(const WeightGradient<Activation<T>, Gradient, Tiling> conv) {
  using Math = typename Tile::Math;
  constexpr int kLanes = Math::kLanes;
  int4* const positions = dynamic_shared<int4>();
  unsigned char* const shared = dynamic_shared<unsigned char>();
  float* const patches = reinterpret_cast<float*>(shared + Tile::kPatchBegin);
  const Tiling& tiling = conv.tiling;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  unsigned char* const g_rows = shared + Tile::kRowsBegin + warp * Tile::kWarpBytes;
  unsigned char* const col_rows = g_rows + Tile::kHalf * Tile::kRow;
  const int k_tiles = (conv.K + Tile::kTileN - 1) / Tile::kTileN;
  const int split = static_cast<int>(blockIdx.x) / k_tiles;
  const int k0 = static_cast<int>(blockIdx.x) % k_tiles * Tile::kTileN;
  const int channel = k0 + lane % Tile::kChunks * kLanes;  // of this lane's items
  const auto first_tile = [&](int s) {
    return static_cast<int>(static_cast<int64_t>(tiling.tiles) * s / conv.splits);
  };
  int tile = first_tile(split);
  const int end = first_tile(split + 1);

  if (thread < 2) tiling.store_position(tile + thread, positions + thread);
  {
    PicturePatch<Tile, T> first;
    first.start(conv.x, tiling, tiling.position(tile));
    first.finish(tiling, patches);
  }
  float acc[Tile::MT][Tile::NT][4] = {};
  [[maybe_unused]] float bias[kLanes] = {};
#pragma unroll 1
  for (int turn = 0; tile < end; turn ^= 1, ++tile) {
    __syncthreads();  // the patch is there, the other one is free
    const Tiling::Position at = Tiling::load(positions + turn);
    PicturePatch<Tile, T> next;
    const bool more = tile + 1 < end;
    if (more) {
      const Tiling::Position at_next = Tiling::load(positions + (turn ^ 1));
      next.start(conv.x, tiling, at_next);
      // Into L2: its items have no registers to wait in.
      prefetch_channels(conv.gradient, tiling.output(at_next, tiling.place<false>(thread)), k0, Tile::kTileK);
    }
    const bool there = tiling.output(at, tiling.place<false>(thread)).inside;
    const float* const window = patches + turn * Tile::kPatchFloats +
                                tiling.window(at, tiling.place<false>(thread)) * Tile::kChannels;
    gather_row<Tile, Tile::kChunks>(window, tiling.pitch, [&](int chunk, const uint4& packed) {
      *reinterpret_cast<uint4*>(col_rows + lane * Tile::kRow + chunk * 16) =
          there ? packed : make_uint4(0, 0, 0, 0);
    });
#pragma unroll 1
    for (int half = 0; half < 32; half += Tile::kHalf) {
      // 64 bytes a lane at a time, 16 warps 32 KB: more than the 19 KB that an A100's SM gets in a
      // microsecond. float32 in bf16, of which 8 channels are that many, and bf16, which has no registers for
      // more, one by one.
#pragma unroll(8 / kLanes)
      for (int i = 0; i < Tile::kItems; ++i) {
        const int pixel = lane / Tile::kChunks + i * (32 / Tile::kChunks);
        typename Gradient::template Fetched<kLanes> fetched;
        conv.gradient.template fetch<kLanes>(tiling.output(at, tiling.place<false>(32 * warp + half + pixel)),
                                             channel, fetched);
        float v[kLanes];
        conv.gradient.template values<kLanes>(fetched, channel, v);
        *reinterpret_cast<uint4*>(g_rows + pixel * Tile::kRow + lane % Tile::kChunks * 16) = Math::pack(v);
        if constexpr (Gradient::kHasBias) {
#pragma unroll
          for (int j = 0; j < kLanes; ++j) bias[j] += v[j];
        }
      }
      __syncwarp();  // the warp's rows are there
      Tile::multiply(acc, g_rows, col_rows + half * Tile::kRow, lane);
      __syncwarp();  // and were read
    }
    if (more) next.finish(tiling, patches + (turn ^ 1) * Tile::kPatchFloats);
    __syncthreads();  // all have read this tile's position, the warp its rows
    if (thread == 0) tiling.store_position(tile + 2, positions + turn);
  }

  // The warps' sums, and the lanes' of the bias, are added in their order.
  __syncthreads();
  float* const sums = dynamic_shared<float>();  // [warp][k][number], [thread][kLanes]
  float* const bias_sums = sums + Tile::kWarps * Tile::kWarpSums;
#pragma unroll
  for (int mt = 0; mt < Tile::MT; ++mt) {
#pragma unroll
    for (int nt = 0; nt < Tile::NT; ++nt) {
      float* const to =
          sums + warp * Tile::kWarpSums + (16 * mt + (lane >> 2)) * 8 * Tile::NT + 8 * nt + 2 * (lane & 3);
      *reinterpret_cast<float2*>(to) = make_float2(acc[mt][nt][0], acc[mt][nt][1]);
      *reinterpret_cast<float2*>(to + 8 * 8 * Tile::NT) = make_float2(acc[mt][nt][2], acc[mt][nt][3]);
    }
  }
  if constexpr (Gradient::kHasBias) {
#pragma unroll
    for (int j = 0; j < kLanes; ++j) bias_sums[thread * kLanes + j] = bias[j];
  }
  __syncthreads();
  for (int i = thread; i < Tile::kWarpSums; i += Tile::kThreads) {
    const int k = k0 + i / (8 * Tile::NT), number = i % (8 * Tile::NT);
    const int tap = number / Tile::kChannels, c = number % Tile::kChannels;
    if (k >= conv.K || tap >= kTaps || c >= conv.C) continue;
    float total = 0.0f;
#pragma unroll
    for (int of = 0; of < Tile::kWarps; ++of) total += sums[of * Tile::kWarpSums + i];
    conv.dweight[((static_cast<int64_t>(split) * kTaps + tap) * conv.K + k) * conv.C + c] = total;
  }
  if constexpr (Gradient::kHasBias) {
    if (thread < Tile::kTileN && k0 + thread < conv.K) {
      float total = 0.0f;
      for (int of = thread / kLanes; of < Tile::kThreads; of += Tile::kChunks) {
        total += bias_sums[of * kLanes + thread % kLanes];
      }
      conv.dbias[static_cast<int64_t>(split) * conv.K + k0 + thread] = total;
    }
  }
}

// ---- launching -----------------------------------------------------------------------------------

template <class Math, class T, class Epilogue>
cudaError_t convolve_first_layer(const ConvCall& call, const ConvSize& s, const Activation<T>& x,
                                 const Epilogue& epilogue, const float* weight, cudaStream_t stream) {
  using Tile = FirstLayerTile<Math>;
  const FirstLayerConvolution<T, Epilogue> conv{
      .tiling = Tiling::choose(s, Epilogue::kWindows, Tile::kTileM, Tile::kMaxPatch),
      .x = x,
      .epilogue = epilogue,
      .weight = weight,
      .k_tiles = static_cast<int>(round_up(s.K, Tile::kTileN) / Tile::kTileN)};
  if (conv.tiling.tiles == 0) return cudaErrorInvalidValue;
  const int64_t resident =
      std::max<int64_t>(1, static_cast<int64_t>(call.multiprocessors) * Tile::kBlocks / conv.k_tiles);
  const int64_t blocks = std::min<int64_t>(conv.tiling.tiles, resident) * conv.k_tiles;
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidValue;
  return launch(&conv_first_layer_kernel<Tile, T, Epilogue>, dim3(static_cast<unsigned>(blocks)),
                dim3(Tile::kThreads), Tile::kSharedBytes, stream, conv);
}

template <class Math, class T, class Gradient>
cudaError_t first_layer_gradient(const ConvCall& call, const Activation<T>& x, const Gradient& gradient,
                                 float* dweight, float* dbias, void* workspace, cudaStream_t stream) {
  using Tile = FirstLayerGradientTile<Math>;
  return launch_weight_gradient<Tile>(&conv_first_layer_gradient_kernel<Tile, T, Gradient>, call, x, gradient,
                                      dweight, dbias, workspace, stream);
}

}  // namespace maskcore
