// The launcher of every CUDA kernel: plain pointers, sizes and a stream, no torch. Each returns what starting
// its kernels returned, starts nothing where there is nothing to do, never waits, and may be captured in a
// CUDA graph. Sizes are checked by the caller (ops_cuda.cpp); a launcher refuses only what its index
// arithmetic cannot address (cudaErrorInvalidValue). Pointers may lie anywhere their element may: 16-byte
// accesses are used where they are aligned to them.
#pragma once

#ifdef MASKCORE_CUDA_EMULATION
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

#include "conv_size.h"

namespace maskcore {

// ---- max_pool_cuda.cu ----------------------------------------------------------------------------

/// x [N,H,W,C] -> y [N,H/2,W/2,C] and argmax, of the same sizes.
cudaError_t launch_max_pool(const void* x, DataType dtype, int64_t N, int64_t H, int64_t W, int64_t C,
                            void* y, uint8_t* argmax, cudaStream_t stream);

/// dy, argmax [N,H/2,W/2,C] -> dx [N,H,W,C]
cudaError_t launch_max_pool_backward(const void* dy, const uint8_t* argmax, DataType dtype, int64_t N,
                                     int64_t H, int64_t W, int64_t C, void* dx, cudaStream_t stream);

// ---- softmax_cross_entropy_cuda.cu ---------------------------------------------------------------

/// logits [N,K], target [N] -> loss [], probabilities [N,K]
cudaError_t launch_softmax_cross_entropy(const float* logits, const int64_t* target, int64_t N, int64_t K,
                                         float* loss, float* probabilities, cudaStream_t stream);

/// dloss [], probabilities [N,K], target [N] -> dlogits [N,K]
cudaError_t launch_softmax_cross_entropy_backward(const float* dloss, const float* probabilities,
                                                  const int64_t* target, int64_t N, int64_t K, float* dlogits,
                                                  cudaStream_t stream);

// ---- adam_cuda.cu --------------------------------------------------------------------------------

/// One parameter with its gradient and moments, all float32 and in the same order in memory.
struct AdamTensor {
  float* p;
  const float* g;
  float* m;
  float* v;
  int64_t size;
};

/// What is the same for all tensors and all steps. l2 is the factor of sum(p^2) in the loss.
struct AdamSettings {
  double lr, beta1, beta2, eps, l2;
  bool keras_epsilon;
};

/// The step-th step, counted from 1, of `count` tensors. `tensors` is read before this returns.
cudaError_t launch_adam(const AdamTensor* tensors, int64_t count, const AdamSettings& settings, int64_t step,
                        cudaStream_t stream);

/// The same with the number of steps done so far in device memory: adds 1 to it and takes that step. A
/// captured graph of it takes the next step each time it is replayed. factors [2] is room for the step's
/// numbers.
cudaError_t launch_adam_counted(const AdamTensor* tensors, int64_t count, const AdamSettings& settings,
                                int64_t* step, float* factors, cudaStream_t stream);

// ---- dropout_cuda.cu -----------------------------------------------------------------------------

/// x [size] -> y [size]: 0 with probability p, else x / (1 - p); seed [1] is read on the device.
cudaError_t launch_dropout(const void* x, const int64_t* seed, DataType dtype, int64_t size, double p,
                           void* y, cudaStream_t stream);

// ---- warp_cuda.cu --------------------------------------------------------------------------------

/// pictures [N,H,W,3], matrices [N,6] -> out [N,H,W,3]
cudaError_t launch_warp(const uint8_t* pictures, const double* matrices, int64_t N, int64_t H, int64_t W,
                        float fill, float scale, DataType dtype, void* out, cudaStream_t stream);

// ---- conv_relu_cuda.cu ---------------------------------------------------------------------------
// x [N,H,W,C], y [N,P,Q,K] and their gradients are of call.dtype; weight [K,C,3,3] and what is per channel
// float32. Each launcher needs a workspace of so many bytes, on 256 bytes.

int64_t conv_relu_workspace_bytes(const ConvCall& call);

cudaError_t launch_conv_relu(const ConvCall& call, const void* x, const float* weight, const float* bias,
                             void* y, void* workspace, cudaStream_t stream);

/// y and argmax [N,P/2,Q/2,K]
cudaError_t launch_conv_relu_max_pool(const ConvCall& call, const void* x, const float* weight,
                                      const float* bias, void* y, uint8_t* argmax, void* workspace,
                                      cudaStream_t stream);

// ---- conv_relu_backward_cuda.cu ------------------------------------------------------------------

int64_t conv_relu_backward_workspace_bytes(const ConvCall& call);

/// dx may be null: it is not computed then.
cudaError_t launch_conv_relu_backward(const ConvCall& call, const void* dy, const void* x,
                                      const float* weight, const void* y, void* dx, float* dweight,
                                      float* dbias, void* workspace, cudaStream_t stream);

/// dy, y and argmax [N,P/2,Q/2,K]; the same workspace.
cudaError_t launch_conv_relu_max_pool_backward(const ConvCall& call, const void* dy, const void* x,
                                               const float* weight, const void* y, const uint8_t* argmax,
                                               void* dx, float* dweight, float* dbias, void* workspace,
                                               cudaStream_t stream);

// ---- conv_bn_relu_cuda.cu ------------------------------------------------------------------------

int64_t conv_bn_relu_train_workspace_bytes(const ConvCall& call);

/// z [N,P,Q,K] is the convolution's output; mean and var [K] its statistics. N >= 1.
cudaError_t launch_conv_bn_relu_train(const ConvCall& call, const void* x, const float* weight,
                                      const float* bias, const float* gamma, const float* beta, double eps,
                                      void* y, void* z, float* mean, float* var, void* workspace,
                                      cudaStream_t stream);

int64_t conv_bn_relu_train_backward_workspace_bytes(const ConvCall& call);

cudaError_t launch_conv_bn_relu_train_backward(const ConvCall& call, const void* dy, const void* x,
                                               const float* weight, const void* z, const float* gamma,
                                               const float* beta, const float* mean, const float* var,
                                               double eps, void* dx, float* dweight, float* dgamma,
                                               float* dbeta, void* workspace, cudaStream_t stream);

// ---- conv_bn_relu_conv_relu_cuda.cu --------------------------------------------------------------
// first is the convolution in front of the batch norm, x [N,H,W,C] -> z [N,P,Q,K]; the second takes z's
// pixels with padding2 to K2 channels, y [N,P2,Q2,K2]; pooled, where argmax is not null, y and argmax
// [N,P2/2,Q2/2,K2].

int64_t conv_bn_relu_conv_relu_workspace_bytes(const ConvCall& first, int64_t K2, int64_t padding2);

/// N >= 1.
cudaError_t launch_conv_bn_relu_conv_relu(const ConvCall& first, int64_t K2, int64_t padding2, const void* x,
                                          const float* weight1, const float* bias1, const float* gamma,
                                          const float* beta, const float* weight2, const float* bias2,
                                          double eps, void* y, uint8_t* argmax, void* z, float* mean,
                                          float* var, void* workspace, cudaStream_t stream);

int64_t conv_bn_relu_conv_relu_backward_workspace_bytes(const ConvCall& first, int64_t K2, int64_t padding2);

/// dx may be null: it is not computed then. bias1's gradient is zero.
cudaError_t launch_conv_bn_relu_conv_relu_backward(
    const ConvCall& first, int64_t K2, int64_t padding2, const void* dy, const void* x, const float* weight1,
    const float* gamma, const float* beta, const float* weight2, const void* y, const uint8_t* argmax,
    const void* z, const float* mean, const float* var, double eps, void* dx, float* dweight1, float* dgamma,
    float* dbeta, float* dweight2, float* dbias2, void* workspace, cudaStream_t stream);

}  // namespace maskcore
