// Where a convolution's operands come from. A source gives the vector of channels [c, c + lanes) of one
// pixel; what it computes on the way (ReLU mask, max-pool expansion, batch-norm gradient) is thus fused
// into the load and never stored as a tensor. It can also ask for a pixel's cache lines ahead of time,
// because the strides of a tile's rows and pixels are beyond what processors foresee, and name the stretches
// of memory that some pixels of a row lie in (read_ahead.h). Sources of a convolution's input are told by
// hold() which rows are read next, by each thread on a copy of its own (conv_patches.h has one that computes
// them).
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
  void hold(int64_t, int64_t, int64_t) {}
  Vec load(int64_t n, int64_t h, int64_t w, int64_t c, int64_t lanes) const {
    return maskcore::load(row(n, h) + w * C + c, lanes);
  }
  void prefetch(int64_t n, int64_t h, int64_t w, int64_t c) const {
    __builtin_prefetch(row(n, h) + w * C + c);
  }
  /// f(begin, floats) for each stretch of the pixels [w, w + pixels) of a row.
  template <class F>
  void for_each_run(int64_t n, int64_t h, int64_t w, int64_t pixels, const F& f) const {
    f(row(n, h) + w * C, pixels * C);
  }
};

/// relu(scale z + shift): what batch normalisation and ReLU make of a convolution's output z.
struct NormalizedActivation {
  const float* z;              // [N,H,W,C]
  const float *scale, *shift;  // [C]
  int64_t H, W, C;

  const float* row(int64_t n, int64_t h) const { return z + (n * H + h) * W * C; }
  void hold(int64_t, int64_t, int64_t) {}
  Vec load(int64_t n, int64_t h, int64_t w, int64_t c, int64_t lanes) const {
    const Vec z_c = maskcore::load(row(n, h) + w * C + c, lanes);
    return relu(maskcore::load(scale + c, lanes) * z_c + maskcore::load(shift + c, lanes));
  }
  void prefetch(int64_t n, int64_t h, int64_t w, int64_t c) const {
    __builtin_prefetch(row(n, h) + w * C + c);
  }
  template <class F>
  void for_each_run(int64_t n, int64_t h, int64_t w, int64_t pixels, const F& f) const {
    f(row(n, h) + w * C, pixels * C);
  }
};

/// The gradient in front of a ReLU whose output is y.
struct ReluGradient {
  const float* dy;  // [N,H,W,C]
  const float* y;   // [N,H,W,C]
  int64_t H, W, C;

  Vec load(int64_t n, int64_t h, int64_t w, int64_t c, int64_t lanes) const {
    const int64_t i = ((n * H + h) * W + w) * C + c;
    return relu_gradient(maskcore::load(dy + i, lanes), maskcore::load(y + i, lanes));
  }
  void prefetch(int64_t n, int64_t h, int64_t w, int64_t c) const {
    const int64_t i = ((n * H + h) * W + w) * C + c;
    __builtin_prefetch(dy + i);
    __builtin_prefetch(y + i);
  }
  template <class F>
  void for_each_run(int64_t n, int64_t h, int64_t w, int64_t pixels, const F& f) const {
    const int64_t i = ((n * H + h) * W + w) * C;
    f(dy + i, pixels * C);
    f(y + i, pixels * C);
  }
};

/// The gradient in front of ReLU and 2x2 max-pool: dy goes to the maximum's place if that was positive.
struct PooledReluGradient {
  const float* dy;        // [N,H/2,W/2,C]
  const float* y;         // [N,H/2,W/2,C]
  const uint8_t* argmax;  // [N,H/2,W/2,C], 2 * (row in the window) + (column in the window)
  int64_t H, W, C;

