// 3x3 convolution as an implicit GEMM over halo tiles; forward, and backward-data with the turned filter:
//   out[n,p,q,k] = sum over r,s,c of in[n, p + r - padding, q + s - padding, c] w[k,r,s,c],   NHWC
// GEMM: rows m = the kTileM output pixels of a tile (conv_tiling.cuh), columns n = kTileN output channels,
// reduction over 9 taps x C channels, in slabs of 64 bytes of channels (16 float32 or 32 bfloat16).
//
// Where im2col's implicit GEMM (CUTLASS' fprop, Thakkar et al.) gathers each input pixel nine times, here the
// patch of input under the tile is brought into shared memory once a slab, and the nine taps are nine shifted
// products on it: row m's window begins at patch pixel window(m), tap (r, s) lies r pitch + s further. A tile
// of 8 x 16 pixels reads 10 x 18 = 1.4 times its pixels through L2 instead of 9 times; and what the source
// computes (ReLU mask, unpooling, batch-norm gradient) is computed 1.4 times instead of 9.
//
// Pipeline: while slab i's nine taps are multiplied, slab i + 1's patch arrives in the other of two buffers,
// one 16-byte item a thread and tap: by cp.async with zero fill outside the image where the source is a plain
// tensor, else through registers, loaded before the tap's products and stored after them. A tap is shorter
// than memory's latency: the first one asks for all that such items will read into L2, the last ones load.
//
// The filter arrives tap by tap by cp.async, in three stages, or in two where the third would cost a block
// its place; one barrier a tap. Or all of it is resident: loaded once, and the block goes through many tiles,
// each one's first patch arriving during the one before, with one barrier a slab.
//   Narrow, up to 36 KB  9 taps of 32 x 32 are 18 KB in bf16, 36 KB in TF32, more than a tile's own input
//                        (180 * 64 bytes a slab) or output
//   Middle, up to 72 KB  of 64 x 64 in bf16, 32 x 64 in TF32, where a multiprocessor holds two blocks with so
//                        much: sm_90 and sm_100. Streamed, a tile of 64 x 64 takes 72 + 23 KB through L2, 95,
//                        for 4.7 M products: 2,304 cycles of an sm_90's tensor cores (42 bytes a cycle, where
//                        its L2 gives a multiprocessor 23), 4,608 of an sm_80's (21 of 30), 18,432 of an
//                        sm_89's (5 of 16). So on an sm_90 L2 would keep it at 54 % of the tensor cores, at
//                        43 % with two tensors to read, and nowhere else. In TF32 64 x 64 are 144 KB, which
//                        leave room for one block of four warps: streamed
//
// Budget
//   shared     a head of 256 or 384 bytes, two patches of kPatchPixels = 192 pixels of 64 bytes, and filters:
//              Wide    256 + 2 * 192 * 64 + 3 * 128 * 64 = 49,408 bytes: two blocks even in 100 KB
//              Middle  256 + 2 * 192 * 64 + 3 * 64 * 64  = 37,120: four in 164 KB; with two stages 33,024:
//              three in 100 KB, of 37,120 two. Resident 24,832 + 18 * 4,096 = 98,560: two in 228 KB
//              Narrow  384 + 2 * 192 * 64 + 3 * 32 * 64  = 31,104: three in 100 KB, four in 164 KB; resident,
//              of 32 channels, 24,960 + 9 * 2,048 = 43,392 in bf16, 24,960 + 18 * 2,048 = 61,824 in TF32
//              Small   384 + 2 * 192 * 64 + 3 * 64 * 64  = 37,248: two in 100 KB
//   registers  Wide, Middle: 64 accumulators, 8 of filter and 4 of input fragments, up to 19 of
//              an item on its way: within 128; resident Middle up to 160 of 256. Narrow, Small: 32
//              accumulators, within 128
//   occupancy  Wide 2 blocks * 8 = 16 warps of 64 (25 %) or of 48 (33 %), so Small. Middle 4 * 4 = 16 of 64
//              (25 %), in 100 KB 3 * 4 = 12 of 48 (25 %). Narrow, streaming, the same; resident, bf16: 3
//              blocks in 164 KB, 12 warps of 64 (19 %), TF32 2 blocks (12 %): below 25 % because the filter
//              kept takes away more traffic through L2 (18 or 36 KB a tile beside 12 or 23 KB of input) than
//              more warps hide. Middle, resident: 2 * 4 = 8 of 64 (12 %), two a scheduler, as matrix products
//              have them: 16 independent products of a warp and no barrier within nine taps hide what the
//              other eight warps would
//   shared memory traffic of a 64 x 32 warp tile: (64 + 32) * 32 bytes for 64 * 32 * 16 bf16 products = 24
//   cycles of 128 bytes, in which an sm_80 does 32 cycles' worth of products; TF32 the same for 64 * 32 * 8.
//
// An sm_90 has products of its own, and takes conv_halo_wgmma.cuh for more than 32 output channels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "conv_epilogues.cuh"
#include "conv_math.cuh"
#include "conv_sources.cuh"
#include "conv_tiling.cuh"

