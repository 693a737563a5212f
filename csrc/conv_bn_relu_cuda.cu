// conv_bn_relu_train on CUDA: z = conv(x, weight) + bias with each tile's moments from the convolution's
// epilogue, which are merged to the batch's mean and variance; y = max(batch_norm(z), 0) in a pass over z.
// Backward: the two sums that batch normalisation's gradient needs in a pass over dy and z; its gradient dz
// is then computed while the convolution's two gradients load it, and never written. Formulas:
// batch_norm.cuh.
#include "conv_moments.cuh"
#include "cuda_launchers.h"

namespace maskcore {
namespace {

struct BackwardWorkspace {
  float* coefficients;
  float2* parts;
  Pieces rest;
  int64_t bytes;

  BackwardWorkspace(const ConvCall& call, void* memory) : rest{static_cast<unsigned char*>(memory)} {
    const ConvSize& s = call.size;
    coefficients = rest.take<float>(5 * padded_channels(s.K));
    parts = rest.take<float2>(gradient_parts(s.N * s.P * s.Q) * s.K);
    bytes = rest.used + backward_bytes(call);
  }
};

}  // namespace

int64_t conv_bn_relu_train_workspace_bytes(const ConvCall& call) {
  return TrainWorkspace(call, nullptr).bytes;
}

int64_t conv_bn_relu_train_backward_workspace_bytes(const ConvCall& call) {
  return BackwardWorkspace(call, nullptr).bytes;
}

cudaError_t launch_conv_bn_relu_train(const ConvCall& call, const void* x, const float* weight,
                                      const float* bias, const float* gamma, const float* beta, double eps,
                                      void* y, void* z, float* mean, float* var, void* workspace,
                                      cudaStream_t stream) {
  return dispatch(call, [&]<class T, class Math>() {
    const ConvSize& s = call.size;
    const TrainWorkspace room(call, workspace);
    const int K = static_cast<int>(s.K);
    T *const z_data = static_cast<T*>(z), *const y_data = static_cast<T*>(y);
    const cudaError_t error = convolve_with_moments<Math>(call, static_cast<const T*>(x), weight, bias, gamma,
                                                          eps, z_data, mean, var, room, stream);
    if (error != cudaSuccess) return error;

    const int64_t pixels = s.N * s.P * s.Q;
    const auto rows = ChannelRows<T, 16 / sizeof(T)>::of(s.K);
    const int64_t ranges = std::clamp<int64_t>(pixels / 64, 1, 16384), size = (pixels + ranges - 1) / ranges;
    return launch(&apply_batch_norm_kernel<T>, rows.grid(ranges), dim3(kNormThreads), 0, stream, z_data, mean,
                  room.scale, beta, pixels, size, K, aligned(z_data, s.K) && aligned(y_data, s.K), rows,
                  y_data);
  });
}

cudaError_t launch_conv_bn_relu_train_backward(const ConvCall& call, const void* dy, const void* x,
                                               const float* weight, const void* z, const float* gamma,
                                               const float* beta, const float* mean, const float* var,
                                               double eps, void* dx, float* dweight, float* dgamma,
                                               float* dbeta, void* workspace, cudaStream_t stream) {
  return dispatch(call, [&]<class T, class Math>() {
    const ConvSize& s = call.size;
    const BackwardWorkspace room(call, workspace);
    const int K = static_cast<int>(s.K);
    const T *const dy_data = static_cast<const T*>(dy), *const z_data = static_cast<const T*>(z);
    const bool vectors = aligned(dy_data, s.K) && aligned(z_data, s.K);
    const int64_t pixels = s.N * s.P * s.Q, parts = gradient_parts(pixels),
                  size = (pixels + parts - 1) / parts;
    const auto rows = ChannelRows<T, 16 / sizeof(T)>::of(s.K);
    cudaError_t error = launch(&add_gradients_kernel<T>, rows.grid(parts), dim3(kNormThreads),
                               kNormThreads * (16 / sizeof(T)) * sizeof(float2), stream, dy_data, z_data,
                               gamma, beta, mean, var, eps, pixels, size, K, vectors, rows, room.parts);
    if (error != cudaSuccess) return error;
    error =
        launch(&finish_gradients_kernel<float2>, dim3(channel_blocks(padded_channels(s.K), kChannelThreads)),
               dim3(kChannelThreads, kGroupThreads), kAddBytes, stream, room.parts, static_cast<int>(parts),
               static_cast<double>(pixels), gamma, beta, mean, var, eps, K,
               static_cast<int>(padded_channels(s.K)), dgamma, dbeta, room.coefficients);
    if (error != cudaSuccess) return error;

    const BatchNormReluGradient<T> gradient{.dy = dy_data,
                                            .z = z_data,
                                            .coefficients = room.coefficients,
                                            .H = static_cast<int>(s.P),
                                            .W = static_cast<int>(s.Q),
                                            .C = K,
                                            .aligned = vectors};
    return convolve_backward<T, Math>(call, gradient, static_cast<const T*>(x), weight, static_cast<T*>(dx),
                                      dweight, /*dbias=*/nullptr, room.rest, stream);
  });
}

}  // namespace maskcore
