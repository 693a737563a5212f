// The gradients of a 3x3 convolution's filter and bias:
//   dw[k,c,r,s] = sum over n,p,q of g[n,p,q,k] x[n, p + r - padding, q + s - padding, c]
//   db[k] = sum over n,p,q of g[n,p,q,k]
// with the output's gradient g from a source (conv_sources.cuh).
//
// A GEMM whose reduction runs over pixels: rows k, columns (tap, c). A block owns kTileK output by 32 input
// channels and all nine taps, so that a tile of pixels (conv_tiling.cuh) is brought into shared memory once
// for the nine: g, and the patch of x under it, in which tap (r, s) is r pitch + s further. A warp owns half
// of the output channels and 8 input channels with their nine taps. Channels are adjacent in memory, pixels
// are not: fragments are read transposed, in bf16 by ldmatrix.trans, in TF32, which that cannot transpose, by
// 32-bit loads. A pixel's row is kPad bytes longer than its channels: 8 rows' 16 bytes (bf16), or 4 rows' 8
// floats (TF32), then lie in different banks, and all addresses of a tile are one and constants.
// Two buffers: the next tile arrives, one 16-byte item a thread and step, while this one's kSteps steps are
// multiplied. One barrier a tile: 5 steps of 18 products of 8 cycles (sm_80; 4 on sm_90) for each of a
// scheduler's four warps, 2,880 cycles or 1,440, into which memory's latency of about 700 fits. A third
// buffer would be 22 KB more, and leave one block in 100 KB, for nothing.
//
// Split-K: the tiles are shared out to `splits` blocks in ranges fixed by the shape and the GPU; each writes
// its sums to a workspace [splits][9][K][C], which are then added in the order of the splits, so that the
// result is the same bits each time. Two blocks for each multiprocessor, which holds them at once: the last
// eight of 264 blocks on 128 multiprocessors would take half as long again as all the others. So the
// workspace is small too: 8 times 2.4 MB of a 256 x 256 layer on an H100.
//
// For a pixel past the image's end stands, times 0, one that is read with it, and so costs nothing; where
// none of those is there, the tile's first one. Where x is infinite in its window, taps whose gradient is
// infinite may be NaN.
//
// Budget, kTileK = 64
//   shared     bf16  2 * (80 pixels * (128 + 16) bytes of g + 128 * (64 + 16) of x) = 43,520, places 320
//              TF32, float32  2 * (40 * (256 + 32) + 64 * (128 + 32)) = 43,520, places 160; positions 48,
//              bias 2,048: two blocks in 100 KB
//   registers  2 * 9 * 4 = 72 accumulators, 8 + 4 of fragments, 8 to 11 of an item on its way: within 65,536
//              / (2 * 256) = 128, since what follows from the thread's number is computed anew each step and
//              the bias is added up in shared memory. float32 tensors in bf16 have 16 to 19 on their way:
//              kTileK = 32, 36 accumulators
//   occupancy  2 * 8 = 16 warps of 64 (25 %) or of 48 (33 %)
//   shared memory traffic of a warp's 32 x 72 x 16 bf16 products: 104 * 32 bytes = 26 cycles, in which an
//   sm_80 does 36 cycles' worth of 1024 products; TF32 the same for 32 x 72 x 8.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv_halo_tile.cuh"