namespace maskcore {

constexpr int kTaps = 9;
constexpr int kTilePixels = 128, kPatchPixels = 192;
constexpr int kPatchBytes = kPatchPixels * kRowBytes;
constexpr int kNarrowFilterBytes = 36 * 1024, kMiddleFilterBytes = 72 * 1024;
constexpr int kFewStages = 2, kManyStages = 3;
constexpr int kSharedBytesOfABlock = 1024;  // that it takes besides those it asks for

// 16 rows of 32 sums on their way from registers to memory. 8 floats more a row put the 8 bytes that 16 lanes
// write at once, four rows, into different banks.
constexpr int kStagePitch = 32 + 8;
constexpr int kStageBytes = 16 * kStagePitch * 4;

/// kWarpsM x kWarpsN warps of 16 MT x 32 sums each.
template <class Math_, int kWarpsM_, int kWarpsN_, int MT_, int kBlocks_, bool kResident_ = false>
struct HaloTile {
  using Math = Math_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, MT = MT_, NT = 4;
  static constexpr int kTileM = kWarpsM * 16 * MT, kTileN = kWarpsN * 8 * NT;
  static constexpr int kWarps = kWarpsM * kWarpsN, kThreads = 32 * kWarps, kLoaders = kThreads;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kSlab = kRowChunks * Math::kLanes;  // channels
  static constexpr int kTapBytes = kTileN * kRowBytes;
  // Chunks of a tap's filter that a thread copies, whole swizzles apart.
  static constexpr int kFilterItems = kTileN * kRowChunks / kThreads;
  static_assert(kFilterItems * kThreads == kTileN * kRowChunks && kThreads / kRowChunks % 8 == 0);
  // What is asked for in a tap is waited for one or, with many stages, two taps later.
  static constexpr int kItems = (kPatchPixels * kRowChunks + kThreads - 1) / kThreads;
  static_assert(kItems <= kTaps - (kManyStages - 2));
  static_assert(kTileM == kTilePixels && kThreads % kRowChunks == 0 && kTileN <= kThreads);
  // Sums are staged where the last slab's patch or, in a block with one tile, anything was.
  static constexpr int kEpilogueBytes = kWarps * (kStageBytes + 4) + kWarpsM * 3 * kTileN * 4;
  static_assert(kEpilogueBytes <= 2 * kPatchBytes + kFewStages * kTapBytes);
  // In front: the positions of this tile and of the next one, and a word of windows for each named row of a
  // 16-row block; 128 is a line's alignment for what follows.
  static constexpr int kNamedRows = Math::kFragments ? 16 : 8;
  static constexpr int kHeadBytes = (2 * 16 + kWarpsM * kNamedRows * 4 + 127) / 128 * 128;
  static_assert(MT * kRowsPerBlock<Math> <= 4 && kPatchPixels <= 256, "windows are bytes of a word");
  // Whether the block keeps the whole filter and goes through many tiles.
  static constexpr bool kResident = kResident_;
  static_assert(!kResident || kEpilogueBytes <= kPatchBytes);
};

template <class Math>
using WideTile = HaloTile<Math, 2, 4, 4, 2>;
template <class Math, bool kResident = false>
using MiddleTile = HaloTile<Math, 2, 2, 4, kResident ? 2 : 4, kResident>;
template <class Math, bool kResident = false>
using NarrowTile = HaloTile<Math, 4, 1, 2, 4, kResident>;
// 32 accumulators: for products that need registers, and for float32 tensors in bf16, of which 16 to 19
// numbers a thread are on their way.
template <class Math>
using SmallTile = HaloTile<Math, 4, 2, 2, 2>;

/// w[K,C,3,3] -> [slab][tap][row of output channel][slab's channels], rounded, zero where there is no
/// channel: what a block loads for one tap is contiguous and has no tails. `turned`: for backward-data, out
/// channels C and in channels K, taps turned by 180 degrees. One thread a 16-byte chunk.
template <class Math>
__global__ void __launch_bounds__(256) pack_filter_kernel(const float* w, int out_channels, int in_channels,
                                                          int slabs, int rows, bool turned, uint4* packed) {
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (chunk >= static_cast<int64_t>(slabs) * kTaps * rows * kRowChunks) return;
  const int64_t row = chunk / kRowChunks;
  const int out = static_cast<int>(row % rows), tap = static_cast<int>(row / rows % kTaps);
  const int slab = static_cast<int>(row / rows / kTaps);
  float v[Math::kLanes];
#pragma unroll
  for (int i = 0; i < Math::kLanes; ++i) {
    const int in = (slab * kRowChunks + static_cast<int>(chunk % kRowChunks)) * Math::kLanes + i;
    const int64_t pair =
        turned ? static_cast<int64_t>(in) * out_channels + out : static_cast<int64_t>(out) * in_channels + in;
    const bool there = out < out_channels && in < in_channels;
    v[i] = there ? w[pair * kTaps + (turned ? kTaps - 1 - tap : tap)] : 0.0f;
  }
  packed[chunk] = Math::pack(v);
}

template <class Source, class Epilogue>
struct HaloConvolution {
  SpreadTiling tiling;
  Source source;
  Epilogue epilogue;
  uint4* filter;  // packed
  int slabs;
  int filter_rows;  // output channels rounded up to whole tiles
  int stages;       // kFewStages or kManyStages
};

/// Brings the patch of one (tile, slab) into shared memory, item by item.
template <class Tile, class Source>
struct PatchLoader {
  using Math = typename Tile::Math;

