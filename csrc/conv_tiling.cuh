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
#include <numeric>

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

  /// Its channel c in [N,height,width,channels]: rows of pixels are counted in 32 bits, and so are the
  /// elements of one; they are multiplied once, to 64.
  __device__ __forceinline__ int64_t element(int height, int width, int channels, int c) const {
    return static_cast<int64_t>(n * height + h) * (width * channels) + (w * channels + c);
  }

  /// Its number in [N,height,width,channels], of fewer than 2^31 pixels; negative outside.
  __device__ __forceinline__ int number(int height, int width) const {
    return inside ? (n * height + h) * width + w : -1;
  }

  /// The 2x2 window that it lies in, a pixel of [N,height/2,width/2,channels], and its place there.
  __device__ __forceinline__ Pixel window(int height, int width) const {
    return {inside && h >> 1 < height / 2 && w >> 1 < width / 2, n, h >> 1, w >> 1};
  }
  __device__ __forceinline__ int place() const { return (h & 1) * 2 + (w & 1); }
};

/// A pixel by the number that its source has given it, so that rows and columns are found once for all
/// channels.
struct NumberedPixel {
  bool inside;
  int number;

  __device__ __forceinline__ explicit NumberedPixel(int of_source)
      : inside(of_source >= 0), number(of_source) {}

  __device__ __forceinline__ int64_t element(int, int, int channels, int c) const {
    return static_cast<int64_t>(number) * channels + c;
  }

  /// Of a number that is 4 times the window's, plus the place.
  __device__ __forceinline__ NumberedPixel window(int, int) const { return NumberedPixel(number >> 2); }
  __device__ __forceinline__ int place() const { return number & 3; }
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

