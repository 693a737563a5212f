// The gradients of a 3x3 convolution's filter and bias:
//   dw[k,c,r,s] = sum over n,p,q of g[n,p,q,k] x[n, p + r - padding, q + s - padding, c]
//   db[k] = sum over n,p,q of g[n,p,q,k]
// with the output's gradient g from a source (conv_sources.cuh).
//
// A GEMM whose reduction runs over pixels: rows k, columns (tap, c). A block owns kTileK output by kTileC
// input channels and all nine taps, so that a tile of pixels (conv_tiling.cuh) is brought into shared memory
// once for the nine: g, and the patch of x under it, in which tap (r, s) is r pitch + s further. A warp owns
// half of the output channels and 8 input channels with their nine taps. Channels are adjacent in memory,
// pixels are not: fragments are read transposed, in bf16 by ldmatrix.trans, in TF32, which that cannot
// transpose, by 64- and 32-bit loads. A pixel's row is kPad bytes longer than its channels: 8 rows' 16 bytes
// (bf16), or 4 rows' 8 floats (TF32), then lie in different banks, and all addresses of a tile are one and
// constants. Two buffers: the next tile arrives, one 16-byte item a thread and step, while this one's kSteps
// steps are multiplied. One barrier a tile: 7 steps of 18 products of 8 cycles (sm_80; 4 on sm_90) for each
// of a scheduler's four warps, 4,032 cycles or 2,016; a step is shorter than memory's latency, but not than
// L2's. What an item needs to know of its pixel is found one tile earlier, once for all channels, and what it
// will read is asked for into L2.
//
// Instructions bound it: a product has 8 issue slots (sm_80; 6 of what sm_90 reaches). So the wide tile has
// 64 input channels, for which g is masked once instead of twice as with 32; bfloat16 is masked two numbers a
// register; what is multiplied as TF32 is rounded once, on its way into shared memory; and the steps are
// unrolled, after which their addresses are constants.
//
// Split-K: the tiles are shared out to `splits` blocks in ranges fixed by the shape and the GPU; each writes
// its sums to a workspace [splits][9][K][C], which are then added in the order of the splits, so that the
// result is the same bits each time. As many blocks as the multiprocessors hold at once: the last eight of
// 264 blocks on 128 multiprocessors would take half as long again as all the others. So the workspace is
// small too: 8 times 2.4 MB of a 256 x 256 layer on an H100.
//
// For a pixel past the image's end stands, times 0, one that is read with it, and so costs nothing; where
// none of those is there, the tile's first one. Where x is infinite in its window, taps whose gradient is
// infinite may be NaN.
//
// Budget, kTileK = 64
//   shared     two buffers of g and of x's patch, of 87,552 or 43,520 bytes:
//              kTileC = 64: 2 * (112 + 192) * (128 + 16) in bf16, 2 * (56 + 96) * (256 + 32) in TF32, float32
//              kTileC = 32: 2 * (80 * (128 + 16) + 128 * (64 + 16)) in bf16,
//                           2 * (40 * (256 + 32) + 64 * (128 + 32)) in TF32, float32
//              and places 4 * 112 or 4 * 80, numbers 2 * 4 * 304 or 2 * 4 * 208, positions 48, bias 8,192 or
//              4,096: 98,672 bytes, one block in 100 KB, or 49,648, two blocks
//   registers  2 * 9 * 4 = 72 accumulators, 8 + 20 of fragments, 8 to 11 of an item on its way: within 65,536
//              / 512 = 128, since what follows from the thread's number is computed anew each step and the
//              bias is added up in shared memory. float32 tensors in bf16 have 16 to 19 on their way: kTileK
//              = 32, 36 accumulators
//   occupancy  16 warps of 64 (25 %) or of 48 (33 %)
//   shared memory traffic of a warp's 32 x 72 x 16 bf16 products: 104 * 32 bytes = 26 cycles, in which an
//   sm_80 does 36 cycles' worth of 1024 products; TF32 the same for 32 x 72 x 8.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "conv_halo_tile.cuh"