  const Tiling& tiling;
  const Source& source;

  // The item that is a thread's i-th. The thread is asked for anew, so that nothing is kept for the next tap.
  struct Place {
    int number = fresh_thread();

    __device__ __forceinline__ explicit Place(int i) {
      if constexpr (Tile::kLoaders < Tile::kThreads) number %= Tile::kLoaders;
      number += i * Tile::kLoaders;
    }
    __device__ __forceinline__ int pixel() const { return number / kRowChunks; }
    __device__ __forceinline__ int channel(int slab) const {
      return (slab * kRowChunks + number % kRowChunks) * Math::kLanes;
    }
    __device__ __forceinline__ int in_patch() const { return swizzled(pixel(), number % kRowChunks); }
  };
  __device__ __forceinline__ bool has(const Place& place) const {
    return place.number < tiling.patch_pixels * kRowChunks;
  }

  // Items that go through registers are asked for and stored in the last taps of a slab: until then what they
  // read, which the first tap has asked for, is in L2.
  static constexpr int kFirstTap = Item<Math, Source>::kMayCopy ? 0 : kTaps - Tile::kItems;
  __device__ __forceinline__ void prefetch(const Tiling::Position& at, int slab) const {
    if constexpr (!Item<Math, Source>::kMayCopy) {
      const int thread = fresh_thread() % Tile::kLoaders;
#pragma unroll
      for (int i = 0; i < (kPatchPixels + Tile::kLoaders - 1) / Tile::kLoaders; ++i) {
        const int pixel = thread + i * Tile::kLoaders;
        if (pixel < tiling.patch_pixels) source.prefetch(tiling.input(at, pixel), slab * Tile::kSlab);
      }
    }
  }