namespace maskcore {

/// 2 x 4 warps of 16 MT output by 8 input channels.
template <class Math_, int MT_>
struct GradientTile {
  using Math = Math_;
  static constexpr int MT = MT_;
  static constexpr int kTileK = 2 * 16 * MT, kTileC = 4 * 8;
  static constexpr int kThreads = 256, kBlocks = 2;
  static constexpr int kStepPixels = 2 * Math::kLanes;  // of an mma
  static constexpr int kSteps = 5;
  static constexpr int kPixels = kSteps * kStepPixels;
  static constexpr int kMaxPatch = 16 * Math::kLanes;
  static constexpr int kPad = 128 / Math::kLanes;
  static constexpr int kGradientChunks = kTileK / Math::kLanes,
                       kInputChunks = kTileC / Math::kLanes;  // a pixel
  static constexpr int kGradientRow = kGradientChunks * 16 + kPad, kInputRow = kInputChunks * 16 + kPad;
  static constexpr int kGradientBytes = kPixels * kGradientRow;
  static constexpr int kBufferBytes = kGradientBytes + kMaxPatch * kInputRow;
  static constexpr int kPlaceBytes = 2 * kPixels * 2;
  // What a thread has added up for the bias so far is kept here: registers are short.
  static constexpr int kBiasBegin = 2 * kBufferBytes + kPlaceBytes + 3 * 16, kBiasBytes = kThreads * 8;
  static constexpr int kSharedBytes = kBiasBegin + kBiasBytes;
  // Items of g, then of x, one a step.
  static constexpr int kGradientItems = (kPixels * kGradientChunks + kThreads - 1) / kThreads;
  static constexpr int kInputItems = (kMaxPatch * kInputChunks + kThreads - 1) / kThreads;
  static_assert(kGradientItems + kInputItems <= kSteps);
  // A thread's items of g are the same channels of different pixels, which it adds up for the bias; so are
  // those of lanes that differ in bit 4 (TF32) or 3 and 4 (bf16), which add them up together, as whole warps.
  static_assert(kThreads % kGradientChunks == 0 && kThreads % kInputChunks == 0);
  static_assert(kGradientChunks <= 64 / Math::kLanes && kPixels * kGradientChunks % 32 == 0);
  static_assert(kTileK <= kThreads);

  /// acc += the products of kStepPixels pixels from `pixel0` on. g is [pixel][kTileK] from the warp's first
  /// channel on, x the patch from the warp's first channel on, places[pixel] where in it a pixel's window
  /// begins.
  static __device__ __forceinline__ void multiply(float (&acc)[MT][kTaps][4], const unsigned char* g,
                                                  const unsigned char* x, int pitch, const uint16_t* places,
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
      g += (pixel0 + t) * kGradientRow + row * 4;
#pragma unroll
      for (int mt = 0; mt < MT; ++mt) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[mt][i] =
              *reinterpret_cast<const uint32_t*>(g + i / 2 * 4 * kGradientRow + (16 * mt + i % 2 * 8) * 4);
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
          b[i] = to_tf32(*reinterpret_cast<const float*>(shifted));
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
          a[i] = *reinterpret_cast<const float*>(g + pixel * kGradientRow + (8 * i + (lane >> 2)) * 4);
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

/// Of the sums of v over the lanes that differ in bits 4 and, of eight values, 3: a lane gets two, in v[0]
/// and v[1], of v's values from shared_out_channel(lane) on. Two registers of sums are so kept instead of
/// eight.
template <int kValues>
__device__ __forceinline__ void share_out(float (&v)[kValues], int lane) {
#pragma unroll
  for (int half = kValues / 2, bit = 16; half > 1; half /= 2, bit /= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const float kept = upper ? v[half + j] : v[j], given = upper ? v[j] : v[half + j];
      v[j] = kept + __shfl_xor_sync(0xffffffffu, given, bit);
    }
  }
}
template <int kValues>
__device__ __forceinline__ int shared_out_channel(int lane) {
  return kValues == 8 ? (lane >> 4 & 1) * 4 + (lane >> 3 & 1) * 2 : (lane >> 4 & 1) * 2;
}

template <class Source, class Gradient>
struct WeightGradient {
  SpreadTiling tiling;
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
  uint16_t* const places = reinterpret_cast<uint16_t*>(shared + 2 * Tile::kBufferBytes);
  int4* const positions = reinterpret_cast<int4*>(shared + 2 * Tile::kBufferBytes + Tile::kPlaceBytes);
  const int4* const share = positions + 2;
  const SpreadTiling& tiling = conv.tiling;
  const int thread = threadIdx.x;
  const auto warp_k = [](int thread) { return thread / 128 * 16 * Tile::MT; };
  const auto warp_c = [](int thread) { return thread / 32 % 4 * 8; };
  const int c_tiles = (conv.C + Tile::kTileC - 1) / Tile::kTileC;
  const int k_tiles = (conv.K + Tile::kTileK - 1) / Tile::kTileK;
  const int block = static_cast<int>(blockIdx.x), split_of_block = block / c_tiles / k_tiles;
  const auto first_tile = [&](int s) {
    return static_cast<int>(static_cast<int64_t>(tiling.tiles) * s / conv.splits);
  };
  const auto g_channel = [&](int thread) { return share->x + thread % Tile::kGradientChunks * kLanes; };
  const auto x_channel = [&](int thread) { return share->y + thread % Tile::kInputChunks * kLanes; };

