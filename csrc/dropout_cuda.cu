// dropout: y[i] = 0 with probability p, else x[i] / (1 - p). The decision about element i is a function of
// the seed and i (philox.h), the same on every device; backward is the same function of dy, so that no mask
// is stored. The seed lies in device memory: a captured graph drops other elements once another seed is
// written there.
//
// A thread owns 8 elements, what one Philox call decides: two 16-byte loads and stores of float32, one of
// bfloat16. Bound by memory (8 or 4 bytes an element) next to 10 rounds of 2 wide products, about 20
// instructions an element. At most 64 registers, 4 blocks of 256 threads (65,536 registers); no shared
// memory.
#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda_launchers.h"
#include "elements.cuh"
#include "launch.cuh"
#include "philox.h"

namespace maskcore {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSM = 4;

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    dropout_kernel(const T* __restrict__ x, const int64_t* __restrict__ seed, int64_t size,
                   uint64_t threshold, float scale, bool aligned, T* __restrict__ y) {
  constexpr int kElements = DropoutMask::kElements, kLanes = kLanesOf16Bytes<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, begin = i * kElements;
  if (begin >= size) return;
  const DropoutMask mask = DropoutMask::of(*seed, i);
  const auto drop = [&](T value, int element) {
    return mask.keeps(element, threshold) ? from_float<T>(to_float(value) * scale) : T{};
  };
  if (aligned && begin + kElements <= size) {
#pragma unroll
    for (int first = 0; first < kElements; first += kLanes) {
      auto values = Elements<T, kLanes>::load(x + begin + first);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) values.v[lane] = drop(values.v[lane], first + lane);
      values.store(y + begin + first);
    }
  } else {
#pragma unroll
    for (int element = 0; element < kElements; ++element) {
      if (begin + element < size) y[begin + element] = drop(x[begin + element], element);
    }
  }
}

template <class T>
cudaError_t launch_dropout_of(const void* x, const int64_t* seed, int64_t size, double p, void* y,
                              cudaStream_t stream) {
  const int64_t blocks = (size - 1) / (kThreads * DropoutMask::kElements) + 1;
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidValue;
  const uint64_t threshold = static_cast<uint64_t>(std::llround(p * 4294967296.0));
  return launch(dropout_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream,
                static_cast<const T*>(x), seed, size, threshold, static_cast<float>(1.0 / (1.0 - p)),
                is_aligned(x, 16) && is_aligned(y, 16), static_cast<T*>(y));
}

}  // namespace

cudaError_t launch_dropout(const void* x, const int64_t* seed, DataType dtype, int64_t size, double p,
                           void* y, cudaStream_t stream) {
  if (size == 0) return cudaSuccess;
  if (dtype == DataType::kFloat32) return launch_dropout_of<float>(x, seed, size, p, y, stream);
  return launch_dropout_of<bf16_bits>(x, seed, size, p, y, stream);
}

}  // namespace maskcore
