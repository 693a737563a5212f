// The gradients of conv_relu and conv_relu_max_pool on CUDA: with g the gradient in front of the ReLU
// (and of the pool), which conv_sources.cuh computes while it loads,
//   dx = conv(g, turned weight), padding 2 - padding;  dweight, dbias: conv_weight_gradient.cuh
#include "conv_dispatch.cuh"
#include "cuda_launchers.h"

namespace maskcore {

int64_t conv_relu_backward_workspace_bytes(const ConvCall& call) { return backward_bytes(call); }

cudaError_t launch_conv_relu_backward(const ConvCall& call, const void* dy, const void* x,
                                      const float* weight, const void* y, void* dx, float* dweight,
                                      float* dbias, void* workspace, cudaStream_t stream) {
  return dispatch(call, [&]<class T, class Math>() {
    const auto gradient =
        relu_gradient_source(call.size, static_cast<const T*>(dy), static_cast<const T*>(y));
    return convolve_backward<T, Math>(call, gradient, static_cast<const T*>(x), weight, static_cast<T*>(dx),
                                      dweight, dbias, {static_cast<unsigned char*>(workspace)}, stream);
  });
}

cudaError_t launch_conv_relu_max_pool_backward(const ConvCall& call, const void* dy, const void* x,
                                               const float* weight, const void* y, const uint8_t* argmax,
                                               void* dx, float* dweight, float* dbias, void* workspace,
                                               cudaStream_t stream) {
  return dispatch(call, [&]<class T, class Math>() {
    const auto gradient =
        pooled_relu_gradient_source(call.size, static_cast<const T*>(dy), static_cast<const T*>(y), argmax);
    return convolve_backward<T, Math>(call, gradient, static_cast<const T*>(x), weight, static_cast<T*>(dx),
                                      dweight, dbias, {static_cast<unsigned char*>(workspace)}, stream);
  });
}

}  // namespace maskcore
