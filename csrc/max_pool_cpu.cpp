// max_pool: y[n,p,q,c] = max over i,j in {0,1} of x[n,2p+i,2q+j,c], with the place of the first maximum.
// Bound by memory: reads 4 floats and writes 5 bytes an output.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "arena.h"
#include "max_pool.h"
#include "shapes.h"

namespace maskcore {
namespace {

std::tuple<Tensor, Tensor> max_pool_cpu(const Tensor& x) {
  check_tensor(x, "x", {kAny, kAny, kAny, kAny});
  const PoolShape s{.N = x.size(0), .H = x.size(1), .W = x.size(2), .C = x.size(3)};
  STD_TORCH_CHECK(s.P >= 1 && s.Q >= 1, "x must be at least 2 pixels high and wide, is ", s.H, " x ", s.W);
  Tensor y = empty_activation({s.N, s.P, s.Q, s.C});
  Tensor argmax = empty_activation({s.N, s.P, s.Q, s.C}, ScalarType::Byte);
  const float* x_data = x.const_data_ptr<float>();
  float* y_data = y.mutable_data_ptr<float>();
  uint8_t* argmax_data = argmax.mutable_data_ptr<uint8_t>();
  torch::stable::parallel_for(0, s.N * s.P, 1, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* upper = x_data + ((row / s.P) * s.H + 2 * (row % s.P)) * s.W * s.C;
      const int64_t out = row * s.Q * s.C;
      max_pool_row(upper, upper + s.W * s.C, s.Q, s.C, y_data + out, argmax_data + out);
    }
  });
  return {y, argmax};
}

Tensor max_pool_backward_cpu(const Tensor& dy, const Tensor& argmax, int64_t H, int64_t W) {
  check_tensor(dy, "dy", {kAny, H / 2, W / 2, kAny});
  const PoolShape s{.N = dy.size(0), .H = H, .W = W, .C = dy.size(3)};
  check_tensor(argmax, "argmax", {s.N, s.P, s.Q, s.C}, ScalarType::Byte);
  Tensor dx = empty_activation({s.N, s.H, s.W, s.C});
  const float* dy_data = dy.const_data_ptr<float>();
  const uint8_t* argmax_data = argmax.const_data_ptr<uint8_t>();
  float* dx_data = dx.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, s.N * s.H, 1, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / s.H, h = row % s.H;
      float* out = dx_data + row * s.W * s.C;
      std::fill(out, out + s.W * s.C, 0.0f);
      if (h / 2 >= s.P) continue;
      const int64_t in = (n * s.P + h / 2) * s.Q * s.C;
      const int32_t first = h % 2 == 0 ? 0 : 2;
      for (int64_t q = 0; q < s.Q; ++q) {
        float* left = out + 2 * q * s.C;
        float* right = left + s.C;
        for_each_vector(s.C, [&](int64_t c, auto lanes) {
          const Vec g = load(dy_data + in + q * s.C + c, lanes);
          const Mask place = load_bytes(argmax_data + in + q * s.C + c, lanes);
          store(left + c, place == first ? g : Vec{}, lanes);
          store(right + c, place == first + 1 ? g : Vec{}, lanes);
        });
      }
    }
  });
  return dx;
}

}  // namespace
}  // namespace maskcore

STABLE_TORCH_LIBRARY_IMPL(maskcore, CPU, m) {
  m.impl("max_pool", TORCH_BOX(&maskcore::max_pool_cpu));
  m.impl("_max_pool_backward", TORCH_BOX(&maskcore::max_pool_backward_cpu));
}
