// conv_relu:           y = max(conv(x, weight) + bias, 0)
// conv_relu_max_pool:  y = max_pool(that), without the full-size image ever being stored.
// Backward: the ReLU mask and the pool's expansion happen while the convolution's passes load the
// gradient (sources.h), so no intermediate gradient is stored either.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "conv_backward.h"
#include "conv_direct.h"
#include "conv_winograd.h"
#include "max_pool.h"
#include "shapes.h"

namespace maskcore {
namespace {

/// The filters of Winograd's forward pass, for calls that have the same weight and precision: 4 times its
/// size.
Tensor transform_filter_cpu(const Tensor& weight, const std::string& precision) {
  check_tensor(weight, "weight", {kAny, kAny, 3, 3});
  const FilterShape f = FilterShape::forward(weight.size(0), weight.size(1));
  Tensor transformed = torch::stable::new_empty(weight, {f.widest_floats()});
  float* out = transformed.mutable_data_ptr<float>();
  std::fill(out, out + f.widest_floats(), 0.0f);
  with_operands(parse_precision(precision), [&]<class Operands>() {
    transform_filters<Operands>(weight.const_data_ptr<float>(), f,
                                reinterpret_cast<typename Operands::Element*>(out));
  });
  return transformed;
}

/// By Winograd, with the given transform_filter(weight, precision) or a new one in scratch memory.
template <class Sink>
void convolve_winograd(const ConvShape& s, const TileGrid& grid, Precision precision, const Tensor& x,
                       const Tensor& weight, const std::optional<Tensor>& transformed, const Sink& sink) {
  const FilterShape f = FilterShape::forward(s.K, s.C);
  if (transformed.has_value()) check_tensor(*transformed, "transformed", {f.widest_floats()});
  const Activation input{x.const_data_ptr<float>(), s.H, s.W, s.C};
  with_operands(precision, [&]<class Operands>() {
    using Element = typename Operands::Element;
    const Element* filter = transformed.has_value()
                                ? reinterpret_cast<const Element*>(transformed->const_data_ptr<float>())
                                : transform_filters<Operands>(weight.const_data_ptr<float>(), f);
    convolve_winograd<Operands>(s, grid, input, filter, sink);
  });
}

Tensor conv_relu_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t padding,
                     const std::optional<Tensor>& transformed, const std::string& precision) {
  const Precision allowed = parse_precision(precision);
  const ConvShape s = ConvShape::of(x, weight, padding);
  check_tensor(bias, "bias", {s.K});
  Tensor y = torch::stable::new_empty(x, {s.N, s.P, s.Q, s.K});
  float* y_data = y.mutable_data_ptr<float>();
  const float* bias_data = bias.const_data_ptr<float>();
  if (use_winograd(s)) {
    const StoreOutput<true> sink{.y = y_data, .N = s.N, .P = s.P, .Q = s.Q, .K = s.K, .bias = bias_data};
    convolve_winograd(s, TileGrid{.N = s.N, .P = s.P, .Q = s.Q}, allowed, x, weight, transformed, sink);
    return y;
  }
  const Activation input{x.const_data_ptr<float>(), s.H, s.W, s.C};
  convolve(
      s, s.P, s.Q, input, pack_filter(weight.const_data_ptr<float>(), s, /*turned=*/false), bias_data,
      /*relu=*/true, [=](int64_t n, int64_t p, int64_t) { return y_data + (n * s.P + p) * s.Q * s.K; },
      [](int64_t, int64_t, int64_t) {});
  return y;
}

/// The three gradients, given that at the convolution's output; dx is empty where it is not needed.
template <class Gradient>
std::tuple<Tensor, Tensor, Tensor> conv_backward(const ConvShape& s, const std::string& precision,
                                                 const Gradient& gradient, const Tensor& x,
                                                 const Tensor& weight, bool need_dx) {
  Tensor dx = torch::stable::new_empty(x, {need_dx ? s.N : 0, s.H, s.W, s.C});
  Tensor dweight = torch::stable::new_empty(weight, {s.K, s.C, 3, 3});
  Tensor dbias = torch::stable::new_empty(weight, {s.K});
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

/// The 2x2 windows of a tile, pooled in registers.
struct PoolOutput {
  float* y;         // [N,P,Q,K]
  uint8_t* argmax;  // [N,P,Q,K]
  int64_t P, Q, K;
  const float* bias;

  template <class Lanes>
  void save(int64_t, const Tile& tile, int64_t k, Lanes lanes, const Vec (&y_tile)[kOut][kOut]) const {
    const Vec b = load(bias + k, lanes);
    const int64_t first = ((tile.n * P + tile.p / 2) * Q + tile.q / 2) * K + k;
    for (int64_t i = 0; i < tile.height / 2; ++i) {
      for (int64_t j = 0; j < tile.width / 2; ++j) {
        const Vec window[4] = {relu(y_tile[2 * i][2 * j] + b), relu(y_tile[2 * i][2 * j + 1] + b),
                               relu(y_tile[2 * i + 1][2 * j] + b), relu(y_tile[2 * i + 1][2 * j + 1] + b)};
        const Pooled pooled = max_pool_window(window);
        store(y + first + (i * Q + j) * K, pooled.best, lanes);
        store_bytes(argmax + first + (i * Q + j) * K, pooled.place, lanes);
      }
    }
  }
};

std::tuple<Tensor, Tensor> conv_relu_max_pool_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                  int64_t padding, const std::optional<Tensor>& transformed,
                                                  const std::string& precision) {
  const Precision allowed = parse_precision(precision);
  const ConvShape s = ConvShape::of(x, weight, padding);
  check_tensor(bias, "bias", {s.K});
  const PoolShape pool{.N = s.N, .H = s.P, .W = s.Q, .C = s.K};
  STD_TORCH_CHECK(pool.P >= 1 && pool.Q >= 1, "x is too small to be pooled: the convolution gives ", s.P,
                  " x ", s.Q);
  Tensor y = torch::stable::new_empty(x, {s.N, pool.P, pool.Q, s.K});
  Tensor argmax = torch::stable::new_empty(x, {s.N, pool.P, pool.Q, s.K}, ScalarType::Byte);
  float* y_data = y.mutable_data_ptr<float>();
  uint8_t* argmax_data = argmax.mutable_data_ptr<uint8_t>();
  const float* bias_data = bias.const_data_ptr<float>();
  // The pool drops an odd last row and column: they are not computed.
  const int64_t P = 2 * pool.P, Q = 2 * pool.Q;
  if (use_winograd(s)) {
    const PoolOutput sink{
        .y = y_data, .argmax = argmax_data, .P = pool.P, .Q = pool.Q, .K = s.K, .bias = bias_data};
    convolve_winograd(s, TileGrid{.N = s.N, .P = P, .Q = Q}, allowed, x, weight, transformed, sink);
    return {y, argmax};
  }
  const Activation input{x.const_data_ptr<float>(), s.H, s.W, s.C};
  const auto convolved = [=](int64_t slot) {
    return workspace(Purpose::kConvolved, kMaxRowBlock * Q * s.K) + slot * Q * s.K;
  };
  convolve(
      s, P, Q, input, pack_filter(weight.const_data_ptr<float>(), s, /*turned=*/false), bias_data,
      /*relu=*/true, [=](int64_t, int64_t, int64_t slot) { return convolved(slot); },
      [=](int64_t n, int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; p += 2) {
          const int64_t out = (n * pool.P + p / 2) * pool.Q * s.K;
          max_pool_row(convolved(p - begin), convolved(p - begin + 1), pool.Q, s.K, y_data + out,
                       argmax_data + out);
        }
      });
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