  Vec load(int64_t n, int64_t h, int64_t w, int64_t c, int64_t lanes) const {
    const int64_t P = H / 2, Q = W / 2, p = h >> 1, q = w >> 1;
    if (p >= P || q >= Q) return Vec{};
    const int64_t i = ((n * P + p) * Q + q) * C + c;
    const Vec g = relu_gradient(maskcore::load(dy + i, lanes), maskcore::load(y + i, lanes));
    return load_bytes(argmax + i, lanes) == static_cast<int32_t>((h & 1) * 2 + (w & 1)) ? g : Vec{};
  }
  void prefetch(int64_t n, int64_t h, int64_t w, int64_t c) const {
    if ((h | w) & 1) return;  // a window's pixels share their lines
    const int64_t i = ((n * (H / 2) + h / 2) * (W / 2) + w / 2) * C + c;
    __builtin_prefetch(dy + i);
    __builtin_prefetch(y + i);
    __builtin_prefetch(argmax + i);
  }
  template <class F>
  void for_each_run(int64_t n, int64_t h, int64_t w, int64_t pixels, const F& f) const {
    if (h & 1) return;
    const int64_t i = ((n * (H / 2) + h / 2) * (W / 2) + w / 2) * C;
    f(dy + i, pixels / 2 * C);
    f(y + i, pixels / 2 * C);
    f(reinterpret_cast<const float*>(argmax + i), pixels / 2 * C / 4);
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

  Vec load(int64_t n, int64_t h, int64_t w, int64_t c, int64_t lanes) const {
    const int64_t i = ((n * H + h) * W + w) * C + c;
    const Vec a = maskcore::load(scale + c, lanes), z_c = maskcore::load(z + i, lanes);
    const Vec g = relu_gradient(maskcore::load(dy + i, lanes), a * z_c + maskcore::load(shift + c, lanes));
    const Vec centred = g - maskcore::load(mean_g + c, lanes) -
                        (z_c - maskcore::load(mean + c, lanes)) * maskcore::load(slope + c, lanes);
    return a * centred;
  }
  void prefetch(int64_t n, int64_t h, int64_t w, int64_t c) const {
    const int64_t i = ((n * H + h) * W + w) * C + c;
    __builtin_prefetch(dy + i);
    __builtin_prefetch(z + i);
  }
  template <class F>
  void for_each_run(int64_t n, int64_t h, int64_t w, int64_t pixels, const F& f) const {
    const int64_t i = ((n * H + h) * W + w) * C;
    f(dy + i, pixels * C);
    f(z + i, pixels * C);
  }
};

/// The 4x4 pixels from (h, w) on; h and w are multiples of 4.
template <class Source, class Lanes>
void load_square(const Source& source, int64_t n, int64_t h, int64_t w, int64_t c, Lanes lanes,
                 Vec (&out)[4][4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) out[i][j] = source.load(n, h + i, w + j, c, lanes);
  }
}
/// Each of the four windows is read once.
template <class Lanes>
void load_square(const PooledReluGradient& source, int64_t n, int64_t h, int64_t w, int64_t c, Lanes lanes,
                 Vec (&out)[4][4]) {
  const int64_t P = source.H / 2, Q = source.W / 2;
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const int64_t at = ((n * P + h / 2 + i) * Q + w / 2 + j) * source.C + c;
      const Vec g = relu_gradient(load(source.dy + at, lanes), load(source.y + at, lanes));
      const Mask place = load_bytes(source.argmax + at, lanes);
#pragma GCC unroll 4
      for (int32_t corner = 0; corner < 4; ++corner) {
        out[2 * i + corner / 2][2 * j + corner % 2] = place == corner ? g : Vec{};
      }
    }
  }
}

/// One row of a source: [W][C].
template <class Source>
void load_row(const Source& source, int64_t n, int64_t h, float* out) {
  for (int64_t w = 0; w < source.W; ++w, out += source.C) {
    for_each_vector(source.C,
                    [&](int64_t c, auto lanes) { store(out + c, source.load(n, h, w, c, lanes), lanes); });
  }
}
inline void load_row(const Activation& source, int64_t n, int64_t h, float* out) {
  std::memcpy(out, source.row(n, h), static_cast<size_t>(source.W * source.C) * sizeof(float));
}

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
      load_row(source, n, h - margin, out + edge);
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
