// csrc/ops_cuda.cpp on the device of emulated.cpp: included in front of it by __init__.py.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <exception>

void emulated_device_begin_call(int index);
void emulated_device_end_call(bool failed);

namespace maskcore {
namespace {

bool on_gpu(const torch::stable::Tensor& tensor) { return !tensor.is_cpu(); }
int32_t gpu_of(const torch::stable::Tensor& tensor) {
  return on_gpu(tensor) ? tensor.get_device_index() : -1;
}

struct Guard {
  explicit Guard(int32_t index) { emulated_device_begin_call(index); }
  Guard(const Guard&) = delete;
  ~Guard() noexcept(false) { emulated_device_end_call(std::uncaught_exceptions() > 0); }
};

// Index 0: compute capability 8.0, index 1: 9.0.
cudaError_t gpu_attribute(int* value, cudaDeviceAttr which, int device) {
  const cudaError_t error = cudaDeviceGetAttribute(value, which, device);
  if (which == cudaDevAttrComputeCapabilityMajor) *value = 8 + device;
  if (which == cudaDevAttrMaxSharedMemoryPerMultiprocessor && device == 1) *value = 228 * 1024;
  return error;
}

}  // namespace
}  // namespace maskcore

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
