// The innermost loop of every matrix product here: M rows times kTileColumns columns, held in
// registers while the reduction runs (Goto & van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", ACM TOMS 2008). vector.h has the register budget.
#pragma once

#include <cstdint>
#include <utility>

#include "vector.h"

namespace maskcore {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// acc[i][:] += x[i stride] w[:]: one step of a register tile, M * 2 multiply-adds.
template <int M>
inline MASKCORE_INLINE void tile_step(Vec (&acc)[M][kTileVectors], const float* x, int64_t stride,
                                      const float* w) {
  const Vec w0 = load(w), w1 = load(w + kLanes);
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    const Vec xi = broadcast(x[i * stride]);
    acc[i][0] += xi * w0;
    acc[i][1] += xi * w1;
  }
}

/// Calls f.template operator()<M>(first row) for tiles of almost equal height, so that no tile is
/// too low to hide the latency of a multiply-add (4 cycles, 2 a cycle: 8 accumulators, M >= 4).
template <int M = kTileRows, class F>
void for_each_tile(int64_t rows, const F& f) {
  const int64_t tiles = ceil_div(rows, kTileRows), low = rows / tiles, high_tiles = rows % tiles;
  const auto call = [&f]<int... I>(int64_t height, int64_t row, std::integer_sequence<int, I...>) {
    ((height == I + 1 ? f.template operator()<I + 1>(row) : void()), ...);
  };
  for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
    const int64_t height = low + (tile < high_tiles ? 1 : 0);
    call(height, row, std::make_integer_sequence<int, M>());
    row += height;
  }
}

}  // namespace maskcore
