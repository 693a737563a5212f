// 16 bytes of adjacent elements, and the way from an element to the float that is computed with and back.
#pragma once

#include <cstdint>

#include "tensor_core.cuh"

namespace maskcore {

using bf16_bits = uint16_t;  // a bfloat16 as it lies in memory

template <class T>
constexpr int kLanesOf16Bytes = 16 / static_cast<int>(sizeof(T));

/// kLanes elements that are loaded and stored at once.
template <class T, int kLanes>
struct alignas(kLanes * sizeof(T)) Elements {
  T v[kLanes];

  static __device__ __forceinline__ Elements load(const T* p) {
    return *reinterpret_cast<const Elements*>(p);
  }
  __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<Elements*>(p) = *this; }
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16_bits x) {
  return __uint_as_float(static_cast<uint32_t>(x) << 16);
}

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16_bits from_float<bf16_bits>(float x) {
  return static_cast<bf16_bits>(pack_bf16(x, 0.0f) & 0xffffu);
}

inline bool is_aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace maskcore
