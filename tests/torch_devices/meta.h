// csrc/ops_cuda.cpp on tensors of torch's meta device, which have sizes of any kind and no memory: included
// in front of it by __init__.py. Launches are recorded by the emulator, not run.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace maskcore {
namespace {

int capability = 80;  // ten times that of the GPU that is made up

bool on_gpu(const torch::stable::Tensor& tensor) { return !tensor.is_cpu(); }
int32_t gpu_of(const torch::stable::Tensor& tensor) { return on_gpu(tensor) ? 0 : -1; }

struct Guard {
  explicit Guard(int32_t) {}
};

cudaError_t gpu_attribute(int* value, cudaDeviceAttr which, int device) {
  const cudaError_t error = cudaDeviceGetAttribute(value, which, device);
  if (which == cudaDevAttrComputeCapabilityMajor) *value = capability / 10;
  if (which == cudaDevAttrComputeCapabilityMinor) *value = capability % 10;
  return error;
}

}  // namespace
}  // namespace maskcore

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

void meta_device_set_capability(int tenfold) { maskcore::capability = tenfold; }

}  // extern "C"