namespace maskcore {

/// 2 x kWarpsC warps of 16 MT output by 8 input channels.
template <class Math_, int MT_, int kWarpsC = 4>
struct GradientTile {
  using Math = Math_;
  static constexpr int MT = MT_;
  static constexpr int kTileK = 2 * 16 * MT, kTileC = kWarpsC * 8;
  static constexpr int kThreads = 2 * kWarpsC * 32, kBlocks = 512 / kThreads;
  static constexpr int kStepPixels = 2 * Math::kLanes;  // of an mma
  static constexpr int kSteps = kWarpsC == 8 ? 7 : 5;
  static constexpr int kPixels = kSteps * kStepPixels;
  static constexpr int kMaxPatch = (kWarpsC == 8 ? 24 : 16) * Math::kLanes;
  static constexpr int kPad = 128 / Math::kLanes;
  static constexpr int kGradientChunks = kTileK / Math::kLanes,
                       kInputChunks = kTileC / Math::kLanes;  // a pixel
  static constexpr int kGradientRow = kGradientChunks * 16 + kPad, kInputRow = kInputChunks * 16 + kPad;
  static constexpr int kGradientBytes = kPixels * kGradientRow;
  static constexpr int kBufferBytes = kGradientBytes + kMaxPatch * kInputRow;
  // Of four tiles where their pixels' windows begin in the patch, of two the numbers of their pixels of g
  // and of x.
  static constexpr int kPlacesBegin = 2 * kBufferBytes, kNumbersBegin = kPlacesBegin + 4 * kPixels;
  static constexpr int kNumbers = kPixels + kMaxPatch;
  static constexpr int kPositionsBegin = kNumbersBegin + 2 * 4 * kNumbers;
  // What a thread has added up for the bias so far is kept here: registers are short.
  static constexpr int kBiasBegin = kPositionsBegin + 3 * 16, kBiasValues = 4;
  static constexpr int kSharedBytes = kBiasBegin + kThreads * kBiasValues * 4;
  static_assert(kMaxPatch <= 256 && kPositionsBegin % 16 == 0);
  // Who finds a tile's pixels: whole warps those of g, others those of x.
  static constexpr int kPlaceThreads = (kPixels + 31) / 32 * 32;
  static_assert(kPlaceThreads + kMaxPatch <= kThreads);
  // Items of g, then of x, one a step.
  static constexpr int kGradientItems = (kPixels * kGradientChunks + kThreads - 1) / kThreads;
  static constexpr int kInputItems = (kMaxPatch * kInputChunks + kThreads - 1) / kThreads;
  static_assert(kGradientItems + kInputItems <= kSteps);
  // A thread's items of g are the same channels of different pixels, which it adds up for the bias; so are
  // those of lanes that differ in bit 4 (TF32) or 3 and 4 (bf16), which add them up together, as whole warps.
  static_assert(kThreads % kGradientChunks == 0 && kThreads % kInputChunks == 0);
  static_assert(kGradientChunks <= 64 / Math::kLanes && kPixels * kGradientChunks % 32 == 0);
  static_assert(kTileK <= kThreads);

  /// Of the warp's output channels the one of acc's row lane / 4 + 8 i. Where a lane reads numbers one by
  /// one, two of its rows are adjacent channels, which it reads at once.
  static __device__ __forceinline__ int channel(int i, int lane) {
    return Math::kLanes == 4 ? i / 2 * 16 + (lane >> 2) * 2 + i % 2 : 8 * i + (lane >> 2);
  }

