// softmax_cross_entropy: loss = mean over n of log(sum over k of exp(logits[n,k])) - logits[n,target[n]],
// with the largest logit taken out of the exponent first. A few hundred numbers: one thread, in double.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "arena.h"
#include "shapes.h"

namespace maskcore {
namespace {

std::tuple<Tensor, Tensor> softmax_cross_entropy_cpu(const Tensor& logits, const Tensor& target) {
  check_tensor(logits, "logits", {kAny, kAny});
  const int64_t N = logits.size(0), K = logits.size(1);
  check_tensor(target, "target", {N}, ScalarType::Long);
  STD_TORCH_CHECK(N >= 1 && K >= 1, "logits must hold at least one sample and one class");
  Tensor loss = empty_activation({});
  Tensor probabilities = empty_activation({N, K});
  const float* x = logits.const_data_ptr<float>();
  const int64_t* classes = target.const_data_ptr<int64_t>();
  float* p = probabilities.mutable_data_ptr<float>();
  double total = 0.0;
  for (int64_t n = 0; n < N; ++n, x += K, p += K) {
    STD_TORCH_CHECK(classes[n] >= 0 && classes[n] < K, "target must hold classes from 0 to ", K - 1, ", has ",
                    classes[n]);
    const double largest = *std::max_element(x, x + K);
    double sum = 0.0;
    for (int64_t k = 0; k < K; ++k) sum += std::exp(x[k] - largest);
    for (int64_t k = 0; k < K; ++k) p[k] = static_cast<float>(std::exp(x[k] - largest) / sum);
    total += std::log(sum) + largest - x[classes[n]];
  }
  *loss.mutable_data_ptr<float>() = static_cast<float>(total / static_cast<double>(N));
  return {loss, probabilities};
}

/// dlogits[n,k] = dloss (p[n,k] - [k == target[n]]) / N
Tensor softmax_cross_entropy_backward_cpu(const Tensor& dloss, const Tensor& probabilities,
                                          const Tensor& target) {
  check_tensor(dloss, "dloss", {});
  check_tensor(probabilities, "probabilities", {kAny, kAny});
  const int64_t N = probabilities.size(0), K = probabilities.size(1);
  check_tensor(target, "target", {N}, ScalarType::Long);
  Tensor dlogits = empty_activation({N, K});
  const float scale = *dloss.const_data_ptr<float>() / static_cast<float>(N);
  const float* p = probabilities.const_data_ptr<float>();
  const int64_t* classes = target.const_data_ptr<int64_t>();
  float* out = dlogits.mutable_data_ptr<float>();
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) out[n * K + k] = scale * (p[n * K + k] - (k == classes[n] ? 1.0f : 0.0f));
  }
  return dlogits;
}

}  // namespace
}  // namespace maskcore

STABLE_TORCH_LIBRARY_IMPL(maskcore, CPU, m) {
  m.impl("softmax_cross_entropy", TORCH_BOX(&maskcore::softmax_cross_entropy_cpu));
  m.impl("_softmax_cross_entropy_backward", TORCH_BOX(&maskcore::softmax_cross_entropy_backward_cpu));
}
