// conv_halo_tile.cuh's convolution by the warpgroup products of sm_90 (wgmma, PTX ISA "Asynchronous Warpgroup
// Level Matrix Multiply-Accumulate"), of which mma.sync reaches 63 % there. Patches, windows, filters,
// sources and epilogues are those of that file; what differs is how a block multiplies.
//
// A tile of 128 pixels has two warpgroups of 64 rows, a patch in two buffers and all of the block's kTileN
// columns. A warp loads its 16 rows of a step by one ldmatrix at the shifted windows, as before, and rounds
// them where they must be; wgmma takes them from registers and the filter from shared memory, where its rows
// of 64 bytes lie swizzled as wgmma's 64-byte mode has them. For 128 columns a step takes 4 * 512 + 128 * 32
// bytes of shared memory, 48 cycles of 128, for 64 * 128 * 16 products, 64 cycles of an sm_90's tensor cores;
// for 64 columns 32 of 32.
//
// Pipeline: a step is a tap of a slab, two wgmmas a warpgroup. The filter arrives by rows of three taps, one
// ahead, into the places of a slab's nine; so a barrier, and the fence that shows shared memory to wgmma,
// come once in three taps. Or the filter is resident, and the block goes through many tiles with one barrier
// a slab. A step's fragments are held until the next step's products are started: two sets of registers,
// which the taps take in turns, and the next step's are loaded while the products of this one run. With a
// slab's last tap all products are waited for: carried over the loop's end, ptxas would wait for each of
// them. The multiprocessor's other block multiplies meanwhile, and while this one stores its sums. The taps
// are unrolled: in a loop over taps a step of 64 columns has 70 instructions, where its products take 64
// cycles of the scheduler's tensor core.
//
// Budget
//   shared     filters; of a tile two patches of 12,288 bytes, 32 of positions and, where the filter stays,
//              16,416 of sums beside the patch that they are staged over: four warps' 2,560 and 8 records of
//              3 * 64 floats and a count
//              128 columns          9 * 8,192 + 24,608 = 98,336: two in 228 KB
//              64                   9 * 4,096 + 24,608 = 61,472: two, by their registers
//              resident, one tile   up to 73,728 + 41,024 = 114,752: two
//              resident, two tiles, which share the filter: up to 147,456 + 2 * 41,024 = 229,504 of 232,448
//   registers  64 or 32 sums, 2 * 8 of fragments, up to 19 of an item on its way: within 128
//   occupancy  16 warps of 64 (25 %): two blocks of 8, or one of 16
#pragma once

#include "conv_halo_tile.cuh"

namespace maskcore {

template <class Math_, int kTileN_, int kTiles_, bool kResident_ = false>
struct WgmmaTile {
  using Math = Math_;
  static constexpr int kTiles = kTiles_, kTileM = kTilePixels, kTileN = kTileN_;
  static constexpr bool kResident = kResident_;
  // Of a tile: 8 warps, one under the other; what store_warp gets at a time.
  static constexpr int kWarpsM = 8, kWarpsN = 1, MT = 1, NT = 4;
  static constexpr int kLoaders = 32 * kWarpsM, kThreads = kTiles * kLoaders, kBlocks = 2 / kTiles;
  static constexpr int kSlab = kRowChunks * Math::kLanes;  // channels
  static constexpr int kTapBytes = kTileN * kRowBytes;
  static constexpr int kFilterItems = (kTileN * kRowChunks + kThreads - 1) / kThreads;
  static constexpr int kRowTaps = 3;  // whose filters arrive together
  static constexpr int kItems = (kPatchPixels * kRowChunks + kLoaders - 1) / kLoaders;
  static_assert(kTapBytes % 512 == 0 && kTileN <= kLoaders);
  // Behind the filters and the patches.
  static constexpr int kPositionBytes = 2 * 16 * kTiles;
  static constexpr int kRecordBytes = kWarpsM * (3 * kTileN + 1) * 4;
  // A resident block's sums are staged over the patch that was read last, as many warps' as it holds, and
  // here.
  static constexpr int kWarpsOverPatch = kPatchBytes / kStageBytes;
  static constexpr int kBehindBytes = (kWarpsM - kWarpsOverPatch) * kStageBytes + kRecordBytes;
  static constexpr int kBytesOfTiles = kTiles * (2 * kPatchBytes + (kResident ? kBehindBytes : 0));
  static_assert(kResident || kTiles == 1);
  static_assert(kWarpsM * kStageBytes + kRecordBytes <= kTaps * kTapBytes + 2 * kPatchBytes);