  /// acc += the products of kStepPixels pixels from `pixel0` on. g is [pixel][kTileK] from the warp's first
  /// channel on, x the patch from the warp's first channel on, places[pixel] where in it a pixel's window
  /// begins.
  static __device__ __forceinline__ void multiply(float (&acc)[MT][kTaps][4], const unsigned char* g,
                                                  const unsigned char* x, int pitch, const uint8_t* places,
                                                  int pixel0, int lane) {
    if constexpr (std::is_same_v<Math, Bf16>) {
      uint32_t a[MT][4];
      g += (pixel0 + (lane & 7) + (lane >> 4 << 3)) * kGradientRow + (lane >> 3 & 1) * 16;
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) ldmatrix_x4_trans(a[mt], g + 32 * mt);
      // Two taps at a time; lanes 16..31 name the second one's rows.
      const auto pair = [&](const unsigned char* rows, int first, int second) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, rows);
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) {
          mma_bf16(acc[mt][first], a[mt], {b[0], b[1]});
          mma_bf16(acc[mt][second], a[mt], {b[2], b[3]});
        }
      };
      const int place = places[pixel0 + (lane & 15)], down = pitch * kInputRow;
      const unsigned char* const left = x + (place + (lane >> 4)) * kInputRow;
      const unsigned char* const right = x + (place + 2) * kInputRow + (lane >> 4) * down;
      pair(left, 0, 1);
      pair(left + down, 3, 4);
      pair(left + 2 * down, 6, 7);
      pair(right, 2, 5);
      uint32_t b[2];
      ldmatrix_x2_trans(b, right + 2 * down);
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) mma_bf16(acc[mt][8], a[mt], b);
    } else if constexpr (std::is_same_v<Math, Tf32>) {
      const int row = lane >> 2, t = lane & 3;
      uint32_t a[MT][4];
      g += (pixel0 + t) * kGradientRow + channel(0, lane) * 4;
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint2 two = *reinterpret_cast<const uint2*>(g + half * 4 * kGradientRow + mt * 64);
          a[mt][2 * half] = two.x, a[mt][2 * half + 1] = two.y;
        }
      }
      const unsigned char* const at[2] = {x + places[pixel0 + t] * kInputRow + row * 4,
                                          x + places[pixel0 + t + 4] * kInputRow + row * 4};
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        uint32_t b[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const unsigned char* const shifted = at[i] + tap / 3 * pitch * kInputRow + tap % 3 * kInputRow;
          b[i] = *reinterpret_cast<const uint32_t*>(shifted);
        }
#pragma unroll
        for (int mt = 0; mt < MT; ++mt) mma_tf32(acc[mt][tap], a[mt], b);
      }
    } else {
#pragma unroll 1
      for (int pixel = pixel0; pixel < pixel0 + kStepPixels; ++pixel) {
        float a[2 * MT];
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
          a[i] = *reinterpret_cast<const float*>(g + pixel * kGradientRow + channel(i, lane) * 4);
        }
        const unsigned char* const at = x + places[pixel] * kInputRow + 2 * (lane & 3) * 4;
#pragma unroll
        for (int tap = 0; tap < kTaps; ++tap) {
          const float2 b =
              *reinterpret_cast<const float2*>(at + tap / 3 * pitch * kInputRow + tap % 3 * kInputRow);
#pragma unroll
          for (int i = 0; i < 2 * MT; ++i) {
            float (&d)[4] = acc[i / 2][tap];
            d[i % 2 * 2] = fmaf(a[i], b.x, d[i % 2 * 2]);
            d[i % 2 * 2 + 1] = fmaf(a[i], b.y, d[i % 2 * 2 + 1]);
          }
        }
      }
    }
  }
};

/// Of eight values, which two lanes have of the same channels: their sums, of which the upper lane gets the
/// last four. So a thread keeps four sums.
template <int kValues>
__device__ __forceinline__ float4 share_out(const float (&v)[kValues], int lane) {
  if constexpr (kValues == 4) {
    return make_float4(v[0], v[1], v[2], v[3]);
  } else {
    float sums[4];
    const bool upper = (lane & 16) != 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float kept = upper ? v[4 + j] : v[j], given = upper ? v[j] : v[4 + j];
      sums[j] = kept + __shfl_xor_sync(0xffffffffu, given, 16);
    }
    return make_float4(sums[0], sums[1], sums[2], sums[3]);
  }
}

template <class Source, class Gradient, class AnyTiling = SpreadTiling>
struct WeightGradient {
  AnyTiling tiling;
  Source x;
  Gradient gradient;
  int C, K;
  int splits;
  float* dweight;  // [splits][9][K][C]
  float* dbias;    // [splits][K] where the gradient's convolution has a bias
};

