// dropout: y[i] = 0 with probability p, else x[i] / (1 - p). The decision about element i is a function of
// the seed and i (philox.h), the same on every device and for any number of threads; backward is the same
// function of dy.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "philox.h"
#include "shapes.h"

namespace maskcore {
namespace {

Tensor dropout_cpu(const Tensor& x, const Tensor& seed, double p) {
  STD_TORCH_CHECK(p >= 0 && p <= 1, "p must lie in [0, 1], is ", p);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x must be float32");
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  check_tensor(seed, "seed", {1}, ScalarType::Long);
  Tensor y = torch::stable::empty_like(x);
  const float* in = x.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  const int64_t size = x.numel(), seed_value = *seed.const_data_ptr<int64_t>();
  const uint64_t threshold = static_cast<uint64_t>(std::llround(p * 4294967296.0));
  const float scale = static_cast<float>(1.0 / (1.0 - p));
  constexpr int64_t kElements = DropoutMask::kElements, kGrain = 1024;
  torch::stable::parallel_for(0, (size + kElements - 1) / kElements, kGrain, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const DropoutMask mask = DropoutMask::of(seed_value, i);
      const int64_t first = i * kElements, count = std::min(kElements, size - first);
      for (int64_t j = 0; j < count; ++j) {
        out[first + j] = mask.keeps(static_cast<int>(j), threshold) ? in[first + j] * scale : 0.0f;
      }
    }
  });
  return y;
}

}  // namespace
}  // namespace maskcore

STABLE_TORCH_LIBRARY_IMPL(maskcore, CPU, m) { m.impl("dropout", TORCH_BOX(&maskcore::dropout_cpu)); }