  /// That of the tile behind the one at `at`.
  __device__ __forceinline__ Position next(const Position& at) const {
    const int q = at.q + tile_cols;
    if (q < col_tiles * tile_cols) return {at.n, at.p, q, 0};
    const int images = quotient(at.p + tile_rows, inv_stack);
    return {at.n + images, at.p + tile_rows - images * stack, 0, 0};
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
    const bool inside = at.n + image < N && static_cast<unsigned>(h) < static_cast<unsigned>(H) &&
                        static_cast<unsigned>(w) < static_cast<unsigned>(W);
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

  /// Output pixel at a place of the tile.
  __device__ __forceinline__ Pixel output(const Position& at, const int2& place) const {
    const int image = quotient(at.p + place.x, inv_stack);
    const int p = at.p + place.x - image * stack, q = at.q + place.y;
    return {place.x < tile_rows && p < P && q < Q && at.n + image < N, at.n + image, p, q};
  }

  /// Where in the patch the window of an output pixel begins. Of pixels that are not there, that of the first
  /// one, so that whatever is multiplied has been written.
  __device__ __forceinline__ int window(const Position& at, const int2& place) const {
    const int image = quotient(at.p + place.x, inv_stack);
    return output(at, place).inside ? (place.x + 2 * image) * pitch + place.y : 0;
  }

  /// A convolution without tiles; also of sizes whose rows, with those of the tile past the last one, which a
  /// block may ask for, are 2^31 or more: then P is 0.
  static Tiling of(const ConvSize& s, bool pooled, int max_pixels) {
    Tiling tiling{};
    if (s.N * (s.P + max_pixels) + 2 * max_pixels > std::numeric_limits<int>::max()) return tiling;
    tiling.N = static_cast<int>(s.N);
    tiling.H = static_cast<int>(s.H);
    tiling.W = static_cast<int>(s.W);
    tiling.P = static_cast<int>(pooled ? s.P / 2 * 2 : s.P);
    tiling.Q = static_cast<int>(pooled ? s.Q / 2 * 2 : s.Q);
    tiling.padding = static_cast<int>(s.padding);
    return tiling;
  }

  /// Pixels of the patch under rows x (pitch - 2) pixels or fewer, with the image boundaries that it may
  /// have.
  static int patch_of(int rows, int pitch, int stack) {
    const int boundaries = stack % rows == 0 ? 0 : (stack - 1 + rows - 1) / stack;
    return (rows + 2 + 2 * boundaries) * pitch;
  }

  int64_t tiles_of(int rows, int cols, int stack) const {
    return (N * static_cast<int64_t>(stack) + rows - 1) / rows * ((Q + cols - 1) / cols);
  }

  void cut(int rows, int cols, int pitch_, int stack_) {
    stack = stack_;
    tile_rows = rows;
    tile_cols = cols;
    pitch = pitch_;
    patch_pixels = patch_of(rows, pitch, stack);
    col_tiles = (Q + cols - 1) / cols;
    tiles = static_cast<int>(tiles_of(rows, cols, stack));
    inv_tile_cols = 1.0f / static_cast<float>(tile_cols);
    inv_window_cols = 2.0f / static_cast<float>(tile_cols);
    inv_pitch = 1.0f / static_cast<float>(pitch);
    inv_stack = 1.0f / static_cast<float>(stack);
    inv_padded_stack = 1.0f / static_cast<float>(stack + 2);
  }

  /// How many of a tile's pixels, or 2x2 windows, have no place left in SpreadTiling's order where eight that
  /// are read at once begin at different places modulo 8: those above an equal share.
  static int crowded(int rows, int cols, int pitch, bool pooled, int max_pixels) {
    const int step = pooled ? 2 : 1, groups = pooled ? 2 : 8;
    int count[8] = {};
    for (int row = 0; row < rows; row += step) {
      for (int i = 0; i < cols / step % groups; ++i) ++count[(row * pitch / step + i) % groups];
    }
    int above = 0;
    for (int group = 0; group < groups; ++group) {
      const int pixels = count[group] + rows / step * (cols / step / groups);
      above += std::max(0, pixels - max_pixels / 8);
    }
    return above;
  }

  /// The tiles of at most max_pixels pixels with patches of at most max_patch that cost least: a tile's time
  /// is taken as that of max_pixels products and a quarter of it for each pixel loaded. Where they are to be
  /// `spread`, a quarter more of the products' time if all eights meet in a bank (twice the wavefronts of 16
  /// of the 24 of a warp's products: 40 cycles where the tensor cores of an sm_80 take 32). Without tiles if
  /// there are 2^31 rows, or nothing to compute.
  static Tiling choose(const ConvSize& s, bool pooled, int max_pixels, int max_patch, bool spread = false) {
    Tiling best = of(s, pooled, max_pixels);
    const int P = best.P, Q = best.Q, step = pooled ? 2 : 1;
    double least = std::numeric_limits<double>::infinity();
    const auto consider = [&](int rows, int cols, int pitch, int stack) {
      const int patch = patch_of(rows, pitch, stack);
      if (patch > max_patch) return;
      const int64_t tiles = best.tiles_of(rows, cols, stack);
      if (tiles > std::numeric_limits<int>::max()) return;
      double cost = static_cast<double>(tiles) * (max_pixels + 0.25 * patch);
      if (cost >= least) return;
      if (spread) {
        const int crowd = std::min(crowded(rows, cols, pitch, pooled, max_pixels), max_pixels / 8);
        cost += static_cast<double>(tiles) * 2 * crowd;
        if (cost >= least) return;
      }
      least = cost;
      best.cut(rows, cols, pitch, stack);
    };
    for (int cols = step; cols <= std::min(Q, max_pixels / step); cols += step) {
      const double of_one_row = static_cast<double>(s.N) * P * ((Q + cols - 1) / cols) * max_pixels;
      for (int rows = max_pixels / cols / step * step; rows >= step; rows -= step) {
        if (of_one_row / rows >= least) break;  // fewer rows are more tiles
        for (const int stack : {P, (P + rows - 1) / rows * rows}) {
          if (pooled) {  // windows' two rows are 4 modulo 8 pixels apart, and so in different banks
            consider(rows, cols, (cols + 5) / 8 * 8 + 4, stack);
          } else {
            consider(rows, cols, cols + 2, stack);
            if (spread) consider(rows, cols, cols + 3, stack);
          }
        }
      }
    }
    return best;
  }
};

/// Tiles of eight columns and an even number of rows, of stacks of an even number of rows: two rows from an
/// even one on are of one image.
struct StripTiling : Tiling {
  static constexpr int kCols = 8, kPitch = kCols + 2;