template <class Tile, class Source, class Gradient>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    conv_weight_gradient_kernel(const WeightGradient<Source, Gradient> conv) {
  using Math = typename Tile::Math;
  constexpr int kLanes = Math::kLanes;
  unsigned char* const shared = dynamic_shared<unsigned char>();
  uint8_t* const places = shared + Tile::kPlacesBegin;
  int* const numbers = reinterpret_cast<int*>(shared + Tile::kNumbersBegin);
  int4* const positions = reinterpret_cast<int4*>(shared + Tile::kPositionsBegin);
  const int4* const share = positions + 2;
  const SpreadTiling& tiling = conv.tiling;
  const int thread = threadIdx.x;
  const auto warp_k = [](int thread) { return thread / (Tile::kThreads / 2) * 16 * Tile::MT; };
  const auto warp_c = [](int thread) { return thread / 32 % (Tile::kTileC / 8) * 8; };
  const int c_tiles = (conv.C + Tile::kTileC - 1) / Tile::kTileC;
  const int k_tiles = (conv.K + Tile::kTileK - 1) / Tile::kTileK;
  const int block = static_cast<int>(blockIdx.x), split_of_block = block / c_tiles / k_tiles;
  const auto first_tile = [&](int s) {
    return static_cast<int>(static_cast<int64_t>(tiling.tiles) * s / conv.splits);
  };
  const auto g_channel = [&](int thread) { return share->x + thread % Tile::kGradientChunks * kLanes; };
  const auto x_channel = [&](int thread) { return share->y + thread % Tile::kInputChunks * kLanes; };

  // Items are of one step, so that they take no registers after it; a step has one of the two, which a union
  // says: each in a place of its own would stay in registers beside the products. In TF32 x comes through
  // registers too, and is rounded once instead of for each of the taps and warps.
  using InputItem = Item<Math, Source, !std::is_same_v<Math, Tf32>>;
  union Items {
    typename Gradient::template Fetched<kLanes> g;
    InputItem x;
  };
  float4* const bias = reinterpret_cast<float4*>(shared + Tile::kBiasBegin);
  if constexpr (Gradient::kHasBias) bias[thread] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

  const auto start = [&](Items& items, int i, int buffer) {
    const int thread = fresh_thread();
    const int* const of_tile = numbers + buffer * Tile::kNumbers;
    if (i < Tile::kGradientItems) {
      const int number = thread + i * Tile::kThreads, pixel = number / Tile::kGradientChunks;
      if (pixel < Tile::kPixels) {
        conv.gradient.template fetch<kLanes>(NumberedPixel(of_tile[pixel]), g_channel(thread), items.g);
      }
    } else {
      const int number = thread + (i - Tile::kGradientItems) * Tile::kThreads;
      const int pixel = number / Tile::kInputChunks;
      if (pixel < tiling.patch_pixels) {
        items.x.start(conv.x, NumberedPixel(of_tile[Tile::kPixels + pixel]), x_channel(thread),
                      shared + buffer * Tile::kBufferBytes + Tile::kGradientBytes + pixel * Tile::kInputRow +
                          number % Tile::kInputChunks * 16);
      }
    }
  };
  const auto finish = [&](const Items& items, int i, int buffer) {
    const int thread = fresh_thread();
    unsigned char* const to = shared + buffer * Tile::kBufferBytes;
    if (i < Tile::kGradientItems) {
      const int number = thread + i * Tile::kThreads, pixel = number / Tile::kGradientChunks;
      if (pixel < Tile::kPixels) {
        const uint4 packed = pack_values<Math>(conv.gradient, items.g, g_channel(thread));
        *reinterpret_cast<uint4*>(to + pixel * Tile::kGradientRow + number % Tile::kGradientChunks * 16) =
            packed;
        if constexpr (Gradient::kHasBias && !kPacked<Math, Gradient>) {
          if (share->y == 0) {  // once for all input channels
            float v[kLanes];
            conv.gradient.template values<kLanes>(items.g, g_channel(thread), v);
            const float4 more = share_out(v, thread % 32), before = bias[thread];
            bias[thread] =
                make_float4(before.x + more.x, before.y + more.y, before.z + more.z, before.w + more.w);
          }
        }
      }
    } else {
      const int number = thread + (i - Tile::kGradientItems) * Tile::kThreads;
      const int pixel = number / Tile::kInputChunks;
      if (pixel < tiling.patch_pixels) {
        items.x.finish(
            conv.x, x_channel(thread),
            to + Tile::kGradientBytes + pixel * Tile::kInputRow + number % Tile::kInputChunks * 16);
      }
    }
  };
  // The bias' gradient of values that are exact in bfloat16: a tile's products with ones, 16 channels and
  // some of the steps a warp.
  constexpr int kRows = Tile::kTileK / 16, kParts = Tile::kThreads / 32 / kRows;
  const auto add_bias = [&](const unsigned char* g) {
    const int thread = fresh_thread(), lane = thread % 32, warp = thread / 32;
    g += (lane & 7) * Tile::kGradientRow + (lane >> 4 << 3) * Tile::kGradientRow + (lane >> 3 & 1) * 16;
    float sums[4] = {};
#pragma unroll
    for (int i = 0; i < (Tile::kSteps + kParts - 1) / kParts; ++i) {
      const int step = warp / kRows + i * kParts;
      if (step >= Tile::kSteps) break;
      uint32_t a[4];
      ldmatrix_x4_trans(a, g + step * Tile::kStepPixels * Tile::kGradientRow + warp % kRows * 32);
      mma_bf16(sums, a, {0x3f803f80u, 0x3f803f80u});
    }
    if (lane % 4 == 0) {
      float* const to = reinterpret_cast<float*>(bias) + warp * 16 + lane / 4;
      to[0] += sums[0];
      to[8] += sums[2];
    }
  };
  // What a tile's items and products need to know of its pixels, once for all channels: `turn` counts tiles.
  // It asks for what their items will read, too, unless these follow at once.
  const auto find_pixels = [&](const Tiling::Position& at, int turn, bool ask) {
    const int thread = fresh_thread(), lane = thread % 32;
    int* const of_tile = numbers + turn % 2 * Tile::kNumbers;
    if (thread < Tile::kPlaceThreads) {
      const int2 place = tiling.place<false>(thread);
      const Pixel pixel = tiling.output(at, place);
      const int together = lane / kLanes * kLanes;  // the first of those that are read at once
      const uint32_t others = __ballot_sync(0xffffffffu, pixel.inside) >> together & ((1u << kLanes) - 1);
      const int from = pixel.inside || others == 0 ? lane : together + __ffs(static_cast<int>(others)) - 1;
      const int window = __shfl_sync(0xffffffffu, tiling.window(at, place), from);
      if (thread < Tile::kPixels) {
        places[turn % 4 * Tile::kPixels + thread] = static_cast<uint8_t>(window);
        const int number = conv.gradient.number(pixel);
        of_tile[thread] = number;
        if (ask) prefetch_channels(conv.gradient, NumberedPixel(number), share->x, Tile::kTileK);
      }
    } else if (thread - Tile::kPlaceThreads < tiling.patch_pixels) {
      const int pixel = thread - Tile::kPlaceThreads;
      const int number = conv.x.number(tiling.input(at, pixel));
      of_tile[Tile::kPixels + pixel] = number;
      if (ask) prefetch_channels(conv.x, NumberedPixel(number), share->y, Tile::kTileC);
    }
  };

  // What the block is at and does is kept in shared memory, registers are short: position and number of the
  // tile behind the next one; its first channels k and c, its split and where that ends.
  const int first_of_share = first_tile(split_of_block);
  find_pixels(tiling.position(first_of_share), 0, /*ask=*/false);
  find_pixels(tiling.position(first_of_share + 1), 1, /*ask=*/false);
  if (thread == 0) {
    tiling.store_position(first_of_share + 2, positions, first_of_share + 2);
    positions[2] = make_int4(block / c_tiles % k_tiles * Tile::kTileK, block % c_tiles * Tile::kTileC,
                             split_of_block, first_tile(split_of_block + 1));
  }
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < Tile::kSteps; ++i) {
    Items items;
    start(items, i, 0);
    finish(items, i, 0);
  }
  cp_async_commit();

  // A step's addresses are constants, unless both operands are computed of several tensors, which leaves the
  // wide tile no registers for more than one step's on an sm_100.
  constexpr bool kBothComputed =
      !Source::kPlain && std::is_same_v<Gradient, PooledReluGradient<typename Gradient::Element>>;
  constexpr int kUnrolled = kBothComputed && Tile::kTileC == 64 ? 1 : Tile::kSteps;
  float acc[Tile::MT][kTaps][4] = {};
  int more = 1;
