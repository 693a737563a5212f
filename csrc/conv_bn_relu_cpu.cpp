// conv_bn_relu_train: convolution, batch normalisation with the batch's statistics, ReLU
// (Ioffe & Szegedy 2015). With M = N*P*Q pixels, per channel:
//   z = conv(x, weight) + bias;  mean = sum(z) / M;  var = sum((z - mean)^2) / M  (biased)
//   y = max(scale z + shift, 0),  scale = gamma / sqrt(var + eps),  shift = beta - mean scale
// The statistics are taken of each group of outputs while it is still in cache or in registers: sums of
// z - shift and of its square, with a shift near the group's mean, so that a large mean costs no precision;
// they are merged in the groups' order in double (Chan, Golub & LeVeque 1983), so that the result does
// not depend on the threads. A group is a row of the direct convolution, a block of tiles of Winograd's.
// With y = relu(bn(z)) the bias has no effect on y: its gradient, the sum of dz, is zero for every
// input, so the backward pass does not compute it.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "conv_backward.h"
#include "conv_direct.h"
#include "conv_winograd.h"
#include "shapes.h"

namespace maskcore {
namespace {

struct Affine {
  std::vector<float> scale, shift;

  Affine(int64_t K, const float* gamma, const float* beta, const float* mean, const float* var, double eps)
      : scale(static_cast<size_t>(K)), shift(static_cast<size_t>(K)) {
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
struct MomentsOutput {
  StoreOutput<false> z;
  Moments& moments;
  const TileGrid& grid;
  int64_t blocks;

  template <class Lanes>
  void save(int64_t block, const Tile& tile, int64_t k, Lanes lanes, const Vec (&y_tile)[kOut][kOut]) const {
    z.save(block, tile, k, lanes, y_tile);
    float* out = moments.shift(block) + k;
    const bool first = grid.number(tile) == block * grid.tiles / blocks;
    const Vec b = load(z.bias + k, lanes);
    const Vec shift = first ? y_tile[0][0] + b : load(out, lanes);
    const Vec offset = b - shift;
    Vec sum{}, squares{};
    for (int64_t i = 0; i < tile.height; ++i) {
      for (int64_t j = 0; j < tile.width; ++j) {
        const Vec d = y_tile[i][j] + offset;
        sum += d;
        squares += d * d;
      }
    }
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

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_relu_train_cpu(const Tensor& x, const Tensor& weight,
                                                                  const Tensor& bias, const Tensor& gamma,
                                                                  const Tensor& beta, double eps,
                                                                  int64_t padding,
                                                                  const std::string& precision) {
  const Precision allowed = parse_precision(precision);
  const ConvShape s = ConvShape::of(x, weight, padding);
  check_tensor(bias, "bias", {s.K});
  check_tensor(gamma, "gamma", {s.K});
  check_tensor(beta, "beta", {s.K});
  STD_TORCH_CHECK(s.N >= 1, "x must hold at least one image: there are no statistics of an empty batch");
  Tensor y = torch::stable::new_empty(x, {s.N, s.P, s.Q, s.K});
  Tensor z = torch::stable::new_empty(x, {s.N, s.P, s.Q, s.K});
  Tensor mean = torch::stable::new_empty(x, {s.K});
  Tensor var = torch::stable::new_empty(x, {s.K});
  float* y_data = y.mutable_data_ptr<float>();
  float* z_data = z.mutable_data_ptr<float>();
  const int64_t rows = s.N * s.P, row_floats = s.Q * s.K;
  float* mean_data = mean.mutable_data_ptr<float>();
  float* var_data = var.mutable_data_ptr<float>();
  const Activation input{x.const_data_ptr<float>(), s.H, s.W, s.C};
  const float *weight_data = weight.const_data_ptr<float>(), *bias_data = bias.const_data_ptr<float>();
  if (use_winograd(s)) {
    const TileGrid grid{.N = s.N, .P = s.P, .Q = s.Q};
    const int64_t blocks = block_count(grid, s.C, s.K);
    Moments moments(blocks, s.K);
    const StoreOutput<false> z_output{.y = z_data, .N = s.N, .P = s.P, .Q = s.Q, .K = s.K, .bias = bias_data};
    const MomentsOutput sink{.z = z_output, .moments = moments, .grid = grid, .blocks = blocks};
    with_operands(allowed, [&]<class Operands>() {
      const auto* filter = transform_filters<Operands>(weight_data, FilterShape::forward(s.K, s.C));
      convolve_winograd<Operands>(s, grid, input, filter, sink);
    });
    moments.merge(mean_data, var_data);
  } else {
    Moments moments(rows, s.K);
    std::fill(moments.pixels.begin(), moments.pixels.end(), s.Q);
    convolve(
        s, s.P, s.Q, input, pack_filter(weight_data, s, /*turned=*/false), bias_data, /*relu=*/false,
        [=](int64_t n, int64_t p, int64_t) { return z_data + (n * s.P + p) * row_floats; },
        [&](int64_t n, int64_t begin, int64_t end) {
          for (int64_t row = n * s.P + begin; row < n * s.P + end; ++row) {
            moments.take_row(row, z_data + row * row_floats, s.Q);
          }
        });
    moments.merge(mean_data, var_data);
  }
  const Affine affine(s.K, gamma.const_data_ptr<float>(), beta.const_data_ptr<float>(), mean_data, var_data,
                      eps);
  const float *scale = affine.scale.data(), *shift = affine.shift.data();
  const bool streamed = streams(y_data, s.K, rows * row_floats);
  torch::stable::parallel_for(0, rows, 1, [=](int64_t begin, int64_t end) {
    for (int64_t pixel = begin * s.Q; pixel < end * s.Q; ++pixel) {
      const float* z_pixel = z_data + pixel * s.K;
      float* y_pixel = y_data + pixel * s.K;
      for_each_vector(s.K, [&](int64_t k, auto lanes) {
        const Vec y_k = relu(load(scale + k, lanes) * load(z_pixel + k, lanes) + load(shift + k, lanes));
        if (streamed) {
          stream(y_pixel + k, y_k);
        } else {
          store(y_pixel + k, y_k, lanes);
        }
      });
    }
    stream_fence();
  });
  return {y, z, mean, var};
}

/// sums [rows][2][K]: per row of Q pixels the sum of g and of g (z - mean)
void gradient_sums(const float* dy, const float* z, const Affine& affine, const float* mean, int64_t rows,
                   int64_t Q, int64_t K, float* sums) {
  torch::stable::parallel_for(0, rows, 1, [&, dy, z, mean, sums](int64_t begin, int64_t end) {
    const float *scale = affine.scale.data(), *shift = affine.shift.data();
    for (int64_t row = begin; row < end; ++row) {
      float* sum_g = sums + row * 2 * K;
      float* sum_gz = sum_g + K;
      // A tile's width of channels at a time: adjacent cache lines.
      for (int64_t k = 0; k < K; k += kTileColumns) {
        Vec total_g[kTileVectors] = {}, total_gz[kTileVectors] = {};
        for (int64_t pixel = row * Q; pixel < (row + 1) * Q; ++pixel) {
          for_each_vector(std::min<int64_t>(kTileColumns, K - k), [&](int64_t j, auto lanes) {
            const int64_t c = k + j, at = pixel * K + c;
            const Vec z_c = load(z + at, lanes);
            const Vec g =
                relu_gradient(load(dy + at, lanes), load(scale + c, lanes) * z_c + load(shift + c, lanes));
            total_g[j / kLanes] += g;
            total_gz[j / kLanes] += g * (z_c - load(mean + c, lanes));
          });
        }
        for_each_vector(std::min<int64_t>(kTileColumns, K - k), [&](int64_t j, auto lanes) {
          store(sum_g + k + j, total_g[j / kLanes], lanes);
          store(sum_gz + k + j, total_gz[j / kLanes], lanes);
        });
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_relu_train_backward_cpu(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& z, const Tensor& gamma,
    const Tensor& beta, const Tensor& mean, const Tensor& var, double eps, int64_t padding,
    const std::string& precision, bool need_dx) {
  const ConvShape s = ConvShape::of(x, weight, padding);
  check_tensor(dy, "dy", {s.N, s.P, s.Q, s.K});
  check_tensor(z, "z", {s.N, s.P, s.Q, s.K});
  check_tensor(gamma, "gamma", {s.K});
  check_tensor(beta, "beta", {s.K});
  check_tensor(mean, "mean", {s.K});
  check_tensor(var, "var", {s.K});
  Tensor dx = torch::stable::new_empty(x, {need_dx ? s.N : 0, s.H, s.W, s.C});
  Tensor dweight = torch::stable::new_empty(weight, {s.K, s.C, 3, 3});
  Tensor dgamma = torch::stable::new_empty(weight, {s.K});
  Tensor dbeta = torch::stable::new_empty(weight, {s.K});

  const float* dy_data = dy.const_data_ptr<float>();
  const float* z_data = z.const_data_ptr<float>();
  const float* mean_data = mean.const_data_ptr<float>();
  const float* var_data = var.const_data_ptr<float>();
  const Affine affine(s.K, gamma.const_data_ptr<float>(), beta.const_data_ptr<float>(), mean_data, var_data,
                      eps);

  const int64_t rows = s.N * s.P;
  float* sums = workspace(Purpose::kStatistics, rows * 2 * s.K);
  gradient_sums(dy_data, z_data, affine, mean_data, rows, s.Q, s.K, sums);
  std::vector<double> total(static_cast<size_t>(2 * s.K));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < 2 * s.K; ++k) total[static_cast<size_t>(k)] += sums[row * 2 * s.K + k];
  }
  const double pixels = static_cast<double>(rows) * static_cast<double>(s.Q);
  std::vector<float> mean_g(static_cast<size_t>(s.K)), slope(static_cast<size_t>(s.K));
  float* dgamma_data = dgamma.mutable_data_ptr<float>();
  float* dbeta_data = dbeta.mutable_data_ptr<float>();
  for (size_t k = 0; k < mean_g.size(); ++k) {
    const double inv_std = 1.0 / std::sqrt(var_data[k] + eps);
    const double sum_g = total[k], sum_g_zhat = total[k + mean_g.size()] * inv_std;
    dbeta_data[k] = static_cast<float>(sum_g);
    dgamma_data[k] = static_cast<float>(sum_g_zhat);
    mean_g[k] = static_cast<float>(sum_g / pixels);
    slope[k] = static_cast<float>(inv_std * sum_g_zhat / pixels);
  }

  const BatchNormReluGradient gradient{.dy = dy_data,
                                       .z = z_data,
                                       .scale = affine.scale.data(),
                                       .shift = affine.shift.data(),
                                       .mean = mean_data,
                                       .mean_g = mean_g.data(),
                                       .slope = slope.data(),
                                       .H = s.P,
                                       .W = s.Q,
                                       .C = s.K};
  convolve_backward(s, parse_precision(precision), gradient, x.const_data_ptr<float>(),
                    weight.const_data_ptr<float>(), need_dx ? dx.mutable_data_ptr<float>() : nullptr,
                    dweight.mutable_data_ptr<float>(),
                    /*dbias=*/nullptr);
  return {dx, dweight, dgamma, dbeta};
}

}  // namespace
}  // namespace maskcore

STABLE_TORCH_LIBRARY_IMPL(maskcore, CPU, m) {
  m.impl("conv_bn_relu_train", TORCH_BOX(&maskcore::conv_bn_relu_train_cpu));
  m.impl("_conv_bn_relu_train_backward", TORCH_BOX(&maskcore::conv_bn_relu_train_backward_cpu));
}
