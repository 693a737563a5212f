// 2x2 max-pooling of two adjacent rows, shared by max_pool and by the convolution it is fused behind.
#pragma once

#include <cstdint>

namespace maskcore {

/// upper, lower [2 Q][C] -> y [Q][C] and argmax [Q][C] = 2 * row + column of the first maximum.
/// A NaN wins, as in torch.nn.functional.max_pool2d.
inline void max_pool_row(const float* upper, const float* lower, int64_t Q, int64_t C, float* y, uint8_t* argmax) {
  for (int64_t q = 0; q < Q; ++q) {
    const float* corner[4] = {upper + 2 * q * C, upper + (2 * q + 1) * C, lower + 2 * q * C,
                              lower + (2 * q + 1) * C};
    for (int64_t c = 0; c < C; ++c) {
      float best = corner[0][c];
      int32_t place = 0;
      for (int32_t i = 1; i < 4; ++i) {
        const float v = corner[i][c];
        // The negation makes NaN win; a NaN already found stays.
        const bool wins = !(v <= best) && best == best;
        best = wins ? v : best;
        place = wins ? i : place;
      }
      y[q * C + c] = best;
      argmax[q * C + c] = static_cast<uint8_t>(place);
    }
  }
}

}  // namespace maskcore
