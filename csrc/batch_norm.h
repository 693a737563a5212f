// Batch normalisation with the batch's statistics (Ioffe & Szegedy 2015), as far as it is fused with
// convolutions: what they gather for it, and what it makes of that. With M = N*P*Q pixels, per channel:
//   mean = sum(z) / M;  var = sum((z - mean)^2) / M  (biased)
//   y = max(scale z + shift, 0),  scale = gamma / sqrt(var + eps),  shift = beta - mean scale
// The statistics are taken of each group of outputs while it is still in cache or in registers: sums of
// z - shift and of its square, with a shift near the group's mean, so that a large mean costs no precision;
// they are merged in the groups' order in double (Chan, Golub & LeVeque 1983), so that the result does
// not depend on the threads. A group is a row of the direct convolution, a block of tiles of Winograd's.
// With y = relu(bn(z)) the bias has no effect on y: its gradient, the sum of dz, is zero for every
// input, so the backward pass does not compute it.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "conv_backward.h"
#include "conv_first_layer.h"
#include "conv_winograd.h"
#include "shapes.h"
#include "tasks.h"

namespace maskcore {

struct Affine {
  std::vector<float> scale, shift, beta;

  Affine(int64_t K, const float* gamma, const float* beta_data, const float* mean, const float* var,
         double eps)
      : scale(static_cast<size_t>(K)), shift(static_cast<size_t>(K)), beta(beta_data, beta_data + K) {
    for (size_t k = 0; k < scale.size(); ++k) {
      scale[k] = static_cast<float>(gamma[k] / std::sqrt(var[k] + eps));
      shift[k] = beta[k] - mean[k] * scale[k];
    }
  }
};

/// Sums over groups of outputs, each about a shift of its own.
struct Moments {
  int64_t K;
  std::vector<int64_t> pixels;  // [groups]
  float* sums;                  // [groups][3][K]: shift, sum of z - shift, sum of (z - shift)^2

  Moments(int64_t groups, int64_t K)
      : K(K), pixels(static_cast<size_t>(groups)), sums(workspace(Purpose::kStatistics, groups * 3 * K)) {}

  float* shift(int64_t group) const { return sums + group * 3 * K; }

  /// A whole group: row [Q][K], with its mean as the shift.
  void take_row(int64_t group, const float* row, int64_t Q) const {
    float* out = shift(group);
    const float inv_Q = 1.0f / static_cast<float>(Q);
    for_each_vector(K, [&](int64_t k, auto lanes) {
      Vec total{};
      for (int64_t q = 0; q < Q; ++q) total += load(row + q * K + k, lanes);
      const Vec mean = total * inv_Q;
      Vec sum{}, squares{};
      for (int64_t q = 0; q < Q; ++q) {
        const Vec d = load(row + q * K + k, lanes) - mean;
        sum += d;
        squares += d * d;
      }
      store(out + k, mean, lanes);
      store(out + K + k, sum, lanes);
      store(out + 2 * K + k, squares, lanes);
    });
  }

  /// mean [K], biased var [K]
  void merge(float* mean, float* var) const {
    double total = 0;
    for (const int64_t count : pixels) total += static_cast<double>(count);
    std::vector<double> sum(static_cast<size_t>(K)), squares(static_cast<size_t>(K));
    // Groups are the outer loop: the sums are read in the order they lie in.
    for (size_t group = 0; group < pixels.size(); ++group) {
      const float* g = shift(static_cast<int64_t>(group));
      for (int64_t k = 0; k < K; ++k) {
        sum[static_cast<size_t>(k)] += static_cast<double>(pixels[group]) * g[k] + g[K + k];
      }
    }
    for (size_t group = 0; group < pixels.size(); ++group) {
      const float* g = shift(static_cast<int64_t>(group));
      const double count = static_cast<double>(pixels[group]);
      for (int64_t k = 0; k < K; ++k) {
        // sum (z - m)^2 = sum (z - shift)^2 + 2 (shift - m) sum (z - shift) + count (shift - m)^2
        const double d = g[k] - sum[static_cast<size_t>(k)] / total;
        squares[static_cast<size_t>(k)] += g[2 * K + k] + d * (2.0 * g[K + k] + count * d);
      }
    }
    for (int64_t k = 0; k < K; ++k) {
      mean[k] = static_cast<float>(sum[static_cast<size_t>(k)] / total);
      var[k] = static_cast<float>(squares[static_cast<size_t>(k)] / total);
    }
  }
};

/// z = the convolution plus bias; a block of tiles is a group, its first output the shift.
template <class F>
struct MomentsOutput {
  StoreOutput<false> z;
  Moments& moments;
  const TileGrid<F>& grid;
  int64_t blocks;