  static constexpr int shared_bytes(int filter_bytes) {
    return filter_bytes + kBytesOfTiles + kPositionBytes;
  }
};

template <class Tile, class Source, class Epilogue>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    conv_halo_wgmma_kernel(const HaloConvolution<Source, Epilogue> conv) {
#if defined(MASKCORE_WGMMA) || defined(MASKCORE_CUDA_EMULATION)
  using Math = typename Tile::Math;
  const SpreadTiling& tiling = conv.tiling;
  const int steps = conv.slabs * kTaps;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32 % Tile::kWarpsM;
  const int of_block = Tile::kTiles == 1 ? 0 : thread / Tile::kLoaders;  // which of its tiles
  // Filters, each tile's patches, positions of these tiles and of the next ones, room for sums.
  unsigned char* const filters = dynamic_shared<unsigned char>();
  unsigned char* const tiles = filters + (Tile::kResident ? steps : kTaps) * Tile::kTapBytes;
  unsigned char* const patches = tiles + of_block * 2 * kPatchBytes;
  int4* const positions = reinterpret_cast<int4*>(tiles + Tile::kTiles * 2 * kPatchBytes) + 2 * of_block;
  // Blocks that share a tile of pixels are neighbours, so that its input stays in L2.
  const int k_tiles = conv.filter_rows / Tile::kTileN;
  const int k_first = static_cast<int>(blockIdx.x) % k_tiles * Tile::kTileN;

  // The filter of a row of taps, of which `step` is the first.
  const auto load_filter = [&](int step, int slot) {
    const int thread = fresh_thread();
    if (Tile::kTileN * kRowChunks < Tile::kThreads && thread >= Tile::kTileN * kRowChunks) return;
    const uint4* from =
        conv.filter + (static_cast<int64_t>(step) * conv.filter_rows + k_first) * kRowChunks + thread;
    unsigned char* const to =
        filters + slot * Tile::kTapBytes + swizzled(thread / kRowChunks, thread % kRowChunks);
#pragma unroll
    for (int tap = 0; tap < Tile::kRowTaps; ++tap) {
#pragma unroll
      for (int i = 0; i < Tile::kFilterItems; ++i) {
        cp_async_16(to + tap * Tile::kTapBytes + i * Tile::kThreads / kRowChunks * kRowBytes,
                    from + i * Tile::kThreads);
      }
      from += conv.filter_rows * kRowChunks;
    }
  };

  const PatchLoader<Tile, Source> loader{tiling, conv.source};
  // The tile past the last one, of a block whose other tile is the last, has neither inputs nor outputs.
  int tile = static_cast<int>(blockIdx.x) / k_tiles * Tile::kTiles + of_block;
  const int stride = static_cast<int>(gridDim.x) / k_tiles * Tile::kTiles;
  if (thread % Tile::kLoaders < 2) {
    const int turn = thread % Tile::kLoaders;
    tiling.store_position(tile + turn * stride, positions + turn, k_first);
  }
#pragma unroll 1
  for (int step = 0; step < (Tile::kResident ? steps : 1); step += Tile::kRowTaps) load_filter(step, step);
  const Tiling::Position first = tiling.position(tile);
#pragma unroll 1
  for (int i = 0; i < Tile::kItems; ++i) {
    Item<Math, Source> item;
    loader.start(item, first, 0, i, patches);
    loader.finish(item, 0, i, patches);
  }
  cp_async_commit();

  const uint64_t of_filters = wgmma_rows_of_64(filters);
  int patch = 0;  // where that in use begins; the other one is being filled
  int turn = 0;   // which of the two positions is this tile's
  __syncthreads();
  while (true) {
    const int window = tiling.any_window(Tiling::load(positions + turn), 16 * warp + lane % 16);
    const bool last_tile = !Tile::kResident || tile - of_block + stride >= tiling.tiles;
    float acc[Tile::kTileN / 8][4] = {};
    uint32_t fragments[2][2][4];  // of a tap and of the next one
#pragma unroll 1
    for (int slab = 0; slab < conv.slabs; ++slab) {
      const bool next_tile = slab + 1 == conv.slabs && !last_tile;
      const int load_slab = next_tile ? 0 : slab + 1, load_turn = next_tile ? turn ^ 1 : turn;
      const bool loads = load_slab < conv.slabs;
      unsigned char* const next = patches + (kPatchBytes - patch);
      const auto load_rows = [&](int tap) {
        constexpr bool kFewRegisters =
            Tile::kTileN == 128 || Tile::kTiles == 2;  // none for the rows of all taps
        const int begin = kFewRegisters ? in_a_register(window) : window;
        const int row = begin + tap / 3 * tiling.pitch + tap % 3;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t (&a)[4] = fragments[tap % 2][i];
          ldmatrix_x4(a, patches + patch + swizzled(row, 2 * i + (lane >> 4)));
          Math::round(a);
        }
      };
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        const int step = slab * kTaps + tap;
        if (Tile::kResident ? tap == 0 : tap % Tile::kRowTaps == 0) {
          cp_async_wait<0>();
          wgmma_operand_fence();
          __syncthreads();
          if (!Tile::kResident && step + Tile::kRowTaps < steps) {
            load_filter(step + Tile::kRowTaps, (tap + Tile::kRowTaps) % kTaps);
          }
        }
        if (tap == 0) {
          load_rows(0);
          if (loads) loader.prefetch(Tiling::load(positions + load_turn), load_slab);
          if (slab == 0)
            prefetch_outputs<Tile>(tiling, Tiling::load(positions + turn), conv.epilogue, k_first);
        }
        const int number = tap - PatchLoader<Tile, Source>::kFirstTap;
        const bool has_item = number >= 0 && number < Tile::kItems;
        Item<Math, Source> item;  // of this step: it takes no registers after it
        if (has_item && loads) {
          loader.start(item, Tiling::load(positions + load_turn), load_slab, number, next);
        }
        if (tap % Tile::kRowTaps == Tile::kRowTaps - 1) cp_async_commit();
        const int filter = (Tile::kResident ? step : tap) * Tile::kTapBytes;
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          Math::wgmma(acc, fragments[tap % 2][i], of_filters + ((filter + 32 * i) >> 4));
        }
        wgmma_commit();
        if (has_item && loads && !Item<Math, Source>::copies(conv.source)) {
          loader.finish(item, load_slab, number, next);
        }
        if (tap + 1 < kTaps) {
          wgmma_wait<1>();  // the other fragments may be written
          load_rows(tap + 1);
        } else {
          wgmma_wait_for(acc);
        }
      }
      patch = kPatchBytes - patch;
    }

    const Tiling::Position at = Tiling::load(positions + turn);
    const int k_now = positions[turn].w;  // k_first, without a register kept for it
    __syncthreads();                      // the others may still read what the sums are staged over
    if (thread % Tile::kLoaders == 0 && !last_tile) {
      tiling.store_position(tile + 2 * stride, positions + turn, k_now);
    }
    unsigned char *to, *behind;  // where this warp's sums are staged, and the tile's records are
    if constexpr (Tile::kResident) {
      behind = tiles + Tile::kTiles * 2 * kPatchBytes + Tile::kPositionBytes + of_block * Tile::kBehindBytes;
      to = warp < Tile::kWarpsOverPatch ? patches + (kPatchBytes - patch) + warp * kStageBytes
                                        : behind + (warp - Tile::kWarpsOverPatch) * kStageBytes;
      behind += (Tile::kWarpsM - Tile::kWarpsOverPatch) * kStageBytes;
    } else {
      to = filters + warp * kStageBytes;
      behind = filters + Tile::kWarpsM * kStageBytes;
    }
    float* const stage = reinterpret_cast<float*>(to);
    float* const records = reinterpret_cast<float*>(behind);
    float* const pixels = records + Tile::kWarpsM * 3 * Tile::kTileN;  // of each warp
