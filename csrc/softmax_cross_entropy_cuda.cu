// softmax_cross_entropy: loss = mean over n of log(sum over k of exp(logits[n,k])) - logits[n,target[n]],
// with the largest logit taken out of the exponent first; dlogits[n,k] = dloss (p[n,k] - [k == target[n]]) /
// N. The forward pass is one block, so that the loss needs neither a second kernel nor an atomic addition,
// and is the same bits in every run: 1, 2, 4 .. or 32 lanes of a warp, the next power of two of K, own a
// sample; their sums are butterflies of shuffles, and the samples' losses are added in double in an order
// that N and K decide. A target that is no class gives NaN: the device cannot raise an error without a stop.
//
// A classifier's logits are some KB, so what counts is the start, not the bandwidth. At most 64 registers
// with the 1,024 threads of the block (all of the SM's), 256 bytes of shared memory.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "cuda_launchers.h"
#include "launch.cuh"

namespace maskcore {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kWarps = kMaxThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kBackwardThreads = 256;

__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000u); }

__global__ void __launch_bounds__(kMaxThreads, 1)
    softmax_cross_entropy_kernel(const float* __restrict__ logits, const int64_t* __restrict__ target,
                                 int64_t N, int64_t K, int lanes, float* __restrict__ loss,
                                 float* __restrict__ probabilities) {
  double* warp_total = dynamic_shared<double>();  // [kWarps]
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread & (lanes - 1), samples = threads / lanes;
  double total = 0.0;
  // All lanes of a warp stay for the shuffles; those without a sample repeat the last one and count nothing.
  for (int64_t first = 0; first < N; first += samples) {
    const int64_t wanted = first + thread / lanes, n = min(wanted, N - 1);
    const float* x = logits + n * K;
    float largest = -__uint_as_float(0x7f800000u);
    for (int64_t k = lane; k < K; k += lanes) largest = fmaxf(largest, x[k]);
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
    }
    float sum = 0.0f;
    for (int64_t k = lane; k < K; k += lanes) sum += expf(x[k] - largest);
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
    }
    if (wanted < N) {
      float* p = probabilities + n * K;
      for (int64_t k = lane; k < K; k += lanes) p[k] = expf(x[k] - largest) / sum;
      if (lane == 0) {
        const int64_t k = target[n];
        const bool known = k >= 0 && k < K;
        total += known ? static_cast<double>(logf(sum)) + largest - x[k] : not_a_number();
      }
    }
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    total += __shfl_xor_sync(kAllLanes, total, distance);
  }
  if (thread % 32 == 0) warp_total[thread / 32] = total;
  __syncthreads();
  if (thread == 0) {
    for (int warp = 1; warp < threads / 32; ++warp) total += warp_total[warp];
    *loss = static_cast<float>(total / static_cast<double>(N));
  }
}

__global__ void __launch_bounds__(kBackwardThreads)
    softmax_cross_entropy_backward_kernel(const float* __restrict__ dloss,
                                          const float* __restrict__ probabilities,
                                          const int64_t* __restrict__ target, int64_t N, int64_t K,
                                          float* __restrict__ dlogits) {
  const float scale = *dloss / static_cast<float>(N);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBackwardThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBackwardThreads + threadIdx.x; i < N * K; i += step) {
    const int64_t n = i / K, k = i - n * K, wanted = target[n];
    const bool known = wanted >= 0 && wanted < K;
    dlogits[i] = known ? scale * (probabilities[i] - (k == wanted ? 1.0f : 0.0f)) : not_a_number();
  }
}

/// The next power of two, at most a warp.
int lanes_of(int64_t K) {
  int lanes = 1;
  while (lanes < K && lanes < 32) lanes *= 2;
  return lanes;
}

bool is_addressable(int64_t N, int64_t K) {
  return K == 0 || N <= std::numeric_limits<int64_t>::max() / 8 / K;
}

}  // namespace

cudaError_t launch_softmax_cross_entropy(const float* logits, const int64_t* target, int64_t N, int64_t K,
                                         float* loss, float* probabilities, cudaStream_t stream) {
  if (N < 1 || K < 1 || !is_addressable(N, K)) return cudaErrorInvalidValue;
  const int lanes = lanes_of(K);
  const int64_t warps = (N + 32 / lanes - 1) / (32 / lanes);
  const unsigned threads = 32 * static_cast<unsigned>(std::min<int64_t>(warps, kWarps));
  return launch(softmax_cross_entropy_kernel, dim3(1), dim3(threads), kWarps * sizeof(double), stream, logits,
                target, N, K, lanes, loss, probabilities);
}

cudaError_t launch_softmax_cross_entropy_backward(const float* dloss, const float* probabilities,
                                                  const int64_t* target, int64_t N, int64_t K, float* dlogits,
                                                  cudaStream_t stream) {
  if (N * K == 0) return cudaSuccess;
  if (!is_addressable(N, K)) return cudaErrorInvalidValue;
  const int64_t blocks = std::min<int64_t>((N * K - 1) / kBackwardThreads + 1, 65535);
  return launch(softmax_cross_entropy_backward_kernel, dim3(static_cast<unsigned>(blocks)),
                dim3(kBackwardThreads), 0, stream, dloss, probabilities, target, N, K, dlogits);
}

}  // namespace maskcore
