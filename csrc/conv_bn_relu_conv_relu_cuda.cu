// conv_bn_relu_conv_relu on CUDA: a block's head,
//   z = conv(x, weight1) + bias1;  y1 = max(batch_norm(z), 0);  y = max(conv(y1, weight2) + bias2, 0)
//   [pooled]
// without y1 in memory: the second convolution and its filter's gradient compute it while they load z
// (BatchNormRelu), and the second's backward-data gives y1's gradient behind the ReLU with the sums that the
// batch norm's gradient needs (ReluSumsOutput). Formulas: batch_norm.cuh.
#include "conv_moments.cuh"
#include "cuda_launchers.h"

namespace maskcore {
namespace {

struct ForwardWorkspace {
  TrainWorkspace first;
  float* coefficients;
  void* packed;
  int64_t bytes;

  ForwardWorkspace(const ConvCall& first_call, const ConvSize& second, void* memory)
      : first(first_call, memory) {
    Pieces pieces{static_cast<unsigned char*>(memory), first.bytes};
    coefficients = pieces.take<float>(3 * padded_channels(first_call.size.K));
    packed = pieces.take<unsigned char>(packed_filter_bytes(second.C, second.K));
    bytes = pieces.used;
  }
};

struct BackwardWorkspace {
  void* g;                       // [N,P,Q,K] of the first convolution's output
  float* coefficients;           // BatchNormRelu's
  float* gradient_coefficients;  // BatchNormReluGradient's
  float* moments;
  int* counts;
  double2* parts;
  Pieces rest;  // of one convolution after the other
  int64_t tiles, bytes;

