// Tiles of output pixels, and the patch of input pixels that a tile's 3x3 windows cover.
//
// The images are thought stacked, `stack` >= P output rows of Q pixels each. A tile is tile_rows x tile_cols
// of them. Where stack = P a tile may begin in one image and end in the next, so that small images fill whole
// tiles; where stack is a multiple of tile_rows none does. In the same way the input is a stack of stack + 2
// rows an image, borders of zeros included, of which the patch is a rectangle: `pitch` >= tile_cols + 2
// pixels wide, and 2 rows higher than the tile, 2 more for each image boundary in it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "conv_size.h"
#include "launch.cuh"

namespace maskcore {

/// floor(a / b) by b's reciprocal, for 0 <= a < 2^21: (a + 1/2) / b is at least 1 / (2 b) away from the next
/// whole number, and is computed with an error below a / b 2^-22.
__device__ __forceinline__ int quotient(int a, float inverse_b) {
  return static_cast<int>((static_cast<float>(a) + 0.5f) * inverse_b);
}

struct Pixel {
  bool inside;  // else a border, or past the end
  int n, h, w;

  /// Its number in [N,height,width].
  __device__ __forceinline__ int64_t number(int height, int width) const {
    return (static_cast<int64_t>(n) * height + h) * width + w;
  }
};

struct Tiling {
  int N;
  int H, W;  // input
  int P, Q;  // output pixels that are computed: those of whole windows where the output is pooled
  int padding;
  int stack, tile_rows, tile_cols, pitch, patch_pixels;
  int col_tiles, tiles;
  float inv_tile_cols, inv_window_cols, inv_pitch, inv_stack, inv_padded_stack;

  /// A tile's first pixel. 16 bytes: in shared memory, where the kernels keep it, it is read at once.
  struct alignas(16) Position {
    int n, p, q, unused;
  };

  static __device__ __forceinline__ Position load(const int4* from) {
    const int4 four = *from;
    return {four.x, four.y, four.z, 0};
  }
  __device__ __forceinline__ void store_position(int tile, int4* to, int beside = 0) const {
    const Position at = position(tile);
    *to = make_int4(at.n, at.p, at.q, beside);
  }

  __device__ __forceinline__ Position position(int tile) const {
    const int row = tile / col_tiles * tile_rows;
    return {row / stack, row % stack, tile % col_tiles * tile_cols, 0};
  }

  /// How many of the tile's pixels there are.
  __device__ __forceinline__ int pixels(const Position& at) const {
    int rows = 0;
    for (int row = 0; row < tile_rows; ++row) {
      const int image = quotient(at.p + row, inv_stack);
      rows += at.n + image < N && at.p + row - image * stack < P;
    }
    return rows * min(tile_cols, Q - at.q);
  }

  /// Input pixel of the patch's i-th.
  __device__ __forceinline__ Pixel input(const Position& at, int i) const {
    const int row = quotient(i, inv_pitch), col = i - row * pitch;
    const int image = quotient(at.p + row, inv_padded_stack);
    const int h = at.p + row - image * (stack + 2) - padding, w = at.q + col - padding;
    const bool inside = at.n + image < N && h >= 0 && h < H && w >= 0 && w < W;
    return {inside, at.n + image, h, w};
  }

  /// Row and column in the tile of its m-th pixel: row by row, or (kWindows) 2x2 window by window.
  template <bool kWindows>
  __device__ __forceinline__ int2 place(int m) const {
    if constexpr (kWindows) {
      const int window = m >> 2, row = quotient(window, inv_window_cols);
      return make_int2(2 * row + (m >> 1 & 1), 2 * (window - row * (tile_cols >> 1)) + (m & 1));
    } else {
      const int row = quotient(m, inv_tile_cols);
      return make_int2(row, m - row * tile_cols);
    }
  }

