// conv_bn_relu_conv_relu_train: a block's head, conv_bn_relu_train and behind it conv_relu or
// conv_relu_max_pool. The second convolution normalises while it loads: relu(bn(z)) is never stored. With few
// input channels z itself is not (conv_patches.h).
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "arena.h"
#include "batch_norm.h"
#include "conv_patches.h"
#include "conv_relu.h"
#include "shapes.h"

namespace maskcore {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_relu_conv_relu_train_cpu(
    const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& gamma, const Tensor& beta,
    const Tensor& weight2, const Tensor& bias2, double eps, int64_t padding1, int64_t padding2, bool pool,
    const std::string& precision) {
  const Precision allowed = parse_precision(precision);
  const HeadShape shape = HeadShape::of(x, weight1, weight2, padding1, padding2, pool);
  const ConvShape &s1 = shape.first, &s2 = shape.second;
  check_tensor(bias1, "bias1", {s1.K});
  check_tensor(gamma, "gamma", {s1.K});
  check_tensor(beta, "beta", {s1.K});
  check_tensor(bias2, "bias2", {s2.K});
  STD_TORCH_CHECK(s1.N >= 1, "x must hold at least one image: there are no statistics of an empty batch");
  const PoolShape pooled =
      pool ? pooled_shape(s2) : PoolShape{.N = s2.N, .H = 2 * s2.P, .W = 2 * s2.Q, .C = s2.K};
  Tensor y = empty_activation({s2.N, pooled.P, pooled.Q, s2.K});
  Tensor argmax = empty_activation({pool ? s2.N : 0, pooled.P, pooled.Q, s2.K}, ScalarType::Byte);
  Tensor z = empty_activation({is_recomputed(s1) ? 0 : s1.N, s1.P, s1.Q, s1.K});
  const int64_t gram_size = is_recomputed(s1) ? kTaps * s1.C + 1 : 0;
  Tensor gram = empty_activation({gram_size, gram_size}, ScalarType::Double);
  Tensor mean = empty_activation({s1.K});
  Tensor var = empty_activation({s1.K});
  const float *x_data = x.const_data_ptr<float>(), *weight1_data = weight1.const_data_ptr<float>(),
              *bias1_data = bias1.const_data_ptr<float>();
  float *mean_data = mean.mutable_data_ptr<float>(), *var_data = var.mutable_data_ptr<float>();
  const auto affine = [&]() {
    return Affine(s1.K, gamma.const_data_ptr<float>(), beta.const_data_ptr<float>(), mean_data, var_data,
                  eps);
  };
  const auto convolve_second = [&](const auto& input) {
    const float *weight = weight2.const_data_ptr<float>(), *bias = bias2.const_data_ptr<float>();
    float* out = y.mutable_data_ptr<float>();
    if (pool) {
      convolve_relu_max_pool(s2, allowed, input, weight, nullptr, bias, out,
                             argmax.mutable_data_ptr<uint8_t>());
    } else {
      convolve_relu(s2, allowed, input, weight, nullptr, bias, out);
    }
  };
  if (is_recomputed(s1)) {
    const float shift = patch_shift(x_data, s1);
    measure_gram(s1, x_data, shift, gram.mutable_data_ptr<double>());
    const PatchMoments moments(s1, shift, gram.const_data_ptr<double>());
    moments.statistics(weight1_data, bias1_data, s1.K, mean_data, var_data);
    convolve_second(RecomputedActivation(s1, x_data, weight1_data, bias1_data, affine(), mean_data));
  } else {
    float* z_data = z.mutable_data_ptr<float>();
    convolve_for_batch_norm(s1, allowed, x_data, weight1_data, bias1_data, z_data, mean_data, var_data);
    const Affine a = affine();
    convolve_second(NormalizedActivation{z_data, a.scale.data(), a.shift.data(), s1.P, s1.Q, s1.K});
  }
  return {y, argmax, z, gram, mean, var};
}

}  // namespace
}  // namespace maskcore

STABLE_TORCH_LIBRARY_IMPL(maskcore, CPU, m) {
  m.impl("conv_bn_relu_conv_relu_train", TORCH_BOX(&maskcore::conv_bn_relu_conv_relu_train_cpu));
}