  using OneItem = Item<Math, Source>;
  __device__ __forceinline__ void start(OneItem& item, const Tiling::Position& at, int slab, int i,
                                        unsigned char* patch) const {
    const Place place(i);
    if (has(place)) {
      item.start(source, tiling.input(at, place.pixel()), place.channel(slab), patch + place.in_patch());
    }
  }
  __device__ __forceinline__ void finish(const OneItem& item, int slab, int i, unsigned char* patch) const {
    const Place place(i);
    if (has(place)) item.finish(source, place.channel(slab), patch + place.in_patch());
  }
};

/// Asks for what the epilogue will read of a tile: kTileN channels of each of its pixels.
template <class Tile, class AnyTiling, class Epilogue>
__device__ __forceinline__ void prefetch_outputs(const AnyTiling& tiling, const Tiling::Position& at,
                                                 const Epilogue& epilogue, int k0) {
  if constexpr (Epilogue::kOfGradient) {
    constexpr int kInLine = 128 / static_cast<int>(sizeof(*epilogue.z)),
                  kLines = (Tile::kTileN + kInLine - 1) / kInLine;
    for (int i = fresh_thread() % Tile::kLoaders; i < kLines * kTilePixels; i += Tile::kLoaders) {
      const Pixel pixel = tiling.output(at, tiling.template place<false>(i % kTilePixels));
      epilogue.prefetch(pixel, k0 + i / kTilePixels * kInLine);
    }
  }
}

/// One warp's sums, four channels a lane and 16 pixels a turn, through `stage` to the epilogue. With
/// kStatistics, pivot and sums over the warp's pixels go to `record`, [3][kTileN] from the warp's first
/// channel on, and the number of pixels to `count`.
template <class Tile, class AnyTiling, class Epilogue>
__device__ __forceinline__ void store_warp(const float (&acc)[Tile::MT][Tile::NT][4], const AnyTiling& tiling,
                                           const Tiling::Position& at, const Epilogue& epilogue, int m0,
                                           int k0, float* stage, float* record, float* count) {
  const int lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
  const int k = k0 + 4 * (lane & 7);
  typename Epilogue::OfChannels of_channels;
  epilogue.load(of_channels, k);
  [[maybe_unused]] float pivot[4] = {}, sum[4] = {}, squares[4] = {}, pixels = 0.0f;
#pragma unroll
  for (int mt = 0; mt < Tile::MT; ++mt) {
    const auto pixel_of = [&](int i) {
      return tiling.output(at, tiling.template place<false>(m0 + 16 * mt + 4 * i + (lane >> 3)));
    };
    [[maybe_unused]] float z[4][4];  // all on their way while the sums are staged
    if constexpr (Epilogue::kOfGradient) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Pixel pixel = pixel_of(i);
        if (pixel.inside && k < epilogue.K) epilogue.fetch(pixel, k, z[i]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int nt = 0; nt < Tile::NT; ++nt) {
      float* to = stage + g * kStagePitch + 8 * nt + 2 * t;
      *reinterpret_cast<float2*>(to) = make_float2(acc[mt][nt][0], acc[mt][nt][1]);
      *reinterpret_cast<float2*>(to + 8 * kStagePitch) = make_float2(acc[mt][nt][2], acc[mt][nt][3]);
    }
    __syncwarp();
    const auto staged = [&](int row, float (&v)[4]) {
      const float4 four = *reinterpret_cast<const float4*>(stage + row * kStagePitch + 4 * (lane & 7));
      v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    };
    if constexpr (Epilogue::kWindows) {
      const int row = lane >> 3 << 2;
      const Pixel pixel = tiling.output(at, tiling.template place<true>(m0 + 16 * mt + row));
      float v[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) staged(row + i, v[i]);
      if (pixel.inside && k < epilogue.K) epilogue.store(pixel, k, of_channels, v);
    } else {
      if constexpr (Epilogue::kStatistics && !Epilogue::kOfGradient) {
        if (mt == 0) {  // the mean of four: one pixel may be far from that of all, and squares about it large
          float others[3][4];
          staged(0, pivot);
#pragma unroll
          for (int i = 0; i < 3; ++i) staged(5 * (i + 1), others[i]);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            pivot[j] = 0.25f * ((pivot[j] + others[0][j]) + (others[1][j] + others[2][j]));
          }
          epilogue.finish(pivot, of_channels);
        }
      }
#pragma unroll(Epilogue::kOfGradient ? 4 : 1)
      for (int i = 0; i < 4; ++i) {
        const Pixel pixel = pixel_of(i);
        float v[4];
        staged(4 * i + (lane >> 3), v);
        const bool there = pixel.inside && k < epilogue.K;
        if constexpr (Epilogue::kOfGradient) {
          if (there) epilogue.store(pixel, k, of_channels, z[i], v, sum, squares);
        } else {
          epilogue.finish(v, of_channels);
          if (there) epilogue.store(pixel, k, v);
        }
        if constexpr (Epilogue::kStatistics && !Epilogue::kOfGradient) {
          pixels += pixel.inside ? 1.0f : 0.0f;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float d = pixel.inside ? v[j] - pivot[j] : 0.0f;
            sum[j] += d;
            squares[j] = fmaf(d, d, squares[j]);
          }
        }
      }
    }
  }
  if constexpr (Epilogue::kStatistics) {
    pixels += __shfl_xor_sync(0xffffffffu, pixels, 8);
    pixels += __shfl_xor_sync(0xffffffffu, pixels, 16);
    if (lane == 0) *count = pixels;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int other = 8; other < 32; other *= 2) {
        sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], other);
        squares[j] += __shfl_xor_sync(0xffffffffu, squares[j], other);
      }
      if (lane < 8) {
        const int n = 4 * lane + j;
        record[n] = pivot[j];
        record[Tile::kTileN + n] = sum[j];
        record[2 * Tile::kTileN + n] = squares[j];
      }
    }
  }
}

