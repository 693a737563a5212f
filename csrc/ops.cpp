// The table of contents: every operator's schema. Each backend file registers its implementations as
// its last block; the Python side (maskcore/ops.py) adds shape inference and gradients.
// Activations x, y, z, dy, dx are [N,H,W,C] float32; filters are [K,C,3,3]. precision is what the products of
// a convolution may round their operands to (shapes.h).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(maskcore, m) {
  m.def("transform_filter(Tensor weight, str precision=\"ieee\") -> Tensor");
  m.def(
      "conv_relu(Tensor x, Tensor weight, Tensor bias, int padding, Tensor? transformed=None,"
      " str precision=\"ieee\") -> Tensor");
  m.def(
      "_conv_relu_backward(Tensor dy, Tensor x, Tensor weight, Tensor y, int padding, str precision,"
      " bool need_dx)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def(
      "conv_relu_max_pool(Tensor x, Tensor weight, Tensor bias, int padding, Tensor? transformed=None,"
      " str precision=\"ieee\")"
      " -> (Tensor y, Tensor argmax)");
  m.def(
      "_conv_relu_max_pool_backward(Tensor dy, Tensor x, Tensor weight, Tensor y, Tensor argmax, int padding,"
      " str precision, bool need_dx) -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def(
      "conv_bn_relu_train(Tensor x, Tensor weight, Tensor bias, Tensor gamma, Tensor beta, float eps,"
      " int padding, str precision=\"ieee\") -> (Tensor y, Tensor z, Tensor mean, Tensor var)");
  m.def(
      "_conv_bn_relu_train_backward(Tensor dy, Tensor x, Tensor weight, Tensor z, Tensor gamma, Tensor beta,"
      " Tensor mean, Tensor var, float eps, int padding, str precision, bool need_dx)"
      " -> (Tensor dx, Tensor dweight, Tensor dgamma, Tensor dbeta)");
  m.def(
      "conv_bn_relu_conv_relu_train(Tensor x, Tensor weight1, Tensor bias1, Tensor gamma, Tensor beta,"
      " Tensor weight2, Tensor bias2, float eps, int padding1, int padding2, bool pool, str "
      "precision=\"ieee\")"
      " -> (Tensor y, Tensor argmax, Tensor z, Tensor gram, Tensor mean, Tensor var)");
  m.def(
      "_conv_bn_relu_conv_relu_train_backward(Tensor dy, Tensor x, Tensor weight1, Tensor bias1, Tensor "
      "gamma,"
      " Tensor beta, Tensor weight2, Tensor y, Tensor argmax, Tensor z, Tensor gram, Tensor mean, Tensor var,"
      " float eps, int padding1, int padding2, bool pool, str precision, bool need_dx)"
      " -> (Tensor dx, Tensor dweight1, Tensor dgamma, Tensor dbeta, Tensor dweight2, Tensor dbias2)");
  m.def("max_pool(Tensor x) -> (Tensor y, Tensor argmax)");
  m.def("_max_pool_backward(Tensor dy, Tensor argmax, int H, int W) -> Tensor");
  m.def("dense(Tensor x, Tensor weight, Tensor bias, bool relu=False) -> Tensor");
  m.def(
      "_dense_backward(Tensor dy, Tensor x, Tensor weight, Tensor y, bool relu)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def("softmax_cross_entropy(Tensor logits, Tensor target) -> (Tensor loss, Tensor probabilities)");
  m.def("_softmax_cross_entropy_backward(Tensor dloss, Tensor probabilities, Tensor target) -> Tensor");
  m.def(
      "adam_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
      " float lr, float beta1, float beta2, float eps, float l2, int step, bool keras_epsilon) -> ()");
  m.def(
      "adam_counted_(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs,"
      " Tensor(c!)[] exp_avg_sqs, Tensor(d!) step, float lr, float beta1, float beta2, float eps, float l2,"
      " bool keras_epsilon) -> ()");
  m.def("dropout(Tensor x, Tensor seed, float p) -> Tensor");
  m.def("warp(Tensor pictures, Tensor matrices, float fill, float scale, bool bfloat16=False) -> Tensor");
  m.def("empty_cache() -> ()");
  m.def("_fma_loop(int steps) -> int");
  m.def("_phase_times() -> Tensor");
}