#pragma unroll
    for (int i = 0; i < Tile::kTileN / 32; ++i) {
      float sums[1][Tile::NT][4];
#pragma unroll
      for (int j = 0; j < 4 * Tile::NT; ++j) sums[0][j / 4][j % 4] = acc[i * Tile::NT + j / 4][j % 4];
      store_warp<Tile>(sums, tiling, at, conv.epilogue, 16 * warp, k_now + 32 * i, stage,
                       records + warp * 3 * Tile::kTileN + 32 * i, pixels + warp);
    }
    if constexpr (Epilogue::kStatistics) {
      __syncthreads();
      const int n = thread % Tile::kLoaders;
      if (tile < tiling.tiles)
        store_moments<Tile>(n, records, pixels, tiling, at, tile, k_now, conv.epilogue);
    }
    if (last_tile) return;
    tile += stride;
    turn ^= 1;
  }
#else
  __trap();
#endif
}

// ---- launching -----------------------------------------------------------------------------------

template <class Tile, class Source, class Epilogue>
cudaError_t launch_halo_wgmma(const ConvCall& call, const ConvSize& s, const float* weight, bool turned,
                              HaloConvolution<Source, Epilogue> conv, cudaStream_t stream) {
  const cudaError_t error = pack_filter<Tile>(s, weight, turned, conv, stream);
  if (error != cudaSuccess) return error;
  int64_t blocks =
      round_up(conv.tiling.tiles, Tile::kTiles) / Tile::kTiles * (conv.filter_rows / Tile::kTileN);
  int64_t filter = kTaps * Tile::kTapBytes;
  if constexpr (Tile::kResident) {
    filter = block_filter_bytes<Tile>(s);
    blocks = std::min<int64_t>(blocks, call.multiprocessors * Tile::kBlocks);
  }
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidValue;
  return launch(&conv_halo_wgmma_kernel<Tile, Source, Epilogue>, dim3(static_cast<unsigned>(blocks)),
                dim3(Tile::kThreads), static_cast<size_t>(Tile::shared_bytes(static_cast<int>(filter))),
                stream, conv);
}