  /// Tiles of max_pixels pixels, that is of any number of rows; across images if such patches have at most
  /// max_patch pixels, which those of one image always must.
  static StripTiling choose(const ConvSize& s, bool, int max_pixels, int max_patch) {
    StripTiling strip{of(s, false, max_pixels)};
    const int rows = max_pixels / kCols, even = strip.P + strip.P % 2;
    if (even == 0 || strip.Q == 0) return strip;
    const int apart = (even + rows - 1) / rows * rows;
    const int stack = patch_of(rows, kPitch, even) <= max_patch ? even : apart;
    if (strip.tiles_of(rows, kCols, stack) > std::numeric_limits<int>::max()) return strip;
    strip.cut(rows, kCols, kPitch, stack);
    return strip;
  }
};

/// A tiling whose tiles' pixels are in another order, for products that read eight of them at once: eight
/// from a multiple of 8 on have windows that begin at different places modulo 8 of the patch, and so lie in
/// different banks. Row by row, eight that reach over a row's end meet: 1.8 times the wavefronts where a row
/// has 13 pixels. An image boundary in a tile moves the places behind it, which the eights that it cuts feel.
struct SpreadTiling : Tiling {
  static constexpr int kMaxPixels = 128;
  static constexpr int kNone = 248;  // to 255: past the tile, of which no patch has so many pixels

  /// Of each pixel its place in the patch of a tile without image boundaries. In the kernel's parameters,
  /// that is in constant memory; looked up a few times a tile, not for each product.
  uint8_t order[kMaxPixels];

  template <bool kWindows>  // which is the order's, here
  __device__ __forceinline__ int2 place(int m) const {
    const int i = order[m], row = quotient(i, inv_pitch);
    return make_int2(row, i - row * pitch);
  }

  /// Where in the patch the window of the m-th pixel begins, also of one past the image, whose sums nobody
  /// takes: it may read what is there, if that has been written.
  __device__ __forceinline__ int any_window(const Position& at, int m) const {
    const int i = order[m], row = quotient(i, inv_pitch);
    return row < tile_rows ? i + 2 * pitch * quotient(at.p + row, inv_stack) : i & 7;
  }

  /// As Tiling's, of at most kMaxPixels pixels; without tiles if there would be more.
  static SpreadTiling choose(const ConvSize& s, bool pooled, int max_pixels, int max_patch) {
    if (max_pixels > kMaxPixels) return {};
    SpreadTiling spread{Tiling::choose(s, pooled, max_pixels, max_patch, /*spread=*/true), {}};
    // A 2x2 window is four pixels of the order and takes four of the eight places: its first pixel's column
    // is even and rows of windows are 0 modulo 8 apart, so that it takes 0, 1, 4 and 5, or else 2, 3, 6
    // and 7.
    const int step = pooled ? 2 : 1, together = step * step, groups = 8 / together;
    const int units = max_pixels / together;
    // In a tile of few pixels the windows of the first eight places would reach past the patch.
    const bool few = spread.tile_rows * spread.pitch < 10;
    for (int m = 0; m < kMaxPixels; ++m) {
      const int place = pooled ? (m & 4) / 2 + (m & 2) * 2 + (m & 1) : m % 8;
      spread.order[m] = static_cast<uint8_t>(kNone + (few ? 0 : place));
    }
    const auto put = [&](int unit, int begin) {
      for (int j = 0; j < together; ++j) {
        const int place = begin + j / 2 * spread.pitch + j % 2;
        spread.order[unit * together + j] = static_cast<uint8_t>(place);
      }
    };
    int next[8], crowd[kMaxPixels], crowd_count = 0;  // next: each group's next unit
    std::iota(next, next + groups, 0);
    for (int row = 0; row < spread.tile_rows; row += step) {
      for (int col = 0; col < spread.tile_cols; col += step) {
        const int begin = row * spread.pitch + col, group = begin / step % groups;
        if (next[group] < units) {
          put(next[group], begin);
          next[group] += groups;
        } else {
          crowd[crowd_count++] = begin;
        }
      }
    }
    for (int group = 0; group < groups; ++group) {
      for (; next[group] < units && crowd_count > 0; next[group] += groups) {
        put(next[group], crowd[--crowd_count]);
      }
    }
    return spread;
  }
};

}  // namespace maskcore
