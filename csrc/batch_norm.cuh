// Batch normalisation around a convolution (Ioffe & Szegedy 2015), M = N*P*Q pixels, a channel:
//   forward   mean = sum(z) / M;  var = sum((z - mean)^2) / M;  y = max(scale (z - mean) + beta, 0)
//             scale = gamma / sqrt(var + eps)
//   backward  g = dy where scale (z - mean) + beta > 0, else 0
//             dbeta = sum(g);  dgamma = inv_std sum(g (z - mean)),  inv_std = 1 / sqrt(var + eps)
// All of it is bound by memory: one pass over z forward (the sums of a tile are taken in the convolution's
// epilogue while they are in registers), one over dy and z backward. Sums over tiles or over ranges of pixels
// are float32, they are added in double in an order fixed by the shape: the same bits in each run. Sums of
// squares are taken about a pivot near the mean, so that a large mean costs no precision (Chan, Golub &
// LeVeque 1983).
//
// Budget, blocks of 256 threads: apply_batch_norm 64 registers, 4 blocks, 32 warps; add_gradients 80
// registers and 16 KB of shared memory (256 threads' sums of 8 channels), 3 blocks, 24 warps; the others 40
// registers, 6 blocks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv_epilogues.cuh"
#include "launch.cuh"

namespace maskcore {

constexpr int kChannelThreads = 32, kGroupThreads = 8;  // of a block that adds sums channel by channel
constexpr int kNormThreads = 256;

/// The one formula that the forward and the backward pass use, so that they cut at the same z.
__device__ __forceinline__ float scale_of(float gamma, float var, double eps) {
  return static_cast<float>(gamma / sqrt(var + eps));
}

/// Adds up a pair of doubles over the kGroupThreads threads of a channel; the first one has the result.
__device__ __forceinline__ double2 add_groups(double first, double second, double2* sums) {
  const int x = threadIdx.x, y = threadIdx.y;
  sums[y * kChannelThreads + x] = make_double2(first, second);
  __syncthreads();
  double2 total = make_double2(0.0, 0.0);
  if (y == 0) {
    for (int i = 0; i < kGroupThreads; ++i) {
      total.x += sums[i * kChannelThreads + x].x;
      total.y += sums[i * kChannelThreads + x].y;
    }
  }
  return total;
}

/// The tiles' moments [tiles][3][K] (pivot, sum of z - pivot, of its square) of `counts` pixels -> of each of
/// gridDim.y ranges of tiles the sums about the first tile's pivot: parts [gridDim.y][K].
static __global__ void __launch_bounds__(kNormThreads, 6)
    add_moments_kernel(const float* moments, const int* counts, int tiles, int K, double2* parts) {
  const int k = static_cast<int>(blockIdx.x * kChannelThreads + threadIdx.x);
  const int part = static_cast<int>(blockIdx.y),
            size = (tiles + static_cast<int>(gridDim.y) - 1) / static_cast<int>(gridDim.y);
  const int end = min(tiles, (part + 1) * size);
  double sum = 0.0, squares = 0.0;
  if (k < K) {
    const double pivot = moments[k];
    for (int tile = part * size + static_cast<int>(threadIdx.y); tile < end; tile += kGroupThreads) {
      const float* of = moments + static_cast<int64_t>(tile) * 3 * K + k;
      const double count = counts[tile], d = of[0] - pivot, s = of[K];
      sum += count * d + s;
      squares += of[2 * K] + d * (2.0 * s + count * d);
    }
  }
  const double2 total = add_groups(sum, squares, dynamic_shared<double2>());
  if (threadIdx.y == 0 && k < K) parts[static_cast<int64_t>(part) * K + k] = total;
}

/// parts [count][K] -> mean, var, scale [K]
static __global__ void __launch_bounds__(kNormThreads, 6)
    finish_moments_kernel(const double2* parts, int count, const float* moments, double pixels,
                          const float* gamma, double eps, int K, float* mean, float* var, float* scale) {
  const int k = static_cast<int>(blockIdx.x * kChannelThreads + threadIdx.x);
  double sum = 0.0, squares = 0.0;
  if (k < K) {
    for (int part = static_cast<int>(threadIdx.y); part < count; part += kGroupThreads) {
      const double2 of = parts[static_cast<int64_t>(part) * K + k];
      sum += of.x;
      squares += of.y;
    }
  }
  const double2 total = add_groups(sum, squares, dynamic_shared<double2>());
  if (threadIdx.y == 0 && k < K) {
    const double offset = total.x / pixels;  // of the mean from the pivot
    const float m = static_cast<float>(moments[k] + offset);
    const double variance = total.y / pixels - offset * offset;
    // Not a maximum: a NaN stays.
    const float v = static_cast<float>(variance < 0.0 ? 0.0 : variance);
    mean[k] = m;
    var[k] = v;
    scale[k] = scale_of(gamma[k], v, eps);
  }
}

/// A range of pixels by kLanes adjacent channels a thread: threads of a row share a pixel.
template <class T, int kLanes>
struct ChannelRows {
  int packets;  // a pixel's channels in kLanes, rounded up
  int wide;     // threads of a row: a power of two, at most 32

