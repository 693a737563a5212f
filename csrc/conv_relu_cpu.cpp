// conv_relu:           y = max(conv(x, weight) + bias, 0)
// conv_relu_max_pool:  y = max_pool(that), without the full-size image ever being stored.
// Backward: the ReLU mask and the pool's expansion happen while the convolution's passes load the
// gradient (sources.h), so no intermediate gradient is stored either.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "arena.h"
#include "conv_backward.h"
#include "conv_relu.h"
#include "conv_winograd.h"
#include "shapes.h"

namespace maskcore {
namespace {

/// The filters of Winograd's forward pass, for calls that have the same weight and precision.
Tensor transform_filter_cpu(const Tensor& weight, const std::string& precision) {
  check_tensor(weight, "weight", {kAny, kAny, 3, 3});
  const FilterShape f = FilterShape::forward(weight.size(0), weight.size(1));
  Tensor transformed = torch::stable::new_empty(weight, {f.kept_floats()});
  const float* w = weight.const_data_ptr<float>();
  float* out = transformed.mutable_data_ptr<float>();
  std::fill(out, out + f.kept_floats(), 0.0f);
  with_operands(parse_precision(precision), [&]<class Operands>() {
    transform_filters<Operands, F4>(w, f, reinterpret_cast<typename Operands::Element*>(out));
    if constexpr (std::is_same_v<Operands, Float32>) {
      if (f.keeps_f6()) transform_filters<Operands, F6>(w, f, out + f.kept_begin<F6>());
    }
  });
  return transformed;
}

/// The data of transform_filter(weight, precision), or null.
const float* transformed_data(const std::optional<Tensor>& transformed, const ConvShape& s) {
  if (!transformed.has_value()) return nullptr;
  check_tensor(*transformed, "transformed", {FilterShape::forward(s.K, s.C).kept_floats()});
  return transformed->const_data_ptr<float>();
}

Tensor conv_relu_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t padding,
                     const std::optional<Tensor>& transformed, const std::string& precision) {
  const Precision allowed = parse_precision(precision);
  const ConvShape s = ConvShape::of(x, weight, padding);
  check_tensor(bias, "bias", {s.K});
  Tensor y = empty_activation({s.N, s.P, s.Q, s.K});
  const Activation input{x.const_data_ptr<float>(), s.H, s.W, s.C};
  const float* filter = use_winograd(s) ? transformed_data(transformed, s) : nullptr;
  convolve_relu(s, allowed, input, weight.const_data_ptr<float>(), filter, bias.const_data_ptr<float>(),
                y.mutable_data_ptr<float>());
  return y;
}

/// The three gradients, given that at the convolution's output; dx is empty where it is not needed.
template <class Gradient>
std::tuple<Tensor, Tensor, Tensor> conv_backward(const ConvShape& s, const std::string& precision,
                                                 const Gradient& gradient, const Tensor& x,
                                                 const Tensor& weight, bool need_dx) {
  Tensor dx = empty_activation({need_dx ? s.N : 0, s.H, s.W, s.C});
  Tensor dweight = empty_gradient({s.K, s.C, 3, 3});
  Tensor dbias = empty_gradient({s.K});
  convolve_backward(s, parse_precision(precision), gradient, x.const_data_ptr<float>(),
                    weight.const_data_ptr<float>(), need_dx ? dx.mutable_data_ptr<float>() : nullptr,
                    dweight.mutable_data_ptr<float>(), dbias.mutable_data_ptr<float>());
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> conv_relu_backward_cpu(const Tensor& dy, const Tensor& x,
                                                          const Tensor& weight, const Tensor& y,
                                                          int64_t padding, const std::string& precision,
                                                          bool need_dx) {
  const ConvShape s = ConvShape::of(x, weight, padding);
  check_tensor(dy, "dy", {s.N, s.P, s.Q, s.K});
  check_tensor(y, "y", {s.N, s.P, s.Q, s.K});
  const ReluGradient gradient{dy.const_data_ptr<float>(), y.const_data_ptr<float>(), s.P, s.Q, s.K};
  return conv_backward(s, precision, gradient, x, weight, need_dx);
}

std::tuple<Tensor, Tensor> conv_relu_max_pool_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                  int64_t padding, const std::optional<Tensor>& transformed,
                                                  const std::string& precision) {
  const Precision allowed = parse_precision(precision);
  const ConvShape s = ConvShape::of(x, weight, padding);
  check_tensor(bias, "bias", {s.K});
  const PoolShape pool = pooled_shape(s);
  Tensor y = empty_activation({s.N, pool.P, pool.Q, s.K});
  Tensor argmax = empty_activation({s.N, pool.P, pool.Q, s.K}, ScalarType::Byte);
  const Activation input{x.const_data_ptr<float>(), s.H, s.W, s.C};
  const float* filter = use_winograd(s) ? transformed_data(transformed, s) : nullptr;
  convolve_relu_max_pool(s, allowed, input, weight.const_data_ptr<float>(), filter,
                         bias.const_data_ptr<float>(), y.mutable_data_ptr<float>(),
                         argmax.mutable_data_ptr<uint8_t>());
  return {y, argmax};
}

std::tuple<Tensor, Tensor, Tensor> conv_relu_max_pool_backward_cpu(const Tensor& dy, const Tensor& x,
                                                                   const Tensor& weight, const Tensor& y,
                                                                   const Tensor& argmax, int64_t padding,
                                                                   const std::string& precision,
                                                                   bool need_dx) {
  const ConvShape s = ConvShape::of(x, weight, padding);
  check_tensor(dy, "dy", {s.N, s.P / 2, s.Q / 2, s.K});
  check_tensor(y, "y", {s.N, s.P / 2, s.Q / 2, s.K});
  check_tensor(argmax, "argmax", {s.N, s.P / 2, s.Q / 2, s.K}, ScalarType::Byte);
  const PooledReluGradient gradient{
      dy.const_data_ptr<float>(), y.const_data_ptr<float>(), argmax.const_data_ptr<uint8_t>(), s.P, s.Q, s.K};
  return conv_backward(s, precision, gradient, x, weight, need_dx);
}

}  // namespace
}  // namespace maskcore

STABLE_TORCH_LIBRARY_IMPL(maskcore, CPU, m) {
  m.impl("transform_filter", TORCH_BOX(&maskcore::transform_filter_cpu));
  m.impl("conv_relu", TORCH_BOX(&maskcore::conv_relu_cpu));
  m.impl("_conv_relu_backward", TORCH_BOX(&maskcore::conv_relu_backward_cpu));
  m.impl("conv_relu_max_pool", TORCH_BOX(&maskcore::conv_relu_max_pool_cpu));
  m.impl("_conv_relu_max_pool_backward", TORCH_BOX(&maskcore::conv_relu_max_pool_backward_cpu));
}
