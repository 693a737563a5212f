// 2x2 max-pooling of two adjacent rows, shared by max_pool and by the convolution it is fused behind.
#pragma once

#include <cstdint>

#include "vector.h"

namespace maskcore {

/// upper, lower [2 Q][C] -> y [Q][C] and argmax [Q][C] = 2 * row + column of the first maximum.
/// A NaN wins, as in torch.nn.functional.max_pool2d.
inline void max_pool_row(const float* upper, const float* lower, int64_t Q, int64_t C, float* y,
                         uint8_t* argmax) {
  for (int64_t q = 0; q < Q; ++q) {
    const float* corner[4] = {upper + 2 * q * C, upper + (2 * q + 1) * C, lower + 2 * q * C,
                              lower + (2 * q + 1) * C};
    for_each_vector(C, [&](int64_t c, auto lanes) {
      Vec best = load(corner[0] + c, lanes);
      Mask place{};
      for (int32_t i = 1; i < 4; ++i) {
        const Vec v = load(corner[i] + c, lanes);
        // Not (v <= best) lets a NaN win; best == best keeps the first one.
        const Mask wins = ~(v <= best) & (best == best);
        best = wins ? v : best;
        place = wins ? Mask{} + i : place;
      }
      store(y + q * C + c, best, lanes);
      store_bytes(argmax + q * C + c, place, lanes);
    });
  }
}

}  // namespace maskcore
