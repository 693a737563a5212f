// conv_bn_relu_train: convolution, batch normalisation with the batch's statistics, ReLU (batch_norm.h).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "arena.h"
#include "batch_norm.h"
#include "conv_backward.h"
#include "shapes.h"

namespace maskcore {
namespace {

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
  Tensor y = empty_activation({s.N, s.P, s.Q, s.K});
  Tensor z = empty_activation({s.N, s.P, s.Q, s.K});
  Tensor mean = empty_activation({s.K});
  Tensor var = empty_activation({s.K});
  float* y_data = y.mutable_data_ptr<float>();
  float* z_data = z.mutable_data_ptr<float>();
  const int64_t rows = s.N * s.P, row_floats = s.Q * s.K;
  float* mean_data = mean.mutable_data_ptr<float>();
  float* var_data = var.mutable_data_ptr<float>();
  convolve_for_batch_norm(s, allowed, x.const_data_ptr<float>(), weight.const_data_ptr<float>(),
                          bias.const_data_ptr<float>(), z_data, mean_data, var_data);
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
  Tensor dx = empty_activation({need_dx ? s.N : 0, s.H, s.W, s.C});
  Tensor dweight = empty_gradient({s.K, s.C, 3, 3});
  Tensor dgamma = empty_gradient({s.K});
  Tensor dbeta = empty_gradient({s.K});

  const float* dy_data = dy.const_data_ptr<float>();
  const float* z_data = z.const_data_ptr<float>();
  const float* mean_data = mean.const_data_ptr<float>();
  const float* var_data = var.const_data_ptr<float>();
  const Affine affine(s.K, gamma.const_data_ptr<float>(), beta.const_data_ptr<float>(), mean_data, var_data,
                      eps);

  const int64_t rows = s.N * s.P;
  const std::vector<double> total = gradient_sums(dy_data, z_data, affine, mean_data, rows, s.Q, s.K);
  const BatchNormGradient bn(total, static_cast<double>(rows) * static_cast<double>(s.Q), var_data, eps,
                             dgamma.mutable_data_ptr<float>(), dbeta.mutable_data_ptr<float>());
  const BatchNormReluGradient gradient = bn.source(dy_data, z_data, affine, mean_data, s);
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