#pragma unroll 1
  for (int turn = 0; more != 0; ++turn) {
    cp_async_wait<0>();
    __syncthreads();
    const int buffer = turn % 2;
    const int4* const second = positions + buffer;  // of the tile behind the next one
    more = in_a_register(second->w <= share->w);
    if (second->w < share->w) find_pixels(Tiling::load(second), turn + 2, /*ask=*/true);
    if (fresh_thread() == 0) {
      const Tiling::Position at = tiling.next(Tiling::load(second));
      positions[buffer ^ 1] = make_int4(at.n, at.p, at.q, second->w + 1);
    }
    if constexpr (Gradient::kHasBias && kPacked<Math, Gradient>) {
      if (share->y == 0) add_bias(shared + buffer * Tile::kBufferBytes);  // once for all input channels
    }
#pragma unroll kUnrolled
    for (int step = 0; step < Tile::kSteps; ++step) {
      Items items;
      if constexpr (kUnrolled == 1) more = second->w <= share->w;  // without a register kept for it
      if (more != 0) start(items, step, buffer ^ 1);
      const int now = fresh_thread(), bytes = 16 / kLanes;
      const unsigned char* const g = shared + buffer * Tile::kBufferBytes;
      Tile::multiply(acc, g + warp_k(now) * bytes, g + Tile::kGradientBytes + warp_c(now) * bytes,
                     tiling.pitch, places + turn % 4 * Tile::kPixels, step * Tile::kStepPixels, now % 32);
      if (more != 0) finish(items, step, buffer ^ 1);
    }
    cp_async_commit();
  }

  const int k0 = share->x, c0 = share->y, split = share->z;
  const bool pairs = conv.C % 2 == 0;
  const int lane = thread % 32, c = c0 + warp_c(thread) + 2 * (lane & 3);
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    float* const out = conv.dweight + (static_cast<int64_t>(split) * kTaps + tap) * conv.K * conv.C + c;
#pragma unroll
    for (int i = 0; i < 2 * Tile::MT; ++i) {
      const int k = k0 + warp_k(thread) + Tile::channel(i, lane);
      const float d[2] = {acc[i / 2][tap][i % 2 * 2], acc[i / 2][tap][i % 2 * 2 + 1]};
      float* const to = out + static_cast<int64_t>(k) * conv.C;
      if (k >= conv.K) continue;
      if (pairs && c < conv.C) {
        *reinterpret_cast<float2*>(to) = make_float2(d[0], d[1]);
      } else {
        if (c < conv.C) to[0] = d[0];
        if (c + 1 < conv.C) to[1] = d[1];
      }
    }
  }

  if constexpr (Gradient::kHasBias) {
    if (c0 > 0) return;
    __syncthreads();  // the bias' sums of all are there
    if (thread < Tile::kTileK && k0 + thread < conv.K) {
      const float* sums = reinterpret_cast<const float*>(bias);
      float total = 0.0f;
      if constexpr (kPacked<Math, Gradient>) {
        for (int part = 0; part < kParts; ++part) total += sums[part * Tile::kTileK + thread];
      } else {
        sums += thread % 4;
        for (int i = thread / kLanes; i < Tile::kThreads; i += Tile::kGradientChunks) {
          if (kLanes == 4 || (i >> 4 & 1) == thread % kLanes / 4) total += sums[i * Tile::kBiasValues];
        }
      }
      conv.dbias[static_cast<int64_t>(split) * conv.K + k0 + thread] = total;
    }
  }
}

