// conv_bn_relu_train: convolution, batch normalisation with the batch's statistics, ReLU
// (Ioffe & Szegedy 2015). With M = N*P*Q pixels, per channel:
//   z = conv(x, weight) + bias;  mean = sum(z) / M;  var = sum((z - mean)^2) / M  (biased)
//   y = max(scale z + shift, 0),  scale = gamma / sqrt(var + eps),  shift = beta - mean scale
// The statistics are taken of each block of rows while it is still in cache: a row's own mean and its
// squares about that mean, merged in row order in double, so that a large mean costs no precision
// (Chan, Golub & LeVeque 1983) and the result does not depend on the threads.
// With y = relu(bn(z)) the bias has no effect on y: its gradient, the sum of dz, is zero for every
// input, so the backward pass does not compute it.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "conv_direct.h"
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

/// row [Q][K] -> sum [K] and squares [K] = sum over the row of (z - row mean)^2
void row_statistics(const float* row, int64_t Q, int64_t K, float* sum, float* squares) {
  const float inv_Q = 1.0f / static_cast<float>(Q);
  for_each_vector(K, [&](int64_t k, auto lanes) {
    Vec total{};
    for (int64_t q = 0; q < Q; ++q) total += load(row + q * K + k, lanes);
    Vec total_squares{};
    for (int64_t q = 0; q < Q; ++q) {
      const Vec d = load(row + q * K + k, lanes) - total * inv_Q;
      total_squares += d * d;
    }
    store(sum + k, total, lanes);
    store(squares + k, total_squares, lanes);
  });
}

/// statistics [rows][2][K] of rows of Q pixels -> mean [K], biased var [K]
void merge_statistics(const float* statistics, int64_t rows, int64_t Q, int64_t K, float* mean, float* var) {
  const double pixels = static_cast<double>(rows) * static_cast<double>(Q);
  const double row_pixels = static_cast<double>(Q);
  // Rows are the outer loop: the statistics are read in the order they lie in.
  std::vector<double> sum(static_cast<size_t>(K)), squares(static_cast<size_t>(K));
  for (int64_t row = 0; row < rows; ++row) {
    const float* r = statistics + row * 2 * K;
    for (int64_t k = 0; k < K; ++k) sum[static_cast<size_t>(k)] += r[k];
  }
  for (int64_t row = 0; row < rows; ++row) {
    const float* r = statistics + row * 2 * K;
    for (int64_t k = 0; k < K; ++k) {
      // The row's mean as row_statistics rounded it: its squares are about that value.
      const double d =
          static_cast<double>(r[k] * (1.0f / static_cast<float>(Q))) - sum[static_cast<size_t>(k)] / pixels;
      squares[static_cast<size_t>(k)] += r[K + k] + row_pixels * d * d;
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    mean[k] = static_cast<float>(sum[static_cast<size_t>(k)] / pixels);
    var[k] = static_cast<float>(squares[static_cast<size_t>(k)] / pixels);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_relu_train_cpu(const Tensor& x, const Tensor& weight,
                                                                  const Tensor& bias, const Tensor& gamma,
                                                                  const Tensor& beta, double eps,
                                                                  int64_t padding) {
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
  float* statistics = workspace(Purpose::kStatistics, rows * 2 * s.K);
  const float* filter = pack_filter(weight.const_data_ptr<float>(), s, /*turned=*/false);
  convolve(
      s, s.P, s.Q, Activation{x.const_data_ptr<float>(), s.H, s.W, s.C}, filter, bias.const_data_ptr<float>(),
      /*relu=*/false, [=](int64_t n, int64_t p, int64_t) { return z_data + (n * s.P + p) * row_floats; },
      [=](int64_t n, int64_t begin, int64_t end) {
        for (int64_t row = n * s.P + begin; row < n * s.P + end; ++row) {
          float* sum = statistics + row * 2 * s.K;
          row_statistics(z_data + row * row_floats, s.Q, s.K, sum, sum + s.K);
        }
      });
  float* mean_data = mean.mutable_data_ptr<float>();
  float* var_data = var.mutable_data_ptr<float>();
  merge_statistics(statistics, rows, s.Q, s.K, mean_data, var_data);
  const Affine affine(s.K, gamma.const_data_ptr<float>(), beta.const_data_ptr<float>(), mean_data, var_data,
                      eps);
  const float *scale = affine.scale.data(), *shift = affine.shift.data();
  torch::stable::parallel_for(0, rows, 1, [=](int64_t begin, int64_t end) {
    for (int64_t pixel = begin * s.Q; pixel < end * s.Q; ++pixel) {
      const float* z_pixel = z_data + pixel * s.K;
      float* y_pixel = y_data + pixel * s.K;
      for_each_vector(s.K, [&](int64_t k, auto lanes) {
        store(y_pixel + k, relu(load(scale + k, lanes) * load(z_pixel + k, lanes) + load(shift + k, lanes)),
              lanes);
      });
    }
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
      for_each_vector(K, [&](int64_t k, auto lanes) {
        const Vec a = load(scale + k, lanes), b = load(shift + k, lanes), m = load(mean + k, lanes);
        Vec total_g{}, total_gz{};
        for (int64_t pixel = row * Q; pixel < (row + 1) * Q; ++pixel) {
          const Vec z_k = load(z + pixel * K + k, lanes);
          const Vec g = relu_gradient(load(dy + pixel * K + k, lanes), a * z_k + b);
          total_g += g;
          total_gz += g * (z_k - m);
        }
        store(sum_g + k, total_g, lanes);
        store(sum_gz + k, total_gz, lanes);
      });
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_relu_train_backward_cpu(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& z, const Tensor& gamma,
    const Tensor& beta, const Tensor& mean, const Tensor& var, double eps, int64_t padding, bool need_dx) {
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
  convolve_backward_weight(s, Activation{x.const_data_ptr<float>(), s.H, s.W, s.C}, gradient,
                           dweight.mutable_data_ptr<float>(), nullptr);
  if (need_dx) {
    convolve_backward_data(s, gradient, weight.const_data_ptr<float>(), dx.mutable_data_ptr<float>());
  }
  return {dx, dweight, dgamma, dbeta};
}

}  // namespace
}  // namespace maskcore

STABLE_TORCH_LIBRARY_IMPL(maskcore, CPU, m) {
  m.impl("conv_bn_relu_train", TORCH_BOX(&maskcore::conv_bn_relu_train_cpu));
  m.impl("_conv_bn_relu_train_backward", TORCH_BOX(&maskcore::conv_bn_relu_train_backward_cpu));
}
