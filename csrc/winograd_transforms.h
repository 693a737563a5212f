// The matrices of Winograd's minimal filtering F(m x m, 3 x 3), as functions on vectors of channels.
//
// One dimension: m outputs of a 3-tap filter are y = A^T [(G g) . (B^T d)] with d the n = m + 2 inputs
// (Toom & Cook: polynomials are multiplied by their values at n points and interpolated; transposed).
// For the points p in 0, +-a, +-b .. and infinity, with m(x) = x (x^2 - a^2) (x^2 - b^2) ..:
//   row p of G      (1, p, p^2) / m'(p);           infinity: (0, 0, 1)
//   row p of B^T    coefficients of m(x)/(x - p);  infinity: those of m(x)
//   column p of A^T (1, p, .. p^(m-1));            infinity: (0, .. 0, 1)
// F(4x4) has the points 0, +-5/8, +-3/2 and infinity: exact in binary, and half the rounding error of the
// usual 1 and 2. F(6x6) has 0, +-1/2, +-1, +-2 and infinity; no other symmetric multiples of 1/16 that were
// tried are better. Relative errors (root mean square) of sums over 64 channels: 6e-7 and 2.9e-6; they grow
// with the root of the channels.
//
// In two dimensions every transform is applied to the columns and then to the rows. Overloads differ by the
// lengths of their arrays: m = 4 or 6.
#pragma once

#include "vector.h"