/// A tile's moments, of its n-th channel, from its warps' records and numbers of pixels.
template <class Tile, class Epilogue>
__device__ __forceinline__ void store_moments(int n, const float* records, const float* pixels,
                                              const Tiling& tiling, const Tiling::Position& at, int tile,
                                              int k0, const Epilogue& epilogue) {
  const int k = k0 + n;
  if (n >= Tile::kTileN || k >= epilogue.K) return;
  // About the first warp's pivot: y - p0 = (y - p) + (p - p0).
  const float pivot = records[n];
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < Tile::kWarpsM; ++i) {
    const float* of = records + i * 3 * Tile::kTileN + n;
    const float d = of[0] - pivot, s = of[Tile::kTileN], count = pixels[i * Tile::kWarpsN];
    sum += fmaf(count, d, s);
    squares += of[2 * Tile::kTileN] + d * fmaf(count, d, 2.0f * s);
  }
  float* moments = epilogue.moments + static_cast<int64_t>(tile) * 3 * epilogue.K + k;
  moments[0] = pivot;
  moments[epilogue.K] = sum;
  moments[2 * epilogue.K] = squares;
  if (k == 0) epilogue.counts[tile] = tiling.pixels(at);
}

template <class Tile, class Source, class Epilogue>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    conv_halo_tile_kernel(const HaloConvolution<Source, Epilogue> conv) {
  using Math = typename Tile::Math;
  constexpr int kRows = Tile::MT * kRowsPerBlock<Math>;
  // Positions of this tile and of the next one, where the rows' windows begin, two patches, filters.
  int4* const positions = dynamic_shared<int4>();
  uint32_t* const windows =
      dynamic_shared<uint32_t>() + 8 + threadIdx.x / 32 / Tile::kWarpsN * Tile::kNamedRows;
  unsigned char* const shared = dynamic_shared<unsigned char>() + Tile::kHeadBytes;
  constexpr int kFilters = 2 * kPatchBytes;
  const SpreadTiling& tiling = conv.tiling;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_m = warp / Tile::kWarpsN * 16 * Tile::MT, warp_n = warp % Tile::kWarpsN * 8 * Tile::NT;
  // Blocks that share a tile of pixels are neighbours, so that its input stays in L2.
  const int k_tiles = conv.filter_rows / Tile::kTileN;
  const int k_first = static_cast<int>(blockIdx.x) % k_tiles * Tile::kTileN;
  const int steps = conv.slabs * kTaps;

  const auto load_filter = [&](int step, int slot) {
    const uint4* const from =
        conv.filter + (static_cast<int64_t>(step) * conv.filter_rows + k_first) * kRowChunks + thread;
    unsigned char* const to =
        shared + kFilters + slot * Tile::kTapBytes + swizzled(thread / kRowChunks, thread % kRowChunks);
#pragma unroll
    for (int i = 0; i < Tile::kFilterItems; ++i) {
      cp_async_16(to + i * Tile::kThreads / kRowChunks * kRowBytes, from + i * Tile::kThreads);
    }
  };

  // All but the filters of the taps behind the next one.
  const auto wait = [&] {
    if (conv.stages == kManyStages) {
      cp_async_wait<kManyStages - 2>();
    } else {
      cp_async_wait<kFewStages - 2>();
    }
  };

  const PatchLoader<Tile, Source> loader{tiling, conv.source};
  int tile = static_cast<int>(blockIdx.x) / k_tiles;
  const int stride = static_cast<int>(gridDim.x) / k_tiles;
  if (thread < 2) tiling.store_position(tile + thread * stride, positions + thread, k_first);
  if constexpr (Tile::kResident) {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) load_filter(step, step);
  }
  const Tiling::Position first = tiling.position(tile);
