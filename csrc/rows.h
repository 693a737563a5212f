// Where the rows of a convolution's operands come from. A source writes one unpadded row [W][C] of
// image n; what it computes on the way (ReLU mask, max-pool expansion, batch-norm gradient) is thus
// fused into the load and never stored as a tensor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vector.h"

namespace maskcore {

/// dy where y > 0, else 0: the gradient in front of a ReLU whose output (or input) is y.
inline Vec relu_gradient(Vec dy, Vec y) { return y <= 0.0f ? Vec{} : dy; }

/// A tensor as it lies in memory.
struct Activation {
  const float* x;  // [N,H,W,C]
  int64_t H, W, C;

  const float* row(int64_t n, int64_t h) const { return x + (n * H + h) * W * C; }
  void load_row(int64_t n, int64_t h, float* out) const {
    std::memcpy(out, row(n, h), static_cast<size_t>(W * C) * sizeof(float));
  }
};

/// The gradient in front of a ReLU whose output is y.
struct ReluGradient {
  const float* dy;  // [N,H,W,C]
  const float* y;   // [N,H,W,C]
  int64_t H, W, C;

  void load_row(int64_t n, int64_t h, float* out) const {
    const int64_t offset = (n * H + h) * W * C;
    for_each_vector(W * C, [&](int64_t i, auto lanes) {
      store(out + i, relu_gradient(load(dy + offset + i, lanes), load(y + offset + i, lanes)), lanes);
    });
  }
};

/// The gradient in front of ReLU and 2x2 max-pool: dy goes to the maximum's place if that was positive.
struct PooledReluGradient {
  const float* dy;        // [N,H/2,W/2,C]
  const float* y;         // [N,H/2,W/2,C]
  const uint8_t* argmax;  // [N,H/2,W/2,C], 2 * (row in the window) + (column in the window)
  int64_t H, W, C;

  void load_row(int64_t n, int64_t h, float* out) const {
    const int64_t P = H / 2, Q = W / 2;
    if (h / 2 >= P) {
      std::fill(out, out + W * C, 0.0f);
      return;
    }
    const int32_t first = h % 2 == 0 ? 0 : 2;
    for (int64_t q = 0; q < Q; ++q) {
      const int64_t offset = ((n * P + h / 2) * Q + q) * C;
      float* left = out + 2 * q * C;
      float* right = left + C;
      for_each_vector(C, [&](int64_t c, auto lanes) {
        const Vec g = relu_gradient(load(dy + offset + c, lanes), load(y + offset + c, lanes));
        const Mask place = load_bytes(argmax + offset + c, lanes);
        store(left + c, place == first ? g : Vec{}, lanes);
        store(right + c, place == first + 1 ? g : Vec{}, lanes);
      });
    }
    std::fill(out + 2 * Q * C, out + W * C, 0.0f);
  }
};

/// The gradient in front of batch normalisation (batch statistics over M = N*H*W) and ReLU
/// (Ioffe & Szegedy 2015, section 3):
///   g = dy where scale z + shift > 0, else 0;   zhat = (z - mean) inv_std
///   dz = gamma inv_std (g - mean(g) - zhat mean(g zhat))
struct BatchNormReluGradient {
  const float* dy;  // [N,H,W,C]
  const float* z;   // [N,H,W,C], the convolution's output
  const float *scale, *shift, *mean;
  const float* mean_g;  // [C] mean(g)
  const float* slope;   // [C] inv_std mean(g zhat)
  int64_t H, W, C;

  void load_row(int64_t n, int64_t h, float* out) const {
    const int64_t offset = (n * H + h) * W * C;
    for (int64_t w = 0; w < W; ++w) {
      const float* dy_w = dy + offset + w * C;
      const float* z_w = z + offset + w * C;
      float* out_w = out + w * C;
      for_each_vector(C, [&](int64_t c, auto lanes) {
        const Vec a = load(scale + c, lanes), z_c = load(z_w + c, lanes);
        const Vec g = relu_gradient(load(dy_w + c, lanes), a * z_c + load(shift + c, lanes));
        const Vec centred =
            g - load(mean_g + c, lanes) - (z_c - load(mean + c, lanes)) * load(slope + c, lanes);
        store(out_w + c, a * centred, lanes);
      });
    }
  }
};

/// Rows [begin, end) of image n with a margin of zeros all around (row 0 is the first margin row).
/// Returns the first row; rows are (W + 2 margin) * C floats apart. `scratch` holds them where they
/// cannot be used in place.
template <class Source>
const float* padded_rows(const Source& source, int64_t margin, int64_t n, int64_t begin, int64_t end,
                         float* scratch) {
  const int64_t edge = margin * source.C, pitch = (source.W + 2 * margin) * source.C;
  for (int64_t h = begin; h < end; ++h) {
    float* out = scratch + (h - begin) * pitch;
    if (h < margin || h >= source.H + margin) {
      std::fill(out, out + pitch, 0.0f);
    } else {
      std::fill(out, out + edge, 0.0f);
      source.load_row(n, h - margin, out + edge);
      std::fill(out + pitch - edge, out + pitch, 0.0f);
    }
  }
  return scratch;
}

inline const float* padded_rows(const Activation& source, int64_t margin, int64_t n, int64_t begin,
                                int64_t end, float* scratch) {
  return margin == 0 ? source.row(n, begin) : padded_rows<Activation>(source, margin, n, begin, end, scratch);
}

}  // namespace maskcore
