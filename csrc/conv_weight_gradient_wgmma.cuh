// conv_weight_gradient.cuh's sums by the warpgroup products of sm_90 (wgmma, PTX ISA "Asynchronous Warpgroup
// Level Matrix Multiply-Accumulate"), of bfloat16 tensors with more than 32 input and output channels. TF32
// cannot: wgmma transposes no operand of 32 bits.
//
// A block has 64 output by 64 input channels and all nine taps; a warpgroup has the three taps of a row r of
// the filter. Of each step's 16 pixels a warp loads its 16 output channels of g by one transposed ldmatrix
// for its three products; x's 64 channels come from shared memory by a matrix descriptor, whose beginning is
// where a tap's pixels begin. So that this can be any pixel, nothing is swizzled: an operand lies as
// [8 channels][pixel], 16 bytes each, of which wgmma takes eight pixels from anywhere on, and eight more at
// any distance. Rows of 8 channels are an odd number of 16 bytes apart: a pixel's 64, which eight threads
// write, lie in different banks.
//
// Tiles are 32 rows of 8 pixels, a step two of them (StripTiling: both of one image), and the patch is 34
// rows of 10, and 2 more for each image boundary in it. Past the image g is 0: where x is infinite in the
// tile's patch, its channel's taps may be NaN where conv_weight_gradient.cuh's are numbers.
//
// A step of 9 products takes 9 * 32 = 288 cycles of the tensor cores; shared memory gives 9 times 16 lines of
// 128 bytes to x, 3 times 16 to g and takes 16 + 24 of the next tile's, 232. Two buffers and one barrier a
// tile, at which the tensor cores have nothing to do: some 200 of 16 * 288 cycles. Fragments are loaded while
// the products of the step before run; an item, one a step as in conv_weight_gradient.cuh, is on its way from
// one step into the next. The splits, their workspace and how they are added are that file's.
//
// Instructions are next: with a ReLU's gradient and a plain x a scheduler's three warps issue some 4,000 a
// tile, with what a batch norm makes 5,000, of 4,608 cycles of products.
//
// Budget
//   shared     two buffers of 2 * 8 * 381 * 16 bytes of g and x, numbers 2 * 4 * (256 + 380), bias 3 * 256:
//              200,928 of 232,448, one block
//   registers  3 * 32 sums, 8 of fragments, 4 of the bias, 8 to 11 of an item on its way: within 65,536 / 384
//              = 170, of which 168 can be had
//   occupancy  12 warps of 64 (19 %): what waits is the tensor cores' queue, and it is never empty for long
#pragma once

#include "conv_weight_gradient.cuh"

