// warp: uint8 pictures -> the network's input, augmented. Output pixel (x, y) of picture n is its point
//   (m0 x + m1 y + m2, m3 x + m4 y + m5),  m = matrices[n],
// interpolated between the four pixels around it, times scale; outside [0, W-1] x [0, H-1] it is fill times
// scale. To the bit what native.cpp's warp_picture computes on the CPU: coordinates in double, interpolation
// in float, and no multiplication fused with an addition (hence the _rn functions, which nvcc keeps apart).
// The identity gives the pixels themselves: x + (y - x) 0 and x + (y - x) 1 are exact.
//
// A thread owns 4 adjacent pixels of a row, 12 floats: three 16-byte stores (or three of 8, of bfloat16)
// where rows are multiples of 4 pixels. Pixels are read by bytes, from lines that neighbours have fetched.
// Bound by memory, 3 bytes read and 12 (6) written a pixel; the 12 double operations a pixel take half of
// that time where double is 1/64 of float (sm_86, 89, 120). At most 64 registers: 8 of them the two points'
// coordinates in double; 4 blocks of 256 threads (65,536 registers). No shared memory.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "cuda_launchers.h"
#include "elements.cuh"
#include "launch.cuh"

namespace maskcore {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSM = 4;
constexpr int kPixels = 4;  // a thread
constexpr int kColors = 3;

__device__ __forceinline__ double affine(double slope, double at, double start) {
  return __dadd_rn(__dmul_rn(slope, at), start);
}

__device__ __forceinline__ float between(float a, float b, float weight) {
  return __fadd_rn(a, __fmul_rn(__fsub_rn(b, a), weight));
}

template <class T, bool kWholeVectors>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    warp_kernel(const uint8_t* __restrict__ pictures, const double* __restrict__ matrices, int64_t N, int H,
                int W, float fill, float scale, T* __restrict__ out) {
  const int groups = (W - 1) / kPixels + 1;  // of pixels in a row
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < N * H * groups; i += step) {
    const int64_t line = i / groups, n = line / H;
    const int y = static_cast<int>(line - n * H), first = static_cast<int>(i - line * groups) * kPixels;
    const uint8_t* __restrict__ picture = pictures + n * H * W * kColors;
    const double* __restrict__ m = matrices + n * 6;
    const double slope_x = m[0], start_x = affine(m[1], y, m[2]);
    const double slope_y = m[3], start_y = affine(m[4], y, m[5]);
    const int most_x = max(W - 2, 0), most_y = max(H - 2, 0);
    const int right = W > 1 ? kColors : 0;                                // to the right neighbour
    const int64_t below = H > 1 ? static_cast<int64_t>(W) * kColors : 0;  // to the one below
    float values[kPixels * kColors];
#pragma unroll
    for (int pixel = 0; pixel < kPixels; ++pixel) {
      const double from_x = affine(slope_x, first + pixel, start_x);
      const double from_y = affine(slope_y, first + pixel, start_y);
      const bool inside = from_x >= 0 && from_x <= W - 1 && from_y >= 0 && from_y <= H - 1;
      // The last row and column have no neighbour: the one before reaches them with weight 1.
      const int left = inside ? min(static_cast<int>(from_x), most_x) : 0;
      const int top = inside ? min(static_cast<int>(from_y), most_y) : 0;
      const float fx = static_cast<float>(__dsub_rn(from_x, left));
      const float fy = static_cast<float>(__dsub_rn(from_y, top));
      const uint8_t* corner = picture + (static_cast<int64_t>(top) * W + left) * kColors;
#pragma unroll
      for (int color = 0; color < kColors; ++color) {
        const float upper = between(corner[color], corner[right + color], fx);
        const float lower = between(corner[below + color], corner[below + right + color], fx);
        const float value = inside ? between(upper, lower, fy) : fill;
        values[pixel * kColors + color] = __fmul_rn(value, scale);
      }
    }
    T* to = out + (line * W + first) * kColors;
    if constexpr (kWholeVectors) {
#pragma unroll
      for (int j = 0; j < kPixels * kColors; j += 4) {
        Elements<T, 4> four;
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) four.v[lane] = from_float<T>(values[j + lane]);
        four.store(to + j);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kPixels * kColors; ++j) {
        if (first + j / kColors < W) to[j] = from_float<T>(values[j]);
      }
    }
  }
}

template <class T>
cudaError_t launch_warp_of(const uint8_t* pictures, const double* matrices, int64_t N, int H, int W,
                           float fill, float scale, T* out, cudaStream_t stream) {
  const bool whole = W % kPixels == 0 && is_aligned(out, 4 * sizeof(T));
  const auto kernel = whole ? warp_kernel<T, true> : warp_kernel<T, false>;
  const int64_t threads = N * H * ((W - 1) / kPixels + 1);
  const int64_t blocks = std::min<int64_t>((threads - 1) / kThreads + 1, std::numeric_limits<int>::max());
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, pictures, matrices, N,
                H, W, fill, scale, out);
}

}  // namespace

cudaError_t launch_warp(const uint8_t* pictures, const double* matrices, int64_t N, int64_t H, int64_t W,
                        float fill, float scale, DataType dtype, void* out, cudaStream_t stream) {
  if (N == 0 || H == 0 || W == 0) return cudaSuccess;
  constexpr int64_t most = std::numeric_limits<int>::max() - kPixels;
  if (H > most || W > most || H > std::numeric_limits<int64_t>::max() / 16 / W / N)
    return cudaErrorInvalidValue;
  const int height = static_cast<int>(H), width = static_cast<int>(W);
  if (dtype == DataType::kFloat32) {
    return launch_warp_of(pictures, matrices, N, height, width, fill, scale, static_cast<float*>(out),
                          stream);
  }
  return launch_warp_of(pictures, matrices, N, height, width, fill, scale, static_cast<bf16_bits*>(out),
                        stream);
}

}  // namespace maskcore
