// max_pool on CUDA: y[n,p,q,c] = max over i,j in {0,1} of x[n,2p+i,2q+j,c], with the place of the first
// maximum. One thread an output element, channels fastest, so that a warp reads and writes whole lines.
// Bound by memory: 16 bytes read and 5 written an output; no shared memory. 6 blocks of 256 threads with at
// most 40 registers (6 * 256 * 40 = 61,440 of 65,536) fill the 1,536 threads that an SM of sm_86, 89 and 120
// holds, three quarters of the 2,048 of sm_80, 90 and 100.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <tuple>

#include "shapes.h"

namespace maskcore {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSM = 6;

__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    max_pool_kernel(const float* __restrict__ x, PoolShape s, float* __restrict__ y,
                    uint8_t* __restrict__ argmax) {
  const int64_t out = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (out >= s.N * s.P * s.Q * s.C) return;
  const int64_t c = out % s.C, q = out / s.C % s.Q, p = out / s.C / s.Q % s.P, n = out / s.C / s.Q / s.P;
  float best = 0.0f;
  int place = 0;
  for (int i = 0; i < 4; ++i) {
    const float v = x[((n * s.H + 2 * p + i / 2) * s.W + 2 * q + i % 2) * s.C + c];
    // Not (v <= best) lets a NaN win; best == best keeps the first one.
    if (i == 0 || (!(v <= best) && best == best)) {
      best = v;
      place = i;
    }
  }
  y[out] = best;
  argmax[out] = static_cast<uint8_t>(place);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    max_pool_backward_kernel(const float* __restrict__ dy, const uint8_t* __restrict__ argmax, PoolShape s,
                             float* __restrict__ dx) {
  const int64_t in = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (in >= s.N * s.H * s.W * s.C) return;
  const int64_t c = in % s.C, w = in / s.C % s.W, h = in / s.C / s.W % s.H, n = in / s.C / s.W / s.H;
  float g = 0.0f;
  if (h / 2 < s.P && w / 2 < s.Q) {
    const int64_t out = ((n * s.P + h / 2) * s.Q + w / 2) * s.C + c;
    if (argmax[out] == h % 2 * 2 + w % 2) g = dy[out];
  }
  dx[in] = g;
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

unsigned blocks(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "max_pool could not be launched: ", cudaGetErrorString(error));
}

std::tuple<Tensor, Tensor> max_pool_cuda(const Tensor& x) {
  check_tensor(x, "x", {kAny, kAny, kAny, kAny});
  const PoolShape s{.N = x.size(0), .H = x.size(1), .W = x.size(2), .C = x.size(3)};
  STD_TORCH_CHECK(s.P >= 1 && s.Q >= 1, "x must be at least 2 pixels high and wide, is ", s.H, " x ", s.W);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::new_empty(x, {s.N, s.P, s.Q, s.C});
  Tensor argmax = torch::stable::new_empty(x, {s.N, s.P, s.Q, s.C}, ScalarType::Byte);
  if (y.numel() > 0) {
    max_pool_kernel<<<blocks(y.numel()), kThreads, 0, current_stream(x)>>>(
        x.const_data_ptr<float>(), s, y.mutable_data_ptr<float>(), argmax.mutable_data_ptr<uint8_t>());
    check_launch();
  }
  return {y, argmax};
}

Tensor max_pool_backward_cuda(const Tensor& dy, const Tensor& argmax, int64_t H, int64_t W) {
  check_tensor(dy, "dy", {kAny, H / 2, W / 2, kAny});
  const PoolShape s{.N = dy.size(0), .H = H, .W = W, .C = dy.size(3)};
  check_tensor(argmax, "argmax", {s.N, s.P, s.Q, s.C}, ScalarType::Byte);
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  Tensor dx = torch::stable::new_empty(dy, {s.N, s.H, s.W, s.C});
  if (dx.numel() > 0) {
    max_pool_backward_kernel<<<blocks(dx.numel()), kThreads, 0, current_stream(dy)>>>(
        dy.const_data_ptr<float>(), argmax.const_data_ptr<uint8_t>(), s, dx.mutable_data_ptr<float>());
    check_launch();
  }
  return dx;
}

}  // namespace
}  // namespace maskcore

STABLE_TORCH_LIBRARY_IMPL(maskcore, CUDA, m) {
  m.impl("max_pool", TORCH_BOX(&maskcore::max_pool_cuda));
  m.impl("_max_pool_backward", TORCH_BOX(&maskcore::max_pool_backward_cuda));
}
