// adam_: one step of Adam (Kingma & Ba 2015) over all tensors of a parameter group, in place.
//   g = gradient + 2 l2 p;   m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
//   Keras:    p -= lr sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)      ("epsilon hat")
//   PyTorch:  p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
// Both are p -= step_size m / (sqrt(v) + epsilon) with epsilon = eps, or eps sqrt(1 - beta2^t).
// Bound by memory: 4 floats read and 3 written a parameter, 28 bytes.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "shapes.h"

namespace maskcore {
namespace {

struct AdamSlice {
  float* p;
  const float* g;
  float* m;
  float* v;
  int64_t size;
};

struct AdamStep {
  float step_size, beta1, beta2, epsilon, l2_gradient;  // l2_gradient = 2 l2
  // Rounded once from double: 1.0f - 0.999f is off by 1e-5 of itself, and v with it.
  float one_minus_beta1, one_minus_beta2;
};

/// True if both have p's sizes and strides and leave no hole: they can be walked as flat arrays.
bool same_dense_layout(const Tensor& tensor, const Tensor& p) {
  if (tensor.dim() != p.dim()) return false;
  int64_t span = p.numel() == 0 ? 0 : 1;
  for (int64_t d = 0; d < p.dim(); ++d) {
    if (tensor.size(d) != p.size(d)) return false;
    if (p.size(d) > 1 && tensor.stride(d) != p.stride(d)) return false;
    if (p.size(d) > 1) span += (p.size(d) - 1) * p.stride(d);
  }
  return span == p.numel() || p.numel() == 0;
}

void adam_slice(const AdamSlice& s, const AdamStep& a) {
  float* __restrict p = s.p;
  float* __restrict m = s.m;
  float* __restrict v = s.v;
  const float* __restrict gradient = s.g;
  for (int64_t i = 0; i < s.size; ++i) {
    const float g = gradient[i] + a.l2_gradient * p[i];
    m[i] = a.beta1 * m[i] + a.one_minus_beta1 * g;
    v[i] = a.beta2 * v[i] + a.one_minus_beta2 * g * g;
    p[i] -= a.step_size * m[i] / (std::sqrt(v[i]) + a.epsilon);
  }
}

void adam_cpu(const std::vector<Tensor>& parameters, const std::vector<Tensor>& gradients,
              const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs, double lr,
              double beta1, double beta2, double eps, double l2, int64_t step, bool keras_epsilon) {
  STD_TORCH_CHECK(gradients.size() == parameters.size() && exp_avgs.size() == parameters.size() &&
                      exp_avg_sqs.size() == parameters.size(),
                  "gradients, exp_avgs and exp_avg_sqs must be as many as parameters");
  STD_TORCH_CHECK(step >= 1, "step must count from 1, is ", step);
  // Slices of 16K floats: 256 KB of the four arrays, enough work for a thread, small enough to share out
  // evenly.
  constexpr int64_t kSlice = 16 * 1024;
  std::vector<AdamSlice> slices;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Tensor* tensors[] = {&parameters[i], &gradients[i], &exp_avgs[i], &exp_avg_sqs[i]};
    const char* names[] = {"parameters", "gradients", "exp_avgs", "exp_avg_sqs"};
    const int64_t size = parameters[i].numel();
    for (int t = 0; t < 4; ++t) {
      STD_TORCH_CHECK(tensors[t]->scalar_type() == ScalarType::Float, names[t], " must be float32");
      STD_TORCH_CHECK(same_dense_layout(*tensors[t], parameters[i]), names[t],
                      " must be dense and laid out in memory as the parameter is");
    }
    float* p = parameters[i].mutable_data_ptr<float>();
    const float* g = gradients[i].const_data_ptr<float>();
    float* m = exp_avgs[i].mutable_data_ptr<float>();
    float* v = exp_avg_sqs[i].mutable_data_ptr<float>();
    for (int64_t at = 0; at < size; at += kSlice) {
      slices.push_back({p + at, g + at, m + at, v + at, std::min(kSlice, size - at)});
    }
  }
  const double t = static_cast<double>(step);
  const double correction1 = 1.0 - std::pow(beta1, t), correction2 = std::sqrt(1.0 - std::pow(beta2, t));
  const AdamStep a{.step_size = static_cast<float>(lr * correction2 / correction1),
                   .beta1 = static_cast<float>(beta1),
                   .beta2 = static_cast<float>(beta2),
                   .epsilon = static_cast<float>(keras_epsilon ? eps : eps * correction2),
                   .l2_gradient = static_cast<float>(2.0 * l2),
                   .one_minus_beta1 = static_cast<float>(1.0 - beta1),
                   .one_minus_beta2 = static_cast<float>(1.0 - beta2)};
  torch::stable::parallel_for(0, static_cast<int64_t>(slices.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) adam_slice(slices[static_cast<size_t>(i)], a);
  });
}

/// step counts the steps done so far, and goes up by one.
void adam_counted_cpu(const std::vector<Tensor>& parameters, const std::vector<Tensor>& gradients,
                      const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                      const Tensor& step, double lr, double beta1, double beta2, double eps, double l2,
                      bool keras_epsilon) {
  check_tensor(step, "step", {}, ScalarType::Long);
  int64_t* count = step.mutable_data_ptr<int64_t>();
  adam_cpu(parameters, gradients, exp_avgs, exp_avg_sqs, lr, beta1, beta2, eps, l2, *count + 1,
           keras_epsilon);
  *count += 1;
}

}  // namespace
}  // namespace maskcore

STABLE_TORCH_LIBRARY_IMPL(maskcore, CPU, m) {
  m.impl("adam_", TORCH_BOX(&maskcore::adam_cpu));
  m.impl("adam_counted_", TORCH_BOX(&maskcore::adam_counted_cpu));
}