/// dweight [K,C,3,3] and dbias [K], unless null, as the sums over splits, in their order. One thread a sum.
constexpr int kAddThreads = 256;
static __global__ void __launch_bounds__(kAddThreads)
    add_splits_kernel(const float* dweight_splits, const float* dbias_splits, int splits, int K, int C,
                      float* dweight, float* dbias) {
  const int64_t weights = static_cast<int64_t>(kTaps) * K * C;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
  if (i < weights) {
    float sum = 0.0f;
#pragma unroll 8
    for (int split = 0; split < splits; ++split) sum += dweight_splits[split * weights + i];
    const int64_t tap = i / (static_cast<int64_t>(K) * C), pair = i % (static_cast<int64_t>(K) * C);
    dweight[pair * kTaps + tap] = sum;
  } else if (dbias != nullptr && i < weights + K) {
    const int64_t k = i - weights;
    float sum = 0.0f;
#pragma unroll 8
    for (int split = 0; split < splits; ++split) sum += dbias_splits[static_cast<int64_t>(split) * K + k];
    dbias[k] = sum;
  }
}

// ---- launching -----------------------------------------------------------------------------------

/// Input channels of a tile, where it may have 64 output channels.
inline bool is_wide(const ConvSize& s) { return s.K > 32 && s.C > 32; }