namespace maskcore {

struct WgmmaGradientTile {
  static constexpr int kTileK = 64, kTileC = 64;
  static constexpr int kRows = 32, kPixels = kRows * StripTiling::kCols, kStepPixels = 16;
  static constexpr int kSteps = kPixels / kStepPixels;
  static constexpr int kMaxBoundaries = 2;
  static constexpr int kMaxPatch = (kRows + 2 + 2 * kMaxBoundaries) * StripTiling::kPitch;
  static constexpr int kGroups = 3, kThreads = 128 * kGroups, kBlocks = 1;
  static constexpr int kNT = kTileC / 8;
  // Bytes between 8 channels and the next 8, of both operands, which have as many eights.
  static constexpr int kChunks = 8, kStride = (kMaxPatch + 1) * 16;
  static_assert(kTileK == 8 * kChunks && kTileC == 8 * kChunks && kThreads % kChunks == 0);
  static_assert(kStride / 16 % 2 == 1 && kPixels <= kMaxPatch);
  static constexpr int kOperandBytes = kChunks * kStride, kBufferBytes = 2 * kOperandBytes;
  // Of two tiles the numbers of their pixels of g and of x; the groups' sums for the bias.
  static constexpr int kNumbers = kPixels + kMaxPatch, kNumbersBegin = 2 * kBufferBytes;
  static constexpr int kBiasBegin = kNumbersBegin + 2 * 4 * kNumbers;
  static constexpr int kSharedBytes = kBiasBegin + kGroups * kTileK * 4;
  static_assert(kPixels % 32 == 0);  // whole warps find those of g
  // Items of g, then of x, one a step.
  static constexpr int kGradientItems = (kPixels * kChunks + kThreads - 1) / kThreads;
  static constexpr int kItems = kGradientItems + (kMaxPatch * kChunks + kThreads - 1) / kThreads;
  static_assert(kItems < kSteps);
};

template <class Source, class Gradient>
__global__ void __launch_bounds__(WgmmaGradientTile::kThreads, WgmmaGradientTile::kBlocks)
    conv_weight_gradient_wgmma_kernel(const WeightGradient<Source, Gradient, StripTiling> conv) {
#if defined(MASKCORE_WGMMA) || defined(MASKCORE_CUDA_EMULATION)
  using Tile = WgmmaGradientTile;
  constexpr int kCols = StripTiling::kCols, kPitch = StripTiling::kPitch;
  unsigned char* const shared = dynamic_shared<unsigned char>();
  int* const numbers = reinterpret_cast<int*>(shared + Tile::kNumbersBegin);
  const StripTiling& tiling = conv.tiling;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32 % 4, filter_row = thread / 128;
  const int c_tiles = (conv.C + Tile::kTileC - 1) / Tile::kTileC;
  const int k_tiles = (conv.K + Tile::kTileK - 1) / Tile::kTileK;
  const int block = static_cast<int>(blockIdx.x), split = block / c_tiles / k_tiles;
  const int k0 = block / c_tiles % k_tiles * Tile::kTileK, c0 = block % c_tiles * Tile::kTileC;
  const auto first_tile = [&](int s) {
    return static_cast<int>(static_cast<int64_t>(tiling.tiles) * s / conv.splits);
  };

  // A thread's items are the same 8 channels of different pixels.
  const int chunk = thread % Tile::kChunks, pixel0 = thread / Tile::kChunks;
  unsigned char* const items_to = shared + chunk * Tile::kStride + pixel0 * 16;
  using InputItem = Item<Bf16, Source>;
  union Items {
    typename Gradient::template Fetched<8> g;
    InputItem x;
  };
  // How many pixels behind the thread's first one an item's is.
  const auto item_pixel = [&](int i) {
    const int of_operand = i < Tile::kGradientItems ? i : i - Tile::kGradientItems;
    return of_operand * (Tile::kThreads / Tile::kChunks);
  };
  const auto start = [&](Items& items, int i, int buffer) {
    const int further = item_pixel(i), pixel = pixel0 + further;
    const int* const of_tile = numbers + buffer * Tile::kNumbers;
    if (i < Tile::kGradientItems) {
      if (pixel < Tile::kPixels) {
        conv.gradient.template fetch<8>(NumberedPixel(of_tile[pixel]), k0 + 8 * chunk, items.g);
      }
    } else if (pixel < tiling.patch_pixels) {
      items.x.start(conv.x, NumberedPixel(of_tile[Tile::kPixels + pixel]), c0 + 8 * chunk,
                    items_to + Tile::kOperandBytes + buffer * Tile::kBufferBytes + further * 16);
    }
  };
  const auto finish = [&](const Items& items, int i, int buffer) {
    const int further = item_pixel(i), pixel = pixel0 + further;
    const int to = buffer * Tile::kBufferBytes + further * 16;
    if (i < Tile::kGradientItems) {
      if (pixel < Tile::kPixels) {
        *reinterpret_cast<uint4*>(items_to + to) = pack_values<Bf16>(conv.gradient, items.g, k0 + 8 * chunk);
      }
    } else if (pixel < tiling.patch_pixels) {
      items.x.finish(conv.x, c0 + 8 * chunk, items_to + Tile::kOperandBytes + to);
    }
  };
  // What a tile's items need to know of their pixels, once for all channels. It asks for what they will read,
  // too, unless these follow at once.
  const auto find_pixels = [&](const Tiling::Position& at, int buffer, bool ask) {
    int* const of_tile = numbers + buffer * Tile::kNumbers;
#pragma unroll 1
    for (int i = thread; i < Tile::kPixels + tiling.patch_pixels; i += Tile::kThreads) {
      if (i < Tile::kPixels) {
        of_tile[i] = conv.gradient.number(tiling.output(at, make_int2(i / kCols, i % kCols)));
        if (ask) prefetch_channels(conv.gradient, NumberedPixel(of_tile[i]), k0, Tile::kTileK);
      } else {
        of_tile[i] = conv.x.number(tiling.input(at, i - Tile::kPixels));
        if (ask) prefetch_channels(conv.x, NumberedPixel(of_tile[i]), c0, Tile::kTileC);
      }
    }
  };

  int tile = first_tile(split);
  const int end = first_tile(split + 1);
  Tiling::Position at = tiling.position(tile), behind = tiling.next(at), second = tiling.next(behind);
  find_pixels(at, 0, /*ask=*/false);
  find_pixels(behind, 1, /*ask=*/false);
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < Tile::kItems; ++i) {
    Items items;
    start(items, i, 0);
    finish(items, i, 0);
  }
  cp_async_commit();