  /// Output pixel of the tile's m-th.
  template <bool kWindows>
  __device__ __forceinline__ Pixel output(const Position& at, int m) const {
    const int2 place = this->place<kWindows>(m);
    const int image = quotient(at.p + place.x, inv_stack);
    const int p = at.p + place.x - image * stack, q = at.q + place.y;
    return {place.x < tile_rows && p < P && q < Q && at.n + image < N, at.n + image, p, q};
  }

  /// Where in the patch the window of the tile's m-th output pixel begins. Of pixels that are not there, that
  /// of the first one, so that whatever is multiplied has been written.
  template <bool kWindows>
  __device__ __forceinline__ int window(const Position& at, int m) const {
    const int2 place = this->place<kWindows>(m);
    const int image = quotient(at.p + place.x, inv_stack);
    const bool there = output<kWindows>(at, m).inside;
    return there ? (place.x + 2 * image) * pitch + place.y : 0;
  }

  /// The tiles of at most max_pixels pixels with patches of at most max_patch that cost least: a tile's time
  /// is taken as that of max_pixels products and a quarter of it for each pixel loaded. Rows that are no
  /// multiple of 8 pixels cost a tenth more: 8 rows of ldmatrix that reach over a row's end meet in a bank,
  /// 1.7 times the wavefronts of 16 of the 24 of a warp's products, which then take 35 cycles where the
  /// tensor cores of an sm_80 take 32. Without tiles if there are 2^31 rows, or nothing to compute.
  static Tiling choose(const ConvSize& s, bool pooled, int max_pixels, int max_patch) {
    Tiling best{};
    if (s.N * (s.P + max_pixels) > std::numeric_limits<int>::max()) return best;
    best.N = static_cast<int>(s.N);
    best.H = static_cast<int>(s.H);
    best.W = static_cast<int>(s.W);
    best.P = static_cast<int>(pooled ? s.P / 2 * 2 : s.P);
    best.Q = static_cast<int>(pooled ? s.Q / 2 * 2 : s.Q);
    best.padding = static_cast<int>(s.padding);
    const int P = best.P, Q = best.Q, step = pooled ? 2 : 1;
    double least = 0;
    for (int cols = step; cols <= std::min(Q, max_pixels / step); cols += step) {
      // Windows are read two rows at a time: 4 modulo 8 apart, all in different banks.
      const int pitch = pooled ? (cols + 5) / 8 * 8 + 4 : cols + 2;
      for (int high = max_pixels / cols / step * step; high >= step; high -= step) {
        for (const int stack : {P, (P + high - 1) / high * high}) {
          const int boundaries = stack % high == 0 ? 0 : (stack - 1 + high - 1) / stack;
          const int patch = (high + 2 + 2 * boundaries) * pitch;
          if (patch > max_patch) continue;
          const int col_tiles = (Q + cols - 1) / cols;
          const int64_t tiles = (best.N * static_cast<int64_t>(stack) + high - 1) / high * col_tiles;
          const double conflicts = pooled || cols % 8 == 0 ? 1.0 : 1.1;
          const double cost = static_cast<double>(tiles) * (conflicts * max_pixels + 0.25 * patch);
          if (tiles <= std::numeric_limits<int>::max() && (least == 0 || cost < least)) {
            least = cost;
            best.stack = stack;
            best.tile_rows = high;
            best.tile_cols = cols;
            best.pitch = pitch;
            best.patch_pixels = patch;
            best.col_tiles = col_tiles;
            best.tiles = static_cast<int>(tiles);
          }
        }
      }
    }
    best.inv_tile_cols = 1.0f / static_cast<float>(best.tile_cols);
    best.inv_window_cols = 2.0f / static_cast<float>(best.tile_cols);
    best.inv_pitch = 1.0f / static_cast<float>(best.pitch);
    best.inv_stack = 1.0f / static_cast<float>(best.stack);
    best.inv_padded_stack = 1.0f / static_cast<float>(best.stack + 2);
    return best;
  }
};

}  // namespace maskcore