  template <class Lanes>
  void save(int64_t block, const Tile& tile, int64_t k, Lanes lanes,
            const Vec (&y_tile)[F::kOut][F::kOut]) const {
    z.save(block, tile, k, lanes, y_tile);
    float* out = moments.shift(block) + k;
    const bool first = grid.number(tile) == block * grid.tiles / blocks;
    const Vec b = load(z.bias + k, lanes);
    const Vec shift = first ? y_tile[0][0] + b : load(out, lanes);
    const Vec offset = b - shift;
    Vec sum{}, squares{};
    for_each_output<F::kOut>(tile, [&](int64_t i, int64_t j) {
      const Vec d = y_tile[i][j] + offset;
      sum += d;
      squares += d * d;
    });
    if (first) {
      store(out, shift, lanes);
    } else {
      sum += load(out + moments.K, lanes);
      squares += load(out + 2 * moments.K, lanes);
    }
    store(out + moments.K, sum, lanes);
    store(out + 2 * moments.K, squares, lanes);
    if (k == 0) {
      int64_t& pixels = moments.pixels[static_cast<size_t>(block)];
      pixels = (first ? 0 : pixels) + tile.height * tile.width;
    }
  }
};

/// z [N,P,Q,K] = conv(x, weight) + bias, and its mean [K] and biased var [K].
inline void convolve_for_batch_norm(const ConvShape& s, Precision precision, const float* x,
                                    const float* weight, const float* bias, float* z, float* mean,
                                    float* var) {
  const Activation input{x, s.H, s.W, s.C};
  const int64_t rows = s.N * s.P, row_floats = s.Q * s.K;
  if (use_winograd(s)) {
    const StoreOutput<false> z_output{.y = z, .N = s.N, .P = s.P, .Q = s.Q, .K = s.K, .bias = bias};
    with_tiles(s, s.P, s.Q, precision, [&]<class Operands, class F>(const TileGrid<F>& grid) {
      const int64_t blocks = block_count(grid, s.C, s.K);
      Moments moments(blocks, s.K);
      const MomentsOutput<F> sink{.z = z_output, .moments = moments, .grid = grid, .blocks = blocks};
      const auto* filter = transform_filters<Operands, F>(weight, FilterShape::forward(s.K, s.C));
      convolve_winograd<Operands>(s, grid, input, filter, sink);
      moments.merge(mean, var);
    });
  } else {
    Moments moments(rows, s.K);
    std::fill(moments.pixels.begin(), moments.pixels.end(), s.Q);
    convolve_forward(
        s, s.P, s.Q, input, weight, bias, /*relu=*/false,
        /*streamed=*/false, [=](int64_t n, int64_t p, int64_t) { return z + (n * s.P + p) * row_floats; },
        [&](int64_t n, int64_t begin, int64_t end) {
          for (int64_t row = n * s.P + begin; row < n * s.P + end; ++row) {
            moments.take_row(row, z + row * row_floats, s.Q);
          }
        });
    moments.merge(mean, var);
  }
}

/// Sums of the gradient g = dy where scale z + shift > 0, else 0: sum_g [K] (+)= sum of g, sum_gz [K] (+)=
/// that of g (z - mean), over a row of Q pixels.
inline void add_gradient_sums(const float* dy, const float* z, const Affine& affine, const float* mean,
                              int64_t Q, int64_t K, double* sum_g, double* sum_gz) {
  const float *scale = affine.scale.data(), *shift = affine.shift.data();
  // A tile's width of channels at a time: adjacent cache lines.
  for (int64_t k = 0; k < K; k += kTileColumns) {
    const int64_t columns = std::min<int64_t>(kTileColumns, K - k);
    Vec total_g[kTileVectors] = {}, total_gz[kTileVectors] = {};
    for (int64_t q = 0; q < Q; ++q) {
      for_each_vector(columns, [&](int64_t j, auto lanes) {
        const int64_t c = k + j, at = q * K + c;
        const Vec z_c = load(z + at, lanes);
        const Vec g =
            relu_gradient(load(dy + at, lanes), load(scale + c, lanes) * z_c + load(shift + c, lanes));
        total_g[j / kLanes] += g;
        total_gz[j / kLanes] += g * (z_c - load(mean + c, lanes));
      });
    }
    for (int64_t j = 0; j < columns; ++j) {
      sum_g[k + j] += static_cast<double>(total_g[j / kLanes][j % kLanes]);
      sum_gz[k + j] += static_cast<double>(total_gz[j / kLanes][j % kLanes]);
    }
  }
}

/// What becomes of a row of the gradient at relu(bn(z)) (StoreRows): it is written, and its sums are taken.
struct SumRows {
  StoreRows store;
  const float* z;  // [N,H,W,C]
  const Affine* affine;
  const float* mean;
  double* sums;  // [slot][2][C]
  float* dx = store.dx;

