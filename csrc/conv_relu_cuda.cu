// conv_relu and conv_relu_max_pool on CUDA, forward:
//   y = max(conv(x, weight) + bias, 0), and its 2x2 max-pool with the place of the first maximum
// The kernel is conv_halo_tile.cuh's; bias, ReLU and the pool are its epilogues (conv_epilogues.cuh).
#include "conv_dispatch.cuh"
#include "cuda_launchers.h"

namespace maskcore {

int64_t conv_relu_workspace_bytes(const ConvCall& call) {
  return packed_filter_bytes(call.size.C, call.size.K);
}

cudaError_t launch_conv_relu(const ConvCall& call, const void* x, const float* weight, const float* bias,
                             void* y, void* workspace, cudaStream_t stream) {
  return dispatch(call, [&]<class T, class Math>() {
    const ConvSize& s = call.size;
    if (s.N == 0) return cudaSuccess;
    const auto output = relu_output(s, static_cast<T*>(y), bias);
    return convolve_forward<Math>(call, static_cast<const T*>(x), output, weight, workspace, stream);
  });
}

cudaError_t launch_conv_relu_max_pool(const ConvCall& call, const void* x, const float* weight,
                                      const float* bias, void* y, uint8_t* argmax, void* workspace,
                                      cudaStream_t stream) {
  return dispatch(call, [&]<class T, class Math>() {
    const ConvSize& s = call.size;
    if (s.N == 0 || s.P < 2 || s.Q < 2) return cudaSuccess;
    const auto output = max_pool_output(s, static_cast<T*>(y), argmax, bias);
    return convolve_forward<Math>(call, static_cast<const T*>(x), output, weight, workspace, stream);
  });
}

}  // namespace maskcore
