// What the products of Winograd's components multiply: float32 as it is, or float32 rounded to bfloat16, two
// adjacent terms of a sum at a time (VDPBF16PS), the sums in float32 either way. The transforms before and
// after are float32.
//
// An operand is kept in one of two orders, by the sum that it is for (D = kDepth, the terms that one
// instruction adds):
//   over channels   [tile][kTileColumns]          a tile's channels, D of which are adjacent terms
//   over tiles      [tile / D][kTileColumns][D]   D tiles, channel by channel
#pragma once

#include <cstdint>
#include <cstring>

#include "register_tile.h"
#include "shapes.h"
#include "vector.h"

namespace maskcore {

enum class SumOver : std::uint8_t { kChannels, kTiles };

struct Float32 {
  using Element = float;
  static constexpr int kDepth = 1;

  /// kLanes channels of a tile, for a sum over channels.
  static void save(Element* p, Vec v) { store(p, v); }
  /// Term `term` of kDepth, which come in their order, of kLanes sums.
  static void save_term(Element* p, int64_t, Vec v) { store(p, v); }

  /// acc[i][:] += the terms x[i stride ..] times w [kTileColumns][kDepth].
  template <int M>
  static MASKCORE_INLINE void add_channels(Vec (&acc)[M][kTileVectors], const Element* x, int64_t stride,
                                           const Element* w) {
    tile_step<M>(acc, x, stride, w);
  }
  /// acc[i][:] += v [kTileColumns][kDepth], from channel i on, times kDepth rows of m, of which `rows` exist.
  template <int M>
  static MASKCORE_INLINE void add_tiles(Vec (&acc)[M][kTileVectors], const Element* v, const Element* m,
                                        int64_t) {
    tile_step<M>(acc, v, 1, m);
  }
};

#if defined(__AVX512BF16__) && !defined(MASKCORE_VECTOR_BYTES)

/// Rounded to nearest, ties to even; subnormal operands count as zero, as VDPBF16PS has it.
struct Bfloat16 {
  using Element = uint16_t;
  static constexpr int kDepth = 2;

  static void save(Element* p, Vec v) {
    const Rounded r = rounded(v);
    std::memcpy(p, &r, sizeof(r));
  }
  static void save_term(Element* p, int64_t term, Vec v) {
    // The first term is in the lower half of its sum's 32 bits; until the second comes, that is zero.
    Pairs pairs = (Pairs)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)rounded(v));
    if (term == 1) pairs = load_pairs(p) | pairs << 16;
    std::memcpy(p, &pairs, sizeof(pairs));
  }

  template <int M>
  static MASKCORE_INLINE void add_channels(Vec (&acc)[M][kTileVectors], const Element* x, int64_t stride,
                                           const Element* w) {
    add<M>(acc, x, stride, load_pairs(w), load_pairs(w + kTileColumns));
  }
  template <int M>
  static MASKCORE_INLINE void add_tiles(Vec (&acc)[M][kTileVectors], const Element* v, const Element* m,
                                        int64_t rows) {
    Row first, second{};
    std::memcpy(&first, m, sizeof(first));
    if (rows > 1) std::memcpy(&second, m + kTileColumns, sizeof(second));
    const Row low = __builtin_shufflevector(first, second, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7,
                                            39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
    const Row high =
        __builtin_shufflevector(first, second, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
    add<M>(acc, v, kDepth, (Pairs)low, (Pairs)high);
  }

 private:
  typedef uint16_t Rounded __attribute__((vector_size(32)));  // kLanes operands
  typedef uint16_t Row __attribute__((vector_size(64)));      // kTileColumns operands
  typedef uint32_t Pairs __attribute__((vector_size(64)));    // kLanes times kDepth operands

  static Rounded rounded(Vec v) { return (Rounded)_mm512_cvtneps_pbh((__m512)v); }
  static Pairs load_pairs(const Element* p) {
    Pairs pairs;
    std::memcpy(&pairs, p, sizeof(pairs));
    return pairs;
  }
  template <int M>
  static MASKCORE_INLINE void add(Vec (&acc)[M][kTileVectors], const Element* x, int64_t stride, Pairs w0,
                                  Pairs w1) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      uint32_t pair;
      std::memcpy(&pair, x + i * stride, sizeof(pair));
      const auto xi = (__m512bh)(pair - Pairs{});
      acc[i][0] = (Vec)_mm512_dpbf16_ps((__m512)acc[i][0], xi, (__m512bh)w0);
      acc[i][1] = (Vec)_mm512_dpbf16_ps((__m512)acc[i][1], xi, (__m512bh)w1);
    }
  }
};

#else
using Bfloat16 = Float32;  // a processor without its products
#endif

/// f.operator()<Operands>() with the operands of a precision.
template <class F>
auto with_operands(Precision precision, const F& f) {
  return precision == Precision::kBfloat16 ? f.template operator()<Bfloat16>()
                                           : f.template operator()<Float32>();
}

}  // namespace maskcore
