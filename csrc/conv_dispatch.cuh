// From a call's types to a kernel's, and the pieces of its workspace.
#pragma once

#include <cstdint>

#include "conv_halo_tile.cuh"
#include "conv_weight_gradient.cuh"

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

/// dx where it is asked for, dweight and, unless null, dbias, of a gradient source at the convolution's
/// output.
template <class T, class Math, class Gradient>
cudaError_t convolve_backward(const ConvCall& call, const Gradient& gradient, const T* x, const float* weight,
                              T* dx, float* dweight, float* dbias, Pieces workspace, cudaStream_t stream) {
  const ConvSize &s = call.size, back = s.backward_data();
  void* const packed = workspace.take<unsigned char>(packed_filter_bytes(back.C, back.K));
  void* const sums = workspace.take<unsigned char>(weight_gradient_bytes(s.C, s.K));
  if (dx != nullptr && s.N > 0) {
    const StoreOutput<T, false> output{.y = dx,
                                       .bias = nullptr,
                                       .P = static_cast<int>(s.H),
                                       .Q = static_cast<int>(s.W),
                                       .K = static_cast<int>(s.C),
                                       .aligned = aligned(dx, s.C),
                                       .moments = nullptr,
                                       .counts = nullptr};
    const cudaError_t error =
        convolve<Math>(call, back, gradient, output, weight, /*turned=*/true, packed, stream);
    if (error != cudaSuccess) return error;
  }
  return weight_gradient<Math>(s, activation(s, x), gradient, dweight, dbias, sums, stream);
}

inline int64_t backward_bytes(const ConvSize& s) {
  return round_up(packed_filter_bytes(s.K, s.C), 256) + round_up(weight_gradient_bytes(s.C, s.K), 256);
}

}  // namespace maskcore