  bool wanted() const { return true; }
  template <class Input>
  void take(const Input& input, int64_t slot, int64_t n, int64_t h, const float* row) const {
    double* sum = sums + slot * 2 * store.C;
    add_gradient_sums(row, z + (n * store.H + h) * store.W * store.C, *affine, mean, store.W, store.C, sum,
                      sum + store.C);
    store.take(input, slot, n, h, row);
  }
};

// Rows whose sums have a place of their own, so that their order does not depend on the threads.
inline constexpr int64_t kSlotRows = 16;

/// The sum of slots of `width` numbers each, in their order.
inline std::vector<double> sum_slots(const std::vector<double>& slots, int64_t width) {
  std::vector<double> total(static_cast<size_t>(width));
  for (size_t i = 0; i < slots.size(); ++i) total[i % static_cast<size_t>(width)] += slots[i];
  return total;
}

/// total [2][K]: the sums over all rows, of P rows of Q pixels of N images.
inline std::vector<double> gradient_sums(const float* dy, const float* z, const Affine& affine,
                                         const float* mean, int64_t rows, int64_t Q, int64_t K) {
  const int64_t groups = ceil_div(rows, kSlotRows), width = 2 * K;
  std::vector<double> sums(static_cast<size_t>(groups * width));
  share(groups, [&](const auto& take) {
    for (int64_t group = take(); group < groups; group = take()) {
      double* sum = sums.data() + group * width;
      for (int64_t row = group * kSlotRows; row < std::min(rows, (group + 1) * kSlotRows); ++row) {
        add_gradient_sums(dy + row * Q * K, z + row * Q * K, affine, mean, Q, K, sum, sum + K);
      }
    }
  });
  return sum_slots(sums, width);
}

/// What the sums over the batch make of the gradient g in front of the ReLU, with zhat = (z - mean) inv_std:
///   dbeta = sum(g);  dgamma = sum(g zhat);  dz = scale (g - mean(g) - zhat mean(g zhat))
struct BatchNormGradient {
  std::vector<float> mean_g, slope;  // [K] mean(g) and inv_std mean(g zhat)

  /// total [2][K]: sums of g and of g (z - mean) over so many pixels. Writes dgamma and dbeta [K].
  BatchNormGradient(const std::vector<double>& total, double pixels, const float* var, double eps,
                    float* dgamma, float* dbeta)
      : mean_g(total.size() / 2), slope(total.size() / 2) {
    for (size_t k = 0; k < mean_g.size(); ++k) {
      const double inv_std = 1.0 / std::sqrt(var[k] + eps);
      const double sum_g = total[k], sum_g_zhat = total[k + mean_g.size()] * inv_std;
      dbeta[k] = static_cast<float>(sum_g);
      dgamma[k] = static_cast<float>(sum_g_zhat);
      mean_g[k] = static_cast<float>(sum_g / pixels);
      slope[k] = static_cast<float>(inv_std * sum_g_zhat / pixels);
    }
  }

  BatchNormReluGradient source(const float* dy, const float* z, const Affine& affine, const float* mean,
                               const ConvShape& s) const {
    return {.dy = dy,
            .z = z,
            .scale = affine.scale.data(),
            .shift = affine.shift.data(),
            .mean = mean,
            .mean_g = mean_g.data(),
            .slope = slope.data(),
            .H = s.P,
            .W = s.Q,
            .C = s.K};
  }
};

}  // namespace maskcore