  __device__ __forceinline__ int packet() const {
    return static_cast<int>(blockIdx.x) * wide + static_cast<int>(threadIdx.x) % wide;
  }
  __device__ __forceinline__ int row() const { return static_cast<int>(threadIdx.x) / wide; }
  __device__ __forceinline__ int rows() const { return kNormThreads / wide; }

  static ChannelRows of(int64_t K) {
    const int packets = static_cast<int>((K + kLanes - 1) / kLanes);
    int wide = 1;
    while (wide < packets && wide < 32) wide *= 2;
    return {packets, wide};
  }
  dim3 grid(int64_t ranges) const {
    return dim3(static_cast<unsigned>((packets + wide - 1) / wide), static_cast<unsigned>(ranges));
  }
};

/// y = max(scale (z - mean) + beta, 0) of gridDim.y ranges of `size` pixels.
template <class T>
__global__ void __launch_bounds__(kNormThreads, 4)
    apply_batch_norm_kernel(const T* z, const float* mean, const float* scale, const float* beta,
                            int64_t pixels, int64_t size, int K, bool aligned,
                            ChannelRows<T, 16 / sizeof(T)> of, T* y) {
  constexpr int kLanes = 16 / sizeof(T);
  const int c = of.packet() * kLanes;
  if (c >= K) return;
  Packet<float, kLanes> m, a, b;
  m.load_first(mean + c, K - c);
  a.load_first(scale + c, K - c);
  b.load_first(beta + c, K - c);
  const int64_t end = min(pixels, (blockIdx.y + 1) * size);
#pragma unroll 2
  for (int64_t pixel = blockIdx.y * size + of.row(); pixel < end; pixel += of.rows()) {
    Packet<T, kLanes> in;
    load_channels(in, z + pixel * K + c, K - c, aligned);
#pragma unroll
    for (int i = 0; i < kLanes; i += 4) {
      float v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = relu(fmaf(a[i + j], in[i + j] - m[i + j], b[i + j]));
      if (i < K - c) store_channels(y + pixel * K + c + i, v, K - c - i, aligned);
    }
  }
}

/// Of each of gridDim.y ranges of `size` pixels the sums of g and of g (z - mean): parts [gridDim.y][K].
template <class T>
__global__ void __launch_bounds__(kNormThreads, 3)
    add_gradients_kernel(const T* dy, const T* z, const float* gamma, const float* beta, const float* mean,
                         const float* var, double eps, int64_t pixels, int64_t size, int K, bool aligned,
                         ChannelRows<T, 16 / sizeof(T)> of, float2* parts) {
  constexpr int kLanes = 16 / sizeof(T);
  float2* const sums = dynamic_shared<float2>();  // [row][thread of the row][kLanes]
  const int c = of.packet() * kLanes;
  float sum_g[kLanes] = {}, sum_gz[kLanes] = {};
  if (c < K) {
    float m[kLanes], a[kLanes], b[kLanes];
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const int k = min(c + i, K - 1);
      m[i] = mean[k];
      a[i] = scale_of(gamma[k], var[k], eps);
      b[i] = beta[k];
    }
    const int64_t end = min(pixels, (blockIdx.y + 1) * size);
#pragma unroll(8 / kLanes)
    for (int64_t pixel = blockIdx.y * size + of.row(); pixel < end; pixel += of.rows()) {
      Packet<T, kLanes> dy_in, z_in;
      load_channels(dy_in, dy + pixel * K + c, K - c, aligned);
      load_channels(z_in, z + pixel * K + c, K - c, aligned);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        const float d = z_in[i] - m[i], g = relu_gradient(dy_in[i], fmaf(a[i], d, b[i]));
        sum_g[i] += g;
        sum_gz[i] = fmaf(g, d, sum_gz[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kLanes; ++i) {
    sums[static_cast<int>(threadIdx.x) * kLanes + i] = make_float2(sum_g[i], sum_gz[i]);
  }
  __syncthreads();
  const int lanes = of.wide * kLanes;
  for (int i = static_cast<int>(threadIdx.x); i < lanes; i += kNormThreads) {
    const int k = static_cast<int>(blockIdx.x) * lanes + i;
    if (k >= K) break;
    float2 total = make_float2(0.0f, 0.0f);
    for (int row = 0; row < of.rows(); ++row) {
      total.x += sums[row * lanes + i].x;
      total.y += sums[row * lanes + i].y;
    }
    parts[static_cast<int64_t>(blockIdx.y) * K + k] = total;
  }
}

/// parts [count][K] -> dgamma, dbeta [K], and BatchNormReluGradient's coefficients of `channels`.
template <class Part>
__global__ void __launch_bounds__(kNormThreads, 6)
    finish_gradients_kernel(const Part* parts, int count, double pixels, const float* gamma,
                            const float* beta, const float* mean, const float* var, double eps, int K,
                            int channels, float* dgamma, float* dbeta, float* coefficients) {
  const int k = static_cast<int>(blockIdx.x * kChannelThreads + threadIdx.x);
  double g = 0.0, gz = 0.0;
  if (k < K) {
    for (int part = static_cast<int>(threadIdx.y); part < count; part += kGroupThreads) {
      const Part of = parts[static_cast<int64_t>(part) * K + k];
      g += of.x;
      gz += of.y;
    }
  }
  const double2 total = add_groups(g, gz, dynamic_shared<double2>());
  if (threadIdx.y != 0 || k >= channels) return;
  const auto store = [=](const float (&of)[5]) {
    for (int i = 0; i < 5; ++i) coefficients_of<5>(coefficients, k)[i * kCoefficientGroup] = of[i];
  };
  if (k >= K) return store({});
  const double inv_std = 1.0 / sqrt(var[k] + eps), sum_g_zhat = total.y * inv_std;
  const float scale = scale_of(gamma[k], var[k], eps);
  dgamma[k] = static_cast<float>(sum_g_zhat);
  dbeta[k] = static_cast<float>(total.x);
  store({mean[k], scale, beta[k], static_cast<float>(-scale * inv_std * sum_g_zhat / pixels),
         static_cast<float>(total.x / pixels)});
}

// ---- launching -----------------------------------------------------------------------------------

constexpr int64_t kMostParts = 512;  // four blocks on each of 128 processors
constexpr size_t kAddBytes = kChannelThreads * kGroupThreads * sizeof(double2);

inline int64_t moment_parts(int64_t tiles) { return std::clamp<int64_t>(tiles / 64, 1, kMostParts); }
inline int64_t gradient_parts(int64_t pixels) { return std::clamp<int64_t>(pixels / 256, 1, kMostParts); }
inline unsigned channel_blocks(int64_t K, int64_t threads) {
  return static_cast<unsigned>((K + threads - 1) / threads);
}

}  // namespace maskcore