  // A warp's rows of g: ldmatrix's lanes name pixels of the first or the second 8, of its first or second 8
  // channels.
  const unsigned char* const g_rows =
      shared + (2 * warp + (lane >> 3 & 1)) * Tile::kStride + ((lane & 7) + (lane >> 4) * 8) * 16;
  const uint64_t x_rows =
      wgmma_columns(shared + Tile::kOperandBytes + filter_row * kPitch * 16, kPitch * 16, Tile::kStride);
  float acc[3][Tile::kNT][4] = {};
  float bias[4] = {};  // of the steps whose turn it is, all columns the same
  int buffer = 0;
#pragma unroll 1
  while (true) {
    cp_async_wait<0>();
    wgmma_operand_fence();
    __syncthreads();
    const bool more = tile + 1 < end;
    if (tile + 2 < end) find_pixels(second, buffer, /*ask=*/true);
    uint32_t fragments[2][4];  // of a step and of the next one
    const auto load_g = [&](int step) {
      ldmatrix_x4_trans(fragments[step % 2],
                        g_rows + buffer * Tile::kBufferBytes + step * Tile::kStepPixels * 16);
    };
    load_g(0);
    int further = buffer * (Tile::kBufferBytes / 16);  // than x_rows
    int boundary = tiling.stack - at.p;                // the row of the tile with which the next image begins
    Items items;
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
      if constexpr (Gradient::kHasBias) {
        if (c0 == 0 && step % Tile::kGroups == filter_row) {
          mma_bf16(bias, fragments[step % 2], {0x3f803f80u, 0x3f803f80u});
        }
      }
      if (2 * step == boundary) {
        further += 2 * kPitch;
        boundary += tiling.stack;
      }
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < 3; ++s) {
        wgmma_bf16_trans(acc[s], fragments[step % 2],
                         wgmma_columns_from(x_rows, further + 2 * step * kPitch + s));
      }
      wgmma_commit();
      // An item is on its way while the step before is waited for and the next one is started.
      if (more && step > 0 && step <= Tile::kItems) finish(items, step - 1, buffer ^ 1);
      if (more && step < Tile::kItems) start(items, step, buffer ^ 1);
      if (step + 1 < Tile::kSteps) {
        wgmma_wait<1>();  // the other fragments may be written
        load_g(step + 1);
      } else {
#pragma unroll
        for (int s = 0; s < 3; ++s) wgmma_wait_for(acc[s]);
      }
    }
    cp_async_commit();
    if (!more) break;
    buffer ^= 1;
    ++tile;
    at = behind;
    behind = second;
    second = tiling.next(second);
  }

  const bool pairs = conv.C % 2 == 0;
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    const int tap = 3 * filter_row + s;
    float* const out = conv.dweight + (static_cast<int64_t>(split) * kTaps + tap) * conv.K * conv.C;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int k = k0 + 16 * warp + 8 * i + lane / 4;
      if (k >= conv.K) continue;
#pragma unroll
      for (int nt = 0; nt < Tile::kNT; ++nt) {
        const int c = c0 + 8 * nt + 2 * (lane % 4);
        const float (&d)[4] = acc[s][nt];
        float* const to = out + static_cast<int64_t>(k) * conv.C + c;
        if (pairs && c < conv.C) {
          *reinterpret_cast<float2*>(to) = make_float2(d[2 * i], d[2 * i + 1]);
        } else {
          if (c < conv.C) to[0] = d[2 * i];
          if (c + 1 < conv.C) to[1] = d[2 * i + 1];
        }
      }
    }
  }

  if constexpr (Gradient::kHasBias) {
    if (c0 > 0) return;
    float* const sums = reinterpret_cast<float*>(shared + Tile::kBiasBegin);
    if (lane % 4 == 0) {
      float* const to = sums + filter_row * Tile::kTileK + 16 * warp + lane / 4;
      to[0] = bias[0];
      to[8] = bias[2];
    }
    __syncthreads();
    if (thread < Tile::kTileK && k0 + thread < conv.K) {
      float total = 0.0f;
#pragma unroll
      for (int group = 0; group < Tile::kGroups; ++group) total += sums[group * Tile::kTileK + thread];
      conv.dbias[static_cast<int64_t>(split) * conv.K + k0 + thread] = total;
    }
  }
#else
  __trap();
#endif
}

/// As weight_gradient, of bfloat16 tensors that is_wide holds for.
template <class Source, class Gradient>
cudaError_t weight_gradient_wgmma(const ConvCall& call, const Source& x, const Gradient& gradient,
                                  float* dweight, float* dbias, void* workspace, cudaStream_t stream) {
  return launch_weight_gradient<WgmmaGradientTile>(&conv_weight_gradient_wgmma_kernel<Source, Gradient>, call,
                                                   x, gradient, dweight, dbias, workspace, stream);
}

}  // namespace maskcore