  BackwardWorkspace(const ConvCall& first, const ConvCall& second, void* memory)
      : rest{static_cast<unsigned char*>(memory)} {
    const int64_t K = first.size.K;
    tiles = tiles_of(second.size.backward_data(), /*of_pictures=*/false);
    const int64_t element = first.dtype == DataType::kBfloat16 ? 2 : 4;
    g = rest.take<unsigned char>(element * first.size.N * first.size.P * first.size.Q * K);
    coefficients = rest.take<float>(3 * padded_channels(K));
    gradient_coefficients = rest.take<float>(5 * padded_channels(K));
    moments = rest.take<float>(tiles * 3 * K);
    counts = rest.take<int>(tiles);
    parts = rest.take<double2>(moment_parts(tiles) * K);
    bytes = rest.used + std::max(backward_bytes(first), backward_bytes(second));
  }
};

/// BatchNormRelu's coefficients of `channels`, zeros from K on.
__global__ void __launch_bounds__(kNormThreads, 6)
    coefficients_kernel(const float* gamma, const float* beta, const float* mean, const float* var,
                        double eps, int K, int channels, float* coefficients) {
  const int k = static_cast<int>(blockIdx.x * kNormThreads + threadIdx.x);
  if (k >= channels) return;
  float* const of = coefficients_of<3>(coefficients, k);
  of[0] = k < K ? mean[k] : 0.0f;
  of[kCoefficientGroup] = k < K ? scale_of(gamma[k], var[k], eps) : 0.0f;
  of[2 * kCoefficientGroup] = k < K ? beta[k] : 0.0f;
}

cudaError_t launch_coefficients(const float* gamma, const float* beta, const float* mean, const float* var,
                                double eps, int64_t K, float* coefficients, cudaStream_t stream) {
  const int channels = static_cast<int>(padded_channels(K));
  return launch(&coefficients_kernel, dim3(channel_blocks(channels, kNormThreads)), dim3(kNormThreads), 0,
                stream, gamma, beta, mean, var, eps, static_cast<int>(K), channels, coefficients);
}

/// The second convolution, of the first one's output.
ConvCall second_call(const ConvCall& first, int64_t K, int64_t padding) {
  const ConvSize& s = first.size;
  ConvCall second = first;
  second.size = {.N = s.N, .H = s.P, .W = s.Q, .C = s.K, .K = K, .padding = padding};
  return second;
}

template <class T>
BatchNormRelu<T> normalised(const ConvSize& first, const void* z, const float* coefficients) {
  const T* const data = static_cast<const T*>(z);
  return {.z = data,
          .coefficients = coefficients,
          .H = static_cast<int>(first.P),
          .W = static_cast<int>(first.Q),
          .C = static_cast<int>(first.K),
          .aligned = aligned(data, first.K)};
}

}  // namespace

int64_t conv_bn_relu_conv_relu_workspace_bytes(const ConvCall& first, int64_t K2, int64_t padding2) {
  return ForwardWorkspace(first, second_call(first, K2, padding2).size, nullptr).bytes;
}

int64_t conv_bn_relu_conv_relu_backward_workspace_bytes(const ConvCall& first, int64_t K2, int64_t padding2) {
  return BackwardWorkspace(first, second_call(first, K2, padding2), nullptr).bytes;
}

cudaError_t launch_conv_bn_relu_conv_relu(const ConvCall& first, int64_t K2, int64_t padding2, const void* x,
                                          const float* weight1, const float* bias1, const float* gamma,
                                          const float* beta, const float* weight2, const float* bias2,
                                          double eps, void* y, uint8_t* argmax, void* z, float* mean,
                                          float* var, void* workspace, cudaStream_t stream) {
  return dispatch(first, [&]<class T, class Math>() {
    const ConvCall second = second_call(first, K2, padding2);
    const ConvSize& s = second.size;
    const ForwardWorkspace room(first, s, workspace);
    cudaError_t error = convolve_with_moments<Math>(first, static_cast<const T*>(x), weight1, bias1, gamma,
                                                    eps, static_cast<T*>(z), mean, var, room.first, stream);
    if (error != cudaSuccess) return error;
    error = launch_coefficients(gamma, beta, mean, var, eps, first.size.K, room.coefficients, stream);
    if (error != cudaSuccess) return error;
    const auto source = normalised<T>(first.size, z, room.coefficients);
    T* const y_data = static_cast<T*>(y);
    if (argmax == nullptr) {
      return convolve<Math>(second, s, source, relu_output(s, y_data, bias2), weight2, /*turned=*/false,
                            room.packed, stream);
    }
    if (s.P < 2 || s.Q < 2) return cudaSuccess;
    return convolve<Math>(second, s, source, max_pool_output(s, y_data, argmax, bias2), weight2,
                          /*turned=*/false, room.packed, stream);
  });
}

cudaError_t launch_conv_bn_relu_conv_relu_backward(
    const ConvCall& first, int64_t K2, int64_t padding2, const void* dy, const void* x, const float* weight1,
    const float* gamma, const float* beta, const float* weight2, const void* y, const uint8_t* argmax,
    const void* z, const float* mean, const float* var, double eps, void* dx, float* dweight1, float* dgamma,
    float* dbeta, float* dweight2, float* dbias2, void* workspace, cudaStream_t stream) {
  return dispatch(first, [&]<class T, class Math>() {
    const ConvCall second = second_call(first, K2, padding2);
    const ConvSize &s1 = first.size, &s2 = second.size;
    const BackwardWorkspace room(first, second, workspace);
    const int K = static_cast<int>(s1.K), channels = static_cast<int>(padded_channels(s1.K));
    cudaError_t error = launch_coefficients(gamma, beta, mean, var, eps, s1.K, room.coefficients, stream);
    if (error != cudaSuccess) return error;

    T* const g = static_cast<T*>(room.g);
    const auto source = normalised<T>(s1, z, room.coefficients);
    const ReluSumsOutput<T> output{.g = g,
                                   .z = source.z,
                                   .coefficients = room.coefficients,
                                   .P = source.H,
                                   .Q = source.W,
                                   .K = K,
                                   .aligned = aligned(g, s1.K) && source.aligned,
                                   .moments = room.moments,
                                   .counts = room.counts};
    const T *const dy_data = static_cast<const T*>(dy), *const y_data = static_cast<const T*>(y);
    const auto second_backward = [&](const auto& gradient) {
      return convolve_backward<Math>(second, gradient, source, weight2, &output, dweight2, dbias2, room.rest,
                                     stream);
    };
    error = argmax == nullptr ? second_backward(relu_gradient_source(s2, dy_data, y_data))
                              : second_backward(pooled_relu_gradient_source(s2, dy_data, y_data, argmax));
    if (error != cudaSuccess) return error;

    error = add_moments(room.moments, room.counts, room.tiles, s1.K, room.parts, stream);
    if (error != cudaSuccess) return error;
    const int64_t parts = moment_parts(room.tiles), pixels = s1.N * s1.P * s1.Q;
    error = launch(&finish_gradients_kernel<double2>, dim3(channel_blocks(channels, kChannelThreads)),
                   dim3(kChannelThreads, kGroupThreads), kAddBytes, stream, room.parts,
                   static_cast<int>(parts), static_cast<double>(pixels), gamma, beta, mean, var, eps, K,
                   channels, dgamma, dbeta, room.gradient_coefficients);
    if (error != cudaSuccess) return error;
    // g has passed the ReLU already; that it passes it again changes nothing.
    const BatchNormReluGradient<T> gradient{.dy = g,
                                            .z = source.z,
                                            .coefficients = room.gradient_coefficients,
                                            .H = source.H,
                                            .W = source.W,
                                            .C = K,
                                            .aligned = output.aligned};
    return convolve_backward<T, Math>(first, gradient, static_cast<const T*>(x), weight1, static_cast<T*>(dx),
                                      dweight1, /*dbias=*/nullptr, room.rest, stream);
  });
}

}  // namespace maskcore
