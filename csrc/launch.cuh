// The one way to start a kernel, and the one way to its dynamic shared memory. Under MASKCORE_CUDA_EMULATION
// both come from tests/cuda_emulator, which runs the kernel's own source on the host.
#pragma once

#ifdef MASKCORE_CUDA_EMULATION
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>

#include <cstddef>
#include <type_traits>

namespace maskcore {

// The block's dynamic shared memory, as much as launch() was given; its contents are unknown at the start.
// Swizzles may be computed from offsets alone: 128 bytes are a line of all banks, and wgmma's patterns repeat
// after at most 1024.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

// Above this a kernel must be allowed its shared memory by name.
constexpr size_t kSharedBytesWithoutAsking = 48 * 1024;

// kernel<<<grid, block, shared_bytes, stream>>>(parameters...). Returns what went wrong at the start, such as
// a grid with an empty side or more shared memory than the processor has. Never waits; may be captured.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, std::type_identity_t<Parameters>... parameters) {
  if (shared_bytes > kSharedBytesWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(parameters...);
  // clang-format on
  return cudaGetLastError();
}

}  // namespace maskcore
#endif