#pragma unroll 1
  for (int i = 0; i < Tile::kItems; ++i) {
    Item<Math, Source> item;
    loader.start(item, first, 0, i, shared);
    loader.finish(item, 0, i, shared);
  }
#pragma unroll 1
  for (int step = 0; step < conv.stages - 1; ++step) {
    if (!Tile::kResident) load_filter(step, step);
    cp_async_commit();
  }

  int patch = 0;           // where that in use begins; the other one is being filled
  int slot = 0, turn = 0;  // turn: which of the two positions is this tile's
  __syncthreads();
  while (true) {
    if (warp % Tile::kWarpsN == 0) {
      const Tiling::Position at = Tiling::load(positions + turn);
      uint32_t named = 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int window = tiling.any_window(at, warp_m + named_row<Math>(i, lane));
        named |= static_cast<uint32_t>(window) << (8 * i);
      }
      if (Math::kFragments ? lane < 16 : lane % 4 == 0) windows[first_named_row<Math>(lane)] = named;
    }
    float acc[Tile::MT][Tile::NT][4] = {};
    const bool last_tile = !Tile::kResident || tile + stride >= tiling.tiles;
    int load_turn = turn;
#pragma unroll 1
    for (int slab = 0; slab < conv.slabs; ++slab) {
      int load_slab = slab + 1;
      if (load_slab == conv.slabs && !last_tile) {
        load_slab = 0;
        load_turn = turn ^ 1;
      }
#pragma unroll 1
      for (int tap = 0, offset = 0; tap < kTaps; ++tap) {
        if constexpr (Tile::kResident) {
          if (tap == 0) {
            cp_async_wait<0>();
            __syncthreads();
          }
        } else {
          wait();
          __syncthreads();
        }
        const int step = slab * kTaps + tap;
        if (!Tile::kResident && step + conv.stages - 1 < steps) {
          load_filter(step + conv.stages - 1, slot == 0 ? conv.stages - 1 : slot - 1);
        }
        if (tap == 0) {
          if (load_slab < conv.slabs) loader.prefetch(Tiling::load(positions + load_turn), load_slab);
          if (slab == 0)
            prefetch_outputs<Tile>(tiling, Tiling::load(positions + turn), conv.epilogue, k_first);
        }
        const int number = tap - PatchLoader<Tile, Source>::kFirstTap;
        const bool loads = load_slab < conv.slabs && number >= 0 && number < Tile::kItems;
        Item<Math, Source> item;  // of this step: it takes no registers after it
        if (loads)
          loader.start(item, Tiling::load(positions + load_turn), load_slab, number,
                       shared + (kPatchBytes - patch));
        cp_async_commit();
        const unsigned char* filter =
            shared + kFilters + (Tile::kResident ? step : slot) * Tile::kTapBytes + warp_n * kRowBytes;
        multiply_rows<Math>(acc, shared + patch, windows[first_named_row<Math>(lane)], offset, filter, lane);
        offset += tap == 2 || tap == 5 ? tiling.pitch - 2 : 1;  // r pitch + s of tap 3 r + s
        if (loads && !Item<Math, Source>::copies(conv.source))
          loader.finish(item, load_slab, number, shared + (kPatchBytes - patch));
        slot = slot + 1 == conv.stages ? 0 : slot + 1;
      }
      patch = kPatchBytes - patch;
    }

    const Tiling::Position at = Tiling::load(positions + turn);
    const int k_now = positions[turn].w;  // k_first, without a register kept for it
    __syncthreads();                      // the others may still read what the sums are staged over
    if (thread == 0 && !last_tile) tiling.store_position(tile + 2 * stride, positions + turn, k_now);
    unsigned char* const free = shared + (Tile::kResident ? kPatchBytes - patch : 0);
    float* const stage = reinterpret_cast<float*>(free + warp * kStageBytes);
    float* const records = reinterpret_cast<float*>(free + Tile::kWarps * kStageBytes);
    const int record = warp / Tile::kWarpsN * 3 * Tile::kTileN + warp_n;
    float* const pixels = records + Tile::kWarpsM * 3 * Tile::kTileN;  // of each warp
    store_warp<Tile>(acc, tiling, at, conv.epilogue, warp_m, k_now + warp_n, stage, records + record,
                     pixels + warp);
    if constexpr (Epilogue::kStatistics) {
      __syncthreads();
      store_moments<Tile>(thread, records, pixels, tiling, at, tile, k_now, conv.epilogue);
    }
    if (last_tile) return;
    tile += stride;
    turn ^= 1;
  }
}

