// From a call's types to a kernel's, and the pieces of its workspace.
#pragma once

#include <cstdint>

#include "conv_first_layer.cuh"
#include "conv_halo_tile.cuh"
#include "conv_halo_wgmma.cuh"
#include "conv_weight_gradient.cuh"
#include "conv_weight_gradient_wgmma.cuh"

namespace maskcore {

/// f.operator()<T, Math>() with the tensors' type and how they are multiplied.
template <class F>
cudaError_t dispatch(const ConvCall& call, F f) {
  if (call.dtype == DataType::kBfloat16) return f.template operator()<bf16, Bf16>();
  switch (call.precision) {
    case Precision::kIeee:
      return f.template operator()<float, Ieee>();
    case Precision::kTf32:
      return f.template operator()<float, Tf32>();
    case Precision::kBf16:
      return f.template operator()<float, Bf16>();
  }
  return cudaErrorInvalidValue;
}

/// Memory handed out from a workspace, 256 bytes aligned; without memory it only counts.
struct Pieces {
  unsigned char* memory;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    unsigned char* const piece = memory == nullptr ? nullptr : memory + used;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return reinterpret_cast<T*>(piece);
  }
};

inline bool lies_on(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

/// Whether 16-byte accesses to a tensor [..,channels] of T are aligned.
template <class T>
bool aligned(const T* tensor, int64_t channels) {
  return lies_on(tensor, 16) && channels * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

template <class T>
Activation<T> activation(const ConvSize& s, const T* x) {
  return {.x = x,
          .H = static_cast<int>(s.H),
          .W = static_cast<int>(s.W),
          .C = static_cast<int>(s.C),
          .aligned = aligned(x, s.C)};
}

/// A convolution of whatever a source gives, by the products that the device has.
template <class Math, class Source, class Epilogue>
cudaError_t convolve(const ConvCall& call, const ConvSize& s, const Source& source, const Epilogue& epilogue,
                     const float* weight, bool turned, void* packed, cudaStream_t stream) {
  const auto conv = halo_convolution(s, source, epilogue, packed);
  if (conv.tiling.tiles == 0) return cudaErrorInvalidValue;
  if constexpr (Math::kFragments && !kConverts<Math, Source>) {
    if (call.wgmma && s.K > 32) return convolve_halo_wgmma<Math>(call, s, weight, turned, conv, stream);
  }
  return convolve_halo_tile<Math>(call, s, weight, turned, conv, stream);
}

/// The convolution of a tensor: that of pictures has a kernel of its own.
template <class Math, class T, class Epilogue>
cudaError_t convolve_forward(const ConvCall& call, const T* x, const Epilogue& epilogue, const float* weight,
                             void* packed, cudaStream_t stream) {
  const Activation<T> source = activation(call.size, x);
  if (call.size.C <= kPictureChannels) {
    return convolve_first_layer<Math>(call, call.size, source, epilogue, weight, stream);
  }
  return convolve<Math>(call, call.size, source, epilogue, weight, /*turned=*/false, packed, stream);
}

template <class T>
StoreOutput<T, true> relu_output(const ConvSize& s, T* y, const float* bias) {
  return {.y = y,
          .bias = bias,
          .P = static_cast<int>(s.P),
          .Q = static_cast<int>(s.Q),
          .K = static_cast<int>(s.K),
          .aligned = aligned(y, s.K),
          .moments = nullptr,
          .counts = nullptr};
}

template <class T>
MaxPoolOutput<T> max_pool_output(const ConvSize& s, T* y, uint8_t* argmax, const float* bias) {
  return {.y = y,
          .argmax = argmax,
          .bias = bias,
          .P = static_cast<int>(s.P / 2 * 2),
          .Q = static_cast<int>(s.Q / 2 * 2),
          .K = static_cast<int>(s.K),
          .aligned = aligned(y, s.K) && lies_on(argmax, 4)};
}

template <class T>
ReluGradient<T> relu_gradient_source(const ConvSize& s, const T* dy, const T* y) {
  return {.dy = dy,
          .y = y,
          .H = static_cast<int>(s.P),
          .W = static_cast<int>(s.Q),
          .C = static_cast<int>(s.K),
          .aligned = aligned(dy, s.K) && aligned(y, s.K)};
}

template <class T>
PooledReluGradient<T> pooled_relu_gradient_source(const ConvSize& s, const T* dy, const T* y,
                                                  const uint8_t* argmax) {
  return {.dy = dy,
          .y = y,
          .argmax = argmax,
          .H = static_cast<int>(s.P),
          .W = static_cast<int>(s.Q),
          .C = static_cast<int>(s.K),
          .aligned = aligned(dy, s.K) && aligned(y, s.K) && lies_on(argmax, 4)};
}

/// What a gradient source at the convolution's output gives: dx, to `output` unless that is null, dweight
/// and, unless null, dbias.
template <class Math, class Source, class Gradient, class Output>
cudaError_t convolve_backward(const ConvCall& call, const Gradient& gradient, const Source& x,
                              const float* weight, const Output* output, float* dweight, float* dbias,
                              Pieces workspace, cudaStream_t stream) {
  const ConvSize &s = call.size, back = s.backward_data();
  void* const packed = workspace.take<unsigned char>(packed_filter_bytes(back.C, back.K));
  void* const sums = workspace.take<unsigned char>(weight_gradient_bytes(call));
  if (output != nullptr && s.N > 0) {
    const cudaError_t error =
        convolve<Math>(call, back, gradient, *output, weight, /*turned=*/true, packed, stream);
    if (error != cudaSuccess) return error;
  }
  if constexpr (Source::kPlain) {
    if (s.C <= kPictureChannels) {
      return first_layer_gradient<Math>(call, x, gradient, dweight, dbias, sums, stream);
    }
  }
  if constexpr (std::is_same_v<typename Source::Element, bf16>) {
    if (call.wgmma && is_wide(s)) {
      return weight_gradient_wgmma(call, x, gradient, dweight, dbias, sums, stream);
    }
  }
  return weight_gradient<Math>(call, x, gradient, dweight, dbias, sums, stream);
}

/// The same of tensors; dx may be null.
template <class T, class Math, class Gradient>
cudaError_t convolve_backward(const ConvCall& call, const Gradient& gradient, const T* x, const float* weight,
                              T* dx, float* dweight, float* dbias, const Pieces& workspace,
                              cudaStream_t stream) {
  const ConvSize& s = call.size;
  const StoreOutput<T, false> output{.y = dx,
                                     .bias = nullptr,
                                     .P = static_cast<int>(s.H),
                                     .Q = static_cast<int>(s.W),
                                     .K = static_cast<int>(s.C),
                                     .aligned = aligned(dx, s.C),
                                     .moments = nullptr,
                                     .counts = nullptr};
  return convolve_backward<Math>(call, gradient, activation(s, x), weight, dx == nullptr ? nullptr : &output,
                                 dweight, dbias, workspace, stream);
}

inline int64_t backward_bytes(const ConvCall& call) {
  const ConvSize& s = call.size;
  return round_up(packed_filter_bytes(s.K, s.C), 256) + round_up(weight_gradient_bytes(call), 256);
}

}  // namespace maskcore