/// Blocks along the pixels: as many as the multiprocessors hold at once of those with 64 x 64 channels, or
/// two of 64 x 32.
inline int64_t most_gradient_splits(const ConvCall& call) {
  const int64_t width = is_wide(call.size) ? 64 : 32;
  const int64_t c_tiles = round_up(call.size.C, width) / width, k_tiles = round_up(call.size.K, 64) / 64;
  const int64_t blocks = 64 / width * static_cast<int64_t>(call.multiprocessors);
  return std::max<int64_t>(1, blocks / (c_tiles * k_tiles));
}

/// Bytes of the splits' sums.
inline int64_t weight_gradient_bytes(const ConvCall& call) {
  return most_gradient_splits(call) * (kTaps * call.size.C + 1) * call.size.K *
         static_cast<int64_t>(sizeof(float));
}

template <class Tile, class Source, class Gradient, class AnyTiling>
cudaError_t launch_weight_gradient(void (*kernel)(WeightGradient<Source, Gradient, AnyTiling>),
                                   const ConvCall& call, const Source& x, const Gradient& gradient,
                                   float* dweight, float* dbias, void* workspace, cudaStream_t stream) {
  static_assert(!std::is_same_v<AnyTiling, SpreadTiling> || Tile::kPixels <= SpreadTiling::kMaxPixels);
  const ConvSize& s = call.size;
  if (s.N * s.H * s.W > std::numeric_limits<int>::max()) return cudaErrorInvalidValue;  // NumberedPixel's
  const AnyTiling tiling = AnyTiling::choose(s, false, Tile::kPixels, Tile::kMaxPatch);
  if (tiling.tile_cols == 0) return cudaErrorInvalidValue;
  // At least four tiles a block, whose sums are then not more memory than its input.
  const int64_t splits = std::min<int64_t>(most_gradient_splits(call), (tiling.tiles + 3) / 4);
  float* const sums = static_cast<float*>(workspace);
  float* const bias_sums = sums + splits * kTaps * s.C * s.K;
  if (splits > 0) {
    const WeightGradient<Source, Gradient, AnyTiling> conv{.tiling = tiling,
                                                           .x = x,
                                                           .gradient = gradient,
                                                           .C = static_cast<int>(s.C),
                                                           .K = static_cast<int>(s.K),
                                                           .splits = static_cast<int>(splits),
                                                           .dweight = sums,
                                                           .dbias = bias_sums};
    const int64_t blocks =
        splits * (round_up(s.C, Tile::kTileC) / Tile::kTileC) * (round_up(s.K, Tile::kTileK) / Tile::kTileK);
    const cudaError_t error = launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(Tile::kThreads),
                                     Tile::kSharedBytes, stream, conv);
    if (error != cudaSuccess) return error;
  }
  const int64_t outputs = (kTaps * s.C + 1) * s.K;
  return launch(&add_splits_kernel, dim3(static_cast<unsigned>((outputs + kAddThreads - 1) / kAddThreads)),
                dim3(kAddThreads), 0, stream, sums, bias_sums, static_cast<int>(splits),
                static_cast<int>(s.K), static_cast<int>(s.C), dweight, dbias);
}

template <class Math, class Source, class Gradient>
cudaError_t weight_gradient(const ConvCall& call, const Source& x, const Gradient& gradient, float* dweight,
                            float* dbias, void* workspace, cudaStream_t stream) {
  const auto with = [&]<class Tile>(Tile*) {
    return launch_weight_gradient<Tile>(&conv_weight_gradient_kernel<Tile, Source, Gradient>, call, x,
                                        gradient, dweight, dbias, workspace, stream);
  };
  // float32 tensors multiplied in bf16 have 16 numbers a thread on their way, for which the larger tile has
  // no registers left.
  constexpr bool kNarrow = !std::is_same_v<typename Source::Element, typename Math::Shared>;
  if (kNarrow || call.size.K <= 32) return with(static_cast<GradientTile<Math, 1>*>(nullptr));
  if constexpr (!kNarrow) {
    if (is_wide(call.size)) return with(static_cast<GradientTile<Math, 2, 8>*>(nullptr));
    return with(static_cast<GradientTile<Math, 2>*>(nullptr));
  }
}

}  // namespace maskcore