constexpr int kWgmmaOneTileFilterBytes = 72 * 1024, kWgmmaTwoTilesFilterBytes = 144 * 1024;

/// As convolve_halo_tile, of more than 32 output channels: the tile is chosen by their number, the filter
/// stays where it is small enough.
template <class Math, class Source, class Epilogue>
cudaError_t convolve_halo_wgmma(const ConvCall& call, const ConvSize& s, const float* weight, bool turned,
                                const HaloConvolution<Source, Epilogue>& conv, cudaStream_t stream) {
  const auto with = [&]<class Tile>(Tile*) {
    return launch_halo_wgmma<Tile>(call, s, weight, turned, conv, stream);
  };
  if (s.K > 64) return with(static_cast<WgmmaTile<Math, 128, 1>*>(nullptr));
  using Streaming = WgmmaTile<Math, 64, 1>;
  const int64_t filter_bytes = block_filter_bytes<Streaming>(s);
  if (filter_bytes <= kWgmmaOneTileFilterBytes) {
    return with(static_cast<WgmmaTile<Math, 64, 1, true>*>(nullptr));
  }
  if (filter_bytes <= kWgmmaTwoTilesFilterBytes) {
    return with(static_cast<WgmmaTile<Math, 64, 2, true>*>(nullptr));
  }
  return with(static_cast<Streaming*>(nullptr));
}

}  // namespace maskcore