  // Items are of one step, so that they take no registers after it; a step has one of the two, which a union
  // says: each in a place of its own would stay in registers beside the products.
  union Items {
    Item<Math, Gradient> g;
    Item<Math, Source> x;
  };
  float2* const bias = reinterpret_cast<float2*>(shared + Tile::kBiasBegin);
  if constexpr (Gradient::kHasBias) bias[thread] = make_float2(0.0f, 0.0f);

  const auto start = [&](Items& items, const Tiling::Position& at, int i, int buffer) {
    const int thread = fresh_thread();
    unsigned char* const to = shared + buffer * Tile::kBufferBytes;
    if (i < Tile::kGradientItems) {
      const int number = thread + i * Tile::kThreads, pixel = number / Tile::kGradientChunks;
      if (pixel < Tile::kPixels) {
        items.g.start(conv.gradient, tiling.output(at, tiling.place<false>(pixel)), g_channel(thread), to);
      }
    } else {
      const int number = thread + (i - Tile::kGradientItems) * Tile::kThreads;
      const int pixel = number / Tile::kInputChunks;
      if (pixel < tiling.patch_pixels) {
        items.x.start(conv.x, tiling.input(at, pixel), x_channel(thread),
                      to + Tile::kGradientBytes + pixel * Tile::kInputRow + number % Tile::kInputChunks * 16);
      }
    }
  };
  const auto finish = [&](const Items& items, int i, int buffer) {
    const int thread = fresh_thread();
    unsigned char* const to = shared + buffer * Tile::kBufferBytes;
    if (i < Tile::kGradientItems) {
      const int number = thread + i * Tile::kThreads, pixel = number / Tile::kGradientChunks;
      if (pixel < Tile::kPixels) {
        float v[kLanes];
        conv.gradient.template values<kLanes>(items.g.fetched, g_channel(thread), v);
        *reinterpret_cast<uint4*>(to + pixel * Tile::kGradientRow + number % Tile::kGradientChunks * 16) =
            Math::pack(v);
        if constexpr (Gradient::kHasBias) {
          if (share->y == 0) {  // once for all input channels
            share_out(v, thread % 32);
            const float2 before = bias[thread];
            bias[thread] = make_float2(before.x + v[0], before.y + v[1]);
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
  const auto find_places = [&](const Tiling::Position& at, int buffer) {
    const int thread = fresh_thread(), lane = thread % 32;
    if (thread - lane >= Tile::kPixels) return;  // whole warps
    const int2 place = tiling.place<false>(thread);
    const bool there = tiling.output(at, place).inside;
    const int together = lane / kLanes * kLanes;  // the first of those that are read at once
    const uint32_t others = __ballot_sync(0xffffffffu, there) >> together & ((1u << kLanes) - 1);
    const int from = there || others == 0 ? lane : together + __ffs(static_cast<int>(others)) - 1;
    const int window = __shfl_sync(0xffffffffu, tiling.window(at, place), from);
    if (thread < Tile::kPixels) places[buffer * Tile::kPixels + thread] = static_cast<uint16_t>(window);
  };

  // What the block is at and does is kept in shared memory, registers are short: the next tile's position and
  // number; its first channels k and c, its split and where that ends.
  const int first_of_share = first_tile(split_of_block);
  const Tiling::Position first = tiling.position(first_of_share);
  if (thread == 0) {
    tiling.store_position(first_of_share + 1, positions + 1, first_of_share + 1);
    positions[2] = make_int4(block / c_tiles % k_tiles * Tile::kTileK, block % c_tiles * Tile::kTileC,
                             split_of_block, first_tile(split_of_block + 1));
  }
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < Tile::kSteps; ++i) {
    Items items;
    start(items, first, i, 0);
    finish(items, i, 0);
  }
  find_places(first, 0);
  cp_async_commit();

  float acc[Tile::MT][kTaps][4] = {};
  int buffer = 0;
  bool more = true;
#pragma unroll 1
  for (; more; buffer ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    const int4* const next = positions + (buffer ^ 1);
    more = next->w < share->w;
    if (more) find_places(Tiling::load(next), buffer ^ 1);
    if (fresh_thread() == 0) tiling.store_position(next->w + 1, positions + buffer, next->w + 1);
#pragma unroll 1
    for (int step = 0; step < Tile::kSteps; ++step) {
      Items items;
      if (more) start(items, Tiling::load(next), step, buffer ^ 1);
      const int now = fresh_thread(), bytes = 16 / kLanes;
      const unsigned char* const g = shared + buffer * Tile::kBufferBytes;
      Tile::multiply(acc, g + warp_k(now) * bytes, g + Tile::kGradientBytes + warp_c(now) * bytes,
                     tiling.pitch, places + buffer * Tile::kPixels, step * Tile::kStepPixels, now % 32);
      if (more) finish(items, step, buffer ^ 1);
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
      const int k = k0 + warp_k(thread) + 8 * i + (lane >> 2);
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
      float total = 0.0f;
      for (int i = thread / kLanes; i < Tile::kThreads; i += Tile::kGradientChunks) {
        if (shared_out_channel<kLanes>(i % 32) == thread % kLanes / 2 * 2) {
          total += thread % 2 == 0 ? bias[i].x : bias[i].y;
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

/// Blocks along the pixels, for tiles of 64 x 32 channels: as many as the multiprocessors hold at once.
inline int64_t most_gradient_splits(const ConvCall& call) {
  const int64_t c_tiles = round_up(call.size.C, 32) / 32, k_tiles = round_up(call.size.K, 64) / 64;
  return std::max<int64_t>(1, 2 * static_cast<int64_t>(call.multiprocessors) / (c_tiles * k_tiles));
}

/// Bytes of the splits' sums.
inline int64_t weight_gradient_bytes(const ConvCall& call) {
  return most_gradient_splits(call) * (kTaps * call.size.C + 1) * call.size.K *
         static_cast<int64_t>(sizeof(float));
}

template <class Tile, class Source, class Gradient>
cudaError_t launch_weight_gradient(void (*kernel)(WeightGradient<Source, Gradient>), const ConvCall& call,
                                   const Source& x, const Gradient& gradient, float* dweight, float* dbias,
                                   void* workspace, cudaStream_t stream) {
  const ConvSize& s = call.size;
  const SpreadTiling tiling = SpreadTiling::choose(s, false, Tile::kPixels, Tile::kMaxPatch);
  if (tiling.tile_cols == 0) return cudaErrorInvalidValue;
  // At least four tiles a block, whose sums are then not more memory than its input.
  const int64_t splits = std::min<int64_t>(most_gradient_splits(call), (tiling.tiles + 3) / 4);
  float* const sums = static_cast<float*>(workspace);
  float* const bias_sums = sums + splits * kTaps * s.C * s.K;
  if (splits > 0) {
    const WeightGradient<Source, Gradient> conv{.tiling = tiling,
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
  return with(static_cast<GradientTile<Math, kNarrow ? 1 : 2>*>(nullptr));
}

}  // namespace maskcore
