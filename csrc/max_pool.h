// 2x2 max-pooling of a window and of two adjacent rows, shared by max_pool and by the convolutions it is
// fused behind.
#pragma once

#include <cstdint>

#include "vector.h"

namespace maskcore {

struct Pooled {
  Vec best;
  Mask place;  // 2 * row + column in the window
};

/// The first maximum of a window's upper left, upper right, lower left and lower right corner.
/// A NaN wins, as in torch.nn.functional.max_pool2d.
inline Pooled max_pool_window(const Vec (&corner)[4]) {
  Pooled pooled{corner[0], Mask{}};
#pragma GCC unroll 3
  for (int32_t i = 1; i < 4; ++i) {
    // Not (v <= best) lets a NaN win; best == best keeps the first one.
    const Mask wins = ~(corner[i] <= pooled.best) & (pooled.best == pooled.best);
    pooled.best = wins ? corner[i] : pooled.best;
    pooled.place = wins ? Mask{} + i : pooled.place;
  }
  return pooled;
}

/// upper, lower [2 Q][C] -> y [Q][C] and argmax [Q][C].
inline void max_pool_row(const float* upper, const float* lower, int64_t Q, int64_t C, float* y,
                         uint8_t* argmax) {
  for (int64_t q = 0; q < Q; ++q) {
    const float *left = upper + 2 * q * C, *below = lower + 2 * q * C;
    for_each_vector(C, [&](int64_t c, auto lanes) {
      const Vec window[4] = {load(left + c, lanes), load(left + C + c, lanes), load(below + c, lanes),
                             load(below + C + c, lanes)};
      const Pooled pooled = max_pool_window(window);
      store(y + q * C + c, pooled.best, lanes);
      store_bytes(argmax + q * C + c, pooled.place, lanes);
    });
  }
}

}  // namespace maskcore