namespace maskcore {

/// A tile of F(m x m, 3 x 3).
template <int kOutputs>
struct TileSize {
  static constexpr int kOut = kOutputs;          // outputs of a tile, in each direction
  static constexpr int kIn = kOut + 2;           // inputs of a tile
  static constexpr int kComponents = kIn * kIn;  // matrix products
};
using F4 = TileSize<4>;
using F6 = TileSize<6>;

// ---- F(4, 3) ---------------------------------------------------------------------------------

inline constexpr float kA = 0.625f, kB = 1.5f;
inline constexpr float kA2 = kA * kA, kB2 = kB * kB;
// 1 / m'(p) at 0, at +-a and at +-b
inline constexpr float kNorm0 = 1 / (kA2 * kB2), kNormA = 1 / (2 * kA2 * (kA2 - kB2)),
                       kNormB = 1 / (2 * kB2 * (kB2 - kA2));

/// B^T: 6 inputs -> values at 0, a, -a, b, -b, infinity.
template <class V>
inline MASKCORE_INLINE void transform_input(const V (&d)[6], V (&v)[6]) {
  const V even_a = d[4] - kB2 * d[2], odd_a = kA * (d[3] - kB2 * d[1]);
  const V even_b = d[4] - kA2 * d[2], odd_b = kB * (d[3] - kA2 * d[1]);
  v[0] = kA2 * kB2 * d[0] + (d[4] - (kA2 + kB2) * d[2]);
  v[1] = even_a + odd_a;
  v[2] = even_a - odd_a;
  v[3] = even_b + odd_b;
  v[4] = even_b - odd_b;
  v[5] = kA2 * kB2 * d[1] + (d[5] - (kA2 + kB2) * d[3]);
}

/// B: the adjoint of transform_input.
inline MASKCORE_INLINE void transform_input_gradient(const Vec (&v)[6], Vec (&d)[6]) {
  const Vec sum_a = v[1] + v[2], difference_a = kA * (v[1] - v[2]);
  const Vec sum_b = v[3] + v[4], difference_b = kB * (v[3] - v[4]);
  d[0] = kA2 * kB2 * v[0];
  d[1] = kA2 * kB2 * v[5] - (kB2 * difference_a + kA2 * difference_b);
  d[2] = -(kA2 + kB2) * v[0] - (kB2 * sum_a + kA2 * sum_b);
  d[3] = (difference_a + difference_b) - (kA2 + kB2) * v[5];
  d[4] = v[0] + (sum_a + sum_b);
  d[5] = v[5];
}

/// A^T: products -> 4 outputs.
inline MASKCORE_INLINE void transform_output(const Vec (&m)[6], Vec (&y)[4]) {
  const Vec sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  const Vec sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  y[0] = m[0] + (sum_a + sum_b);
  y[1] = kA * difference_a + kB * difference_b;
  y[2] = kA2 * sum_a + kB2 * sum_b;
  y[3] = kA2 * kA * difference_a + (kB2 * kB * difference_b + m[5]);
}

/// A: the adjoint of transform_output.
inline MASKCORE_INLINE void transform_gradient(const Vec (&y)[4], Vec (&m)[6]) {
  const Vec even_a = y[0] + kA2 * y[2], odd_a = kA * (y[1] + kA2 * y[3]);
  const Vec even_b = y[0] + kB2 * y[2], odd_b = kB * (y[1] + kB2 * y[3]);
  m[0] = y[0];
  m[1] = even_a + odd_a;
  m[2] = even_a - odd_a;
  m[3] = even_b + odd_b;
  m[4] = even_b - odd_b;
  m[5] = y[3];
}

/// G: 3 taps -> their values at the points.
template <class V>
inline MASKCORE_INLINE void transform_filter(const V (&g)[3], V (&u)[6]) {
  const V even_a = kNormA * (g[0] + kA2 * g[2]), odd_a = kNormA * kA * g[1];
  const V even_b = kNormB * (g[0] + kB2 * g[2]), odd_b = kNormB * kB * g[1];
  u[0] = kNorm0 * g[0];
  u[1] = even_a + odd_a;
  u[2] = even_a - odd_a;
  u[3] = even_b + odd_b;
  u[4] = even_b - odd_b;
  u[5] = g[2];
}

/// G^T: the adjoint of transform_filter.
inline MASKCORE_INLINE void transform_filter_gradient(const Vec (&u)[6], Vec (&g)[3]) {
  const Vec even_a = kNormA * (u[1] + u[2]), odd_a = kNormA * (u[1] - u[2]);
  const Vec even_b = kNormB * (u[3] + u[4]), odd_b = kNormB * (u[3] - u[4]);
  g[0] = kNorm0 * u[0] + (even_a + even_b);
  g[1] = kA * odd_a + kB * odd_b;
  g[2] = kA2 * even_a + (kB2 * even_b + u[5]);
}

// ---- F(6, 3) ---------------------------------------------------------------------------------
// m(x) = x (x^2 - 1/4) (x^2 - 1) (x^2 - 4) = x^7 - 21/4 x^5 + 21/4 x^3 - x.

/// B^T: 8 inputs -> values at 0, 1/2, -1/2, 1, -1, 2, -2, infinity. m(x) / (x - p) is
/// x^2 (x^4 - s x^2 + t) + p x (x^4 - s x^2 + t), with s and t the sum and the product of the two other
/// squares.
inline MASKCORE_INLINE void transform_input(const Vec (&d)[8], Vec (&v)[8]) {
  const Vec even_half = d[6] - 5.0f * d[4] + 4.0f * d[2],
            odd_half = 0.5f * (d[5] - 5.0f * d[3] + 4.0f * d[1]);
  const Vec even_one = d[6] - 4.25f * d[4] + d[2], odd_one = d[5] - 4.25f * d[3] + d[1];
  const Vec even_two = d[6] - 1.25f * d[4] + 0.25f * d[2],
            odd_two = 2.0f * (d[5] - 1.25f * d[3] + 0.25f * d[1]);
  v[0] = (d[6] - d[0]) + 5.25f * (d[2] - d[4]);
  v[1] = even_half + odd_half;
  v[2] = even_half - odd_half;
  v[3] = even_one + odd_one;
  v[4] = even_one - odd_one;
  v[5] = even_two + odd_two;
  v[6] = even_two - odd_two;
  v[7] = (d[7] - d[1]) + 5.25f * (d[3] - d[5]);
}

/// A^T: products -> 6 outputs.
inline MASKCORE_INLINE void transform_output(const Vec (&m)[8], Vec (&y)[6]) {
  const Vec sum_half = m[1] + m[2], difference_half = m[1] - m[2];
  const Vec sum_one = m[3] + m[4], difference_one = m[3] - m[4];
  const Vec sum_two = m[5] + m[6], difference_two = m[5] - m[6];
  y[0] = m[0] + sum_half + (sum_one + sum_two);
  y[1] = 0.5f * difference_half + (difference_one + 2.0f * difference_two);
  y[2] = 0.25f * sum_half + (sum_one + 4.0f * sum_two);
  y[3] = 0.125f * difference_half + (difference_one + 8.0f * difference_two);
  y[4] = 0.0625f * sum_half + (sum_one + 16.0f * sum_two);
  y[5] = (0.03125f * difference_half + m[7]) + (difference_one + 32.0f * difference_two);
}

/// G: 3 taps -> their values at the points, over m'(p): -1 at 0, 45/32 at +-1/2, -9/2 at +-1, 90 at +-2.
inline MASKCORE_INLINE void transform_filter(const Vec (&g)[3], Vec (&u)[8]) {
  const Vec even_half = (32.0f / 45) * (g[0] + 0.25f * g[2]), odd_half = (16.0f / 45) * g[1];
  const Vec even_one = (-2.0f / 9) * (g[0] + g[2]), odd_one = (-2.0f / 9) * g[1];
  const Vec even_two = (1.0f / 90) * (g[0] + 4.0f * g[2]), odd_two = (2.0f / 90) * g[1];
  u[0] = -g[0];
  u[1] = even_half + odd_half;
  u[2] = even_half - odd_half;
  u[3] = even_one + odd_one;
  u[4] = even_one - odd_one;
  u[5] = even_two + odd_two;
  u[6] = even_two - odd_two;
  u[7] = g[2];
}

// ---- two dimensions --------------------------------------------------------------------------

/// T applied to the columns and then to the rows of a From x From square:
/// load(i, j) -> Vec gives its elements, save(i, j, Vec) takes those of the To x To result.
template <int From, int To, class Load, class Save>
inline MASKCORE_INLINE void transform_square(void (&transform)(const Vec (&)[From], Vec (&)[To]),
                                             const Load& load, const Save& save) {
  Vec half[To][From];
#pragma GCC unroll 8
  for (int j = 0; j < From; ++j) {
    Vec column[From], transformed[To];
#pragma GCC unroll 8
    for (int i = 0; i < From; ++i) column[i] = load(i, j);
    transform(column, transformed);
#pragma GCC unroll 8
    for (int i = 0; i < To; ++i) half[i][j] = transformed[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < To; ++i) {
    Vec row[To];
    transform(half[i], row);
#pragma GCC unroll 8
    for (int j = 0; j < To; ++j) save(i, j, row[j]);
  }
}

}  // namespace maskcore