// ---- launching -----------------------------------------------------------------------------------

/// Float32 that the products want in bfloat16 and that is computed while it is loaded: many registers an
/// item.
template <class Math, class Source>
constexpr bool kConverts =
    !Source::kPlain && !std::is_same_v<typename Source::Element, typename Math::Shared>;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

/// Bytes of the packed filter of a convolution with C input and K output channels, in any precision: slabs
/// of 16 channels at least, and whole tiles of at most 128 output channels.
inline int64_t packed_filter_bytes(int64_t C, int64_t K) {
  return round_up(C, 16) / 16 * kTaps * round_up(K, 128) * kRowBytes;
}

/// Bytes of a block's filter, all slabs and taps.
template <class Tile>
int64_t block_filter_bytes(const ConvSize& s) {
  return round_up(s.C, Tile::kSlab) / Tile::kSlab * kTaps * Tile::kTapBytes;
}

/// How many blocks with so many bytes of filter a multiprocessor holds, of those that their registers allow.
template <class Tile>
int64_t blocks_held(const ConvCall& call, int64_t filter_bytes) {
  const int64_t bytes = Tile::kHeadBytes + 2 * kPatchBytes + filter_bytes + kSharedBytesOfABlock;
  return std::min<int64_t>(Tile::kBlocks, call.shared_bytes / bytes);
}

/// What the launchers share: tiles, and room for the packed filter. Without tiles: sizes that the kernels
/// cannot address.
template <class Source, class Epilogue>
HaloConvolution<Source, Epilogue> halo_convolution(const ConvSize& s, const Source& source,
                                                   const Epilogue& epilogue, void* packed) {
  return {.tiling = SpreadTiling::choose(s, Epilogue::kWindows, kTilePixels, kPatchPixels),
          .source = source,
          .epilogue = epilogue,
          .filter = static_cast<uint4*>(packed),
          .slabs = 0,
          .filter_rows = 0,
          .stages = 0};
}

/// Packs the filter as the tile wants it.
template <class Tile, class Source, class Epilogue>
cudaError_t pack_filter(const ConvSize& s, const float* weight, bool turned,
                        HaloConvolution<Source, Epilogue>& conv, cudaStream_t stream) {
  conv.slabs = static_cast<int>(round_up(s.C, Tile::kSlab) / Tile::kSlab);
  conv.filter_rows = static_cast<int>(round_up(s.K, Tile::kTileN));
  const int64_t chunks = static_cast<int64_t>(conv.slabs) * kTaps * conv.filter_rows * kRowChunks;
  return launch(&pack_filter_kernel<typename Tile::Math>, dim3(static_cast<unsigned>((chunks + 255) / 256)),
                dim3(256), 0, stream, weight, static_cast<int>(s.K), static_cast<int>(s.C), conv.slabs,
                conv.filter_rows, turned, conv.filter);
}

