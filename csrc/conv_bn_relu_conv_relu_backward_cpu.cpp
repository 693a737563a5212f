// The gradients of conv_bn_relu_conv_relu_train. The second convolution's backward pass normalises while it
// loads, and takes the sums that batch normalisation needs while it writes. With few input channels the
// gradient at relu(bn(z)) is not stored either (conv_patches.h).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arena.h"
#include "batch_norm.h"
#include "conv_backward.h"
#include "conv_patches.h"
#include "shapes.h"
#include "tasks.h"

namespace maskcore {
namespace {

/// The second convolution's backward pass, whatever its output's gradient comes through.
template <class Input, class Sink>
void backward_second(const HeadShape& shape, Precision precision, const Tensor& dy, const Tensor& y,
                     const Tensor& argmax, const Input& input, const Tensor& weight, const Sink& sink,
                     float* dweight, float* dbias) {
  const ConvShape& s = shape.second;
  const auto run = [&](const auto& gradient) {
    convolve_backward(s, precision, input, gradient, weight.const_data_ptr<float>(), sink, dweight, dbias);
  };
  const float *dy_data = dy.const_data_ptr<float>(), *y_data = y.const_data_ptr<float>();
  if (shape.pool) {
    run(PooledReluGradient{dy_data, y_data, argmax.const_data_ptr<uint8_t>(), s.P, s.Q, s.K});
  } else {
    run(ReluGradient{dy_data, y_data, s.P, s.Q, s.K});
  }
}

/// P^T g, [9 C + 1][K], of a gradient d [N,P,Q,K] at relu(bn(z)) that lies in memory.
std::vector<double> patch_products(const RecomputedActivation& activation, int64_t N, const float* d,
                                   float shift) {
  const int64_t row_floats = activation.W * activation.C, rows = N * activation.H;
  const int64_t size = (kTaps * activation.shape().C + 1) * activation.C, groups = ceil_div(rows, kSlotRows);
  std::vector<double> sums(static_cast<size_t>(groups * size));
  const PatchRows sink{.products = sums.data(), .shift = shift};
  share(groups, [&](const auto& take) {
    RecomputedActivation held = activation;
    float* scratch = workspace(Purpose::kGradientRows, row_floats + kTileColumns);
    for (int64_t group = take(); group < groups; group = take()) {
      for (int64_t row = group * kSlotRows; row < std::min(rows, (group + 1) * kSlotRows); ++row) {
        const int64_t n = row / activation.H, h = row % activation.H;
        held.hold(n, h, h + 1);
        std::copy_n(d + row * row_floats, row_floats, scratch);
        sink.take(held, group, n, h, scratch);
      }
    }
  });
  return sum_slots(sums, size);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_relu_conv_relu_train_backward_cpu(
    const Tensor& dy, const Tensor& x, const Tensor& weight1, const Tensor& bias1, const Tensor& gamma,
    const Tensor& beta, const Tensor& weight2, const Tensor& y, const Tensor& argmax, const Tensor& z,
    const Tensor& gram, const Tensor& mean, const Tensor& var, double eps, int64_t padding1, int64_t padding2,
    bool pool, const std::string& precision, bool need_dx) {
  const Precision allowed = parse_precision(precision);
  const HeadShape shape = HeadShape::of(x, weight1, weight2, padding1, padding2, pool);
  const ConvShape &s1 = shape.first, &s2 = shape.second;
  const int64_t P = pool ? s2.P / 2 : s2.P, Q = pool ? s2.Q / 2 : s2.Q;
  const int64_t gram_size = is_recomputed(s1) ? kTaps * s1.C + 1 : 0;
  check_tensor(dy, "dy", {s2.N, P, Q, s2.K});
  check_tensor(y, "y", {s2.N, P, Q, s2.K});
  check_tensor(argmax, "argmax", {pool ? s2.N : 0, P, Q, s2.K}, ScalarType::Byte);
  check_tensor(z, "z", {is_recomputed(s1) ? 0 : s1.N, s1.P, s1.Q, s1.K});
  check_tensor(gram, "gram", {gram_size, gram_size}, ScalarType::Double);
  check_tensor(bias1, "bias1", {s1.K});
  check_tensor(gamma, "gamma", {s1.K});
  check_tensor(beta, "beta", {s1.K});
  check_tensor(mean, "mean", {s1.K});
  check_tensor(var, "var", {s1.K});
  Tensor dweight1 = empty_gradient({s1.K, s1.C, 3, 3});
  Tensor dgamma = empty_gradient({s1.K});
  Tensor dbeta = empty_gradient({s1.K});
  Tensor dweight2 = empty_gradient({s2.K, s2.C, 3, 3});
  Tensor dbias2 = empty_gradient({s2.K});
  const float *x_data = x.const_data_ptr<float>(), *weight1_data = weight1.const_data_ptr<float>(),
              *bias1_data = bias1.const_data_ptr<float>(), *mean_data = mean.const_data_ptr<float>(),
              *var_data = var.const_data_ptr<float>();
  float *dweight1_data = dweight1.mutable_data_ptr<float>(), *dgamma_data = dgamma.mutable_data_ptr<float>(),
        *dbeta_data = dbeta.mutable_data_ptr<float>(), *dweight2_data = dweight2.mutable_data_ptr<float>(),
        *dbias2_data = dbias2.mutable_data_ptr<float>();
  const Affine affine(s1.K, gamma.const_data_ptr<float>(), beta.const_data_ptr<float>(), mean_data, var_data,
                      eps);
  const double pixels = static_cast<double>(s1.N * s1.P) * static_cast<double>(s1.Q);
  const auto dx_tensor = [&]() { return empty_activation({need_dx ? s1.N : 0, s1.H, s1.W, s1.C}); };
  // The gradient at relu(bn(z)), where it has to be stored. Freed before dx is, it should lie below it.
  const auto gradient_tensor = [&]() { return empty_activation({s1.N, s1.P, s1.Q, s1.K}); };
  const bool rows_are_taken = use_winograd(s2) && backward_in_pieces(s2);

  if (!is_recomputed(s1)) {
    Tensor d = gradient_tensor();
    const float* z_data = z.const_data_ptr<float>();
    const NormalizedActivation input{z_data, affine.scale.data(), affine.shift.data(), s1.P, s1.Q, s1.K};
    std::vector<double> sums(static_cast<size_t>(2 * kMostPieces * 2 * s1.K)), total;
    const StoreRows store = StoreRows::of(d.mutable_data_ptr<float>(), s2);
    if (rows_are_taken) {
      const SumRows sink{
          .store = store, .z = z_data, .affine = &affine, .mean = mean_data, .sums = sums.data()};
      backward_second(shape, allowed, dy, y, argmax, input, weight2, sink, dweight2_data, dbias2_data);
      total = sum_slots(sums, 2 * s1.K);
    } else {
      backward_second(shape, allowed, dy, y, argmax, input, weight2, store, dweight2_data, dbias2_data);
      total = gradient_sums(d.const_data_ptr<float>(), z_data, affine, mean_data, s1.N * s1.P, s1.Q, s1.K);
    }
    const BatchNormGradient bn(total, pixels, var_data, eps, dgamma_data, dbeta_data);
    Tensor dx = dx_tensor();
    convolve_backward(s1, allowed, bn.source(d.const_data_ptr<float>(), z_data, affine, mean_data, s1),
                      x_data, weight1_data, need_dx ? dx.mutable_data_ptr<float>() : nullptr, dweight1_data,
                      /*dbias=*/nullptr);
    return {dx, dweight1, dgamma, dbeta, dweight2, dbias2};
  }

  const float shift = patch_shift(x_data, s1);
  const RecomputedActivation input(s1, x_data, weight1_data, bias1_data, affine, mean_data);
  std::vector<double> products;
  std::optional<Tensor> d;
  if (rows_are_taken && !need_dx) {
    const int64_t size = (kTaps * s1.C + 1) * s1.K;
    std::vector<double> sums(static_cast<size_t>(2 * kMostPieces * size));
    backward_second(shape, allowed, dy, y, argmax, input, weight2,
                    PatchRows{.products = sums.data(), .shift = shift}, dweight2_data, dbias2_data);
    products = sum_slots(sums, size);
  } else {
    d = gradient_tensor();
    backward_second(shape, allowed, dy, y, argmax, input, weight2,
                    StoreRows::of(d->mutable_data_ptr<float>(), s2), dweight2_data, dbias2_data);
    products = patch_products(input, s1.N, d->const_data_ptr<float>(), shift);
  }
  const PatchMoments moments(s1, shift, gram.const_data_ptr<double>());
  const BatchNormGradient bn(moments.gradient_sums(products, weight1_data, s1.K), pixels, var_data, eps,
                             dgamma_data, dbeta_data);
  moments.filter_gradient(products, weight1_data, s1.K, affine.scale.data(), bn.slope.data(), dweight1_data);
  if (!need_dx) return {dx_tensor(), dweight1, dgamma, dbeta, dweight2, dbias2};
  Tensor z_again = gradient_tensor(), dx = dx_tensor();
  float* z_data = z_again.mutable_data_ptr<float>();
  convolve_forward(
      s1, s1.P, s1.Q, Activation{x_data, s1.H, s1.W, s1.C}, weight1_data, bias1_data, /*relu=*/false,
      /*streamed=*/false,
      [=](int64_t n, int64_t p, int64_t) { return z_data + (n * s1.P + p) * s1.Q * s1.K; },
      [](int64_t, int64_t, int64_t) {});
  convolve_backward_data(s1, bn.source(d->const_data_ptr<float>(), z_data, affine, mean_data, s1),
                         weight1_data, dx.mutable_data_ptr<float>());
  return {dx, dweight1, dgamma, dbeta, dweight2, dbias2};
}

}  // namespace
}  // namespace maskcore

STABLE_TORCH_LIBRARY_IMPL(maskcore, CPU, m) {
  m.impl("_conv_bn_relu_conv_relu_train_backward",
         TORCH_BOX(&maskcore::conv_bn_relu_conv_relu_train_backward_cpu));
}