template <class Tile, class Source, class Epilogue>
cudaError_t launch_halo_tile(const ConvCall& call, const ConvSize& s, const float* weight, bool turned,
                             HaloConvolution<Source, Epilogue> conv, cudaStream_t stream) {
  const cudaError_t error = pack_filter<Tile>(s, weight, turned, conv, stream);
  if (error != cudaSuccess) return error;
  // A stage more, unless it takes a block's place.
  const bool many = blocks_held<Tile>(call, kManyStages * Tile::kTapBytes) ==
                    blocks_held<Tile>(call, kFewStages * Tile::kTapBytes);
  conv.stages = many ? kManyStages : kFewStages;
  int64_t blocks = static_cast<int64_t>(conv.tiling.tiles) * (conv.filter_rows / Tile::kTileN);
  int64_t filter = conv.stages * Tile::kTapBytes;
  if constexpr (Tile::kResident) {
    filter = block_filter_bytes<Tile>(s);
    blocks = std::min(blocks, call.multiprocessors * std::max<int64_t>(1, blocks_held<Tile>(call, filter)));
  }
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidValue;
  return launch(&conv_halo_tile_kernel<Tile, Source, Epilogue>, dim3(static_cast<unsigned>(blocks)),
                dim3(Tile::kThreads), static_cast<size_t>(Tile::kHeadBytes + 2 * kPatchBytes + filter),
                stream, conv);
}

/// Whether tiles of 64 output channels are done a tenth sooner than those of 128, which take twice as long:
/// the last ones keep fewer multiprocessors at work for longer, or have fewer channels. Less is not worth
/// reading each patch twice as often.
inline bool narrower_is_sooner(const ConvCall& call, int64_t tiles, int64_t K) {
  const auto time = [&](int64_t columns) {
    const int64_t all = tiles * ((K + columns - 1) / columns);
    return columns * ((all + call.multiprocessors - 1) / call.multiprocessors);
  };
  return 10 * time(64) <= 9 * time(128);
}

/// The tile is chosen by the number of output channels, so that more than half of it is used; the narrow
/// one's filter stays where it is small enough, the middle one's where the multiprocessor has room for it.
template <class Math, class Source, class Epilogue>
cudaError_t convolve_halo_tile(const ConvCall& call, const ConvSize& s, const float* weight, bool turned,
                               const HaloConvolution<Source, Epilogue>& conv, cudaStream_t stream) {
  const auto with = [&]<class Tile>(Tile*) {
    return launch_halo_tile<Tile>(call, s, weight, turned, conv, stream);
  };
  const auto narrow = [&]<class M = Math>() {  // a template: compiled for the types that call it
    if (block_filter_bytes<NarrowTile<M>>(s) > kNarrowFilterBytes) {
      return with(static_cast<NarrowTile<M>*>(nullptr));
    }
    return with(static_cast<NarrowTile<M, true>*>(nullptr));
  };
  const auto middle = [&]<class M = Math>() {
    using Resident = MiddleTile<M, true>;
    if (s.K > 64 || block_filter_bytes<Resident>(s) > kMiddleFilterBytes ||
        blocks_held<Resident>(call, kMiddleFilterBytes) < Resident::kBlocks) {
      return with(static_cast<MiddleTile<M>*>(nullptr));
    }
    return with(static_cast<Resident*>(nullptr));
  };
  if constexpr (!Math::kFragments) {
    return with(static_cast<SmallTile<Math>*>(nullptr));
  } else if constexpr (kConverts<Math, Source>) {
    return s.K > 32 ? with(static_cast<SmallTile<Math>*>(nullptr)) : narrow();
  } else {
    if (s.K > 64 && !narrower_is_sooner(call, conv.tiling.tiles, s.K)) {
      return with(static_cast<WideTile<Math>*>(nullptr));
    }
    return s.K > 32 ? middle() : narrow();
  }
}

}  // namespace maskcore
