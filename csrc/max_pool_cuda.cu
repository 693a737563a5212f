// max_pool: y[n,p,q,c] = max over i,j in {0,1} of x[n,2p+i,2q+j,c], with the place 2 i + j of the first
// maximum. Activations are [N,H,W,C]. A block owns a row of windows; a thread takes 16 bytes of channels of a
// window, four loads and two stores, channels fastest, so that a warp moves whole lines. Channels that are no
// multiple of 16 bytes, or lie askew, go one by one.
//
// Bound by memory: float32 reads 16 bytes and writes 5 an output, bfloat16 8 and 3. No shared memory. At most
// 48 registers: 4 x 4 of loads, 4 + 2 of results, the rest 64-bit addresses; 5 blocks of 256 threads (5 * 256
// * 48 = 61,440 of 65,536) are 1,280 of the 1,536 threads that an SM of sm_86, 89 and 120 holds, of the 2,048
// of sm_80, 90 and 100.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "cuda_launchers.h"
#include "elements.cuh"
#include "launch.cuh"

namespace maskcore {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSM = 5;

struct PoolSize {
  int64_t N;
  int H, W, C;
  int P = H / 2;
  int Q = W / 2;
};

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    max_pool_kernel(const T* __restrict__ x, PoolSize s, T* __restrict__ y, uint8_t* __restrict__ argmax) {
  using Values = Elements<T, kLanes>;
  const int vectors = s.C / kLanes, row_of_x = s.W * s.C, row_of_y = s.Q * s.C;
  for (int64_t row = blockIdx.x; row < s.N * s.P; row += gridDim.x) {
    const T* upper = x + (row / s.P * s.H + 2 * (row % s.P)) * row_of_x;
    for (int i = static_cast<int>(threadIdx.x); i < s.Q * vectors; i += kThreads) {
      const int q = i / vectors, c = (i - q * vectors) * kLanes;
      const T* corner = upper + 2 * q * s.C + c;
      Values best = Values::load(corner);
      const Values others[3] = {Values::load(corner + s.C), Values::load(corner + row_of_x),
                                Values::load(corner + row_of_x + s.C)};
      Elements<uint8_t, kLanes> places{};
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
#pragma unroll
        for (int place = 1; place < 4; ++place) {
          const float v = to_float(others[place - 1].v[lane]), b = to_float(best.v[lane]);
          // Not (v <= b) lets a NaN win; b == b keeps the first one.
          if (!(v <= b) && b == b) {
            best.v[lane] = others[place - 1].v[lane];
            places.v[lane] = static_cast<uint8_t>(place);
          }
        }
      }
      const int64_t out = row * row_of_y + q * s.C + c;
      best.store(y + out);
      places.store(argmax + out);
    }
  }
}

/// dx is dy at its window's place, else 0; also in an odd last row or column, which no window covers.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    max_pool_backward_kernel(const T* __restrict__ dy, const uint8_t* __restrict__ argmax, PoolSize s,
                             T* __restrict__ dx) {
  using Values = Elements<T, kLanes>;
  const int vectors = s.C / kLanes, row_of_x = s.W * s.C, row_of_y = s.Q * s.C;
  const int window_rows = (s.H + 1) / 2, window_cols = (s.W + 1) / 2;
  for (int64_t row = blockIdx.x; row < s.N * window_rows; row += gridDim.x) {
    const int64_t n = row / window_rows;
    const int p = static_cast<int>(row % window_rows);
    T* upper = dx + (n * s.H + 2 * p) * row_of_x;
    for (int i = static_cast<int>(threadIdx.x); i < window_cols * vectors; i += kThreads) {
      const int q = i / vectors, c = (i - q * vectors) * kLanes;
      Values g{};
      Elements<uint8_t, kLanes> places{};
      if (p < s.P && q < s.Q) {
        const int64_t in = (n * s.P + p) * row_of_y + q * s.C + c;
        g = Values::load(dy + in);
        places = Elements<uint8_t, kLanes>::load(argmax + in);
      }
#pragma unroll
      for (int place = 0; place < 4; ++place) {
        Values out{};
#pragma unroll
        for (int lane = 0; lane < kLanes; ++lane) {
          if (places.v[lane] == place) out.v[lane] = g.v[lane];
        }
        const bool there = 2 * p + place / 2 < s.H && 2 * q + place % 2 < s.W;
        if (there) out.store(upper + place / 2 * row_of_x + (2 * q + place % 2) * s.C + c);
      }
    }
  }
}

/// A row, and what a thread adds to walk past its end, must be countable in 32 bits; rows are counted in 64.
bool is_addressable(int64_t N, int64_t H, int64_t W, int64_t C) {
  constexpr int64_t most = std::numeric_limits<int>::max() - 2 * kThreads;
  return H < most && W < most && C <= most && (W + 1) * C <= most &&
         N <= std::numeric_limits<int64_t>::max() / most;
}

dim3 grid_of(int64_t rows) {
  return dim3(static_cast<unsigned>(std::min<int64_t>(rows, std::numeric_limits<int>::max())));
}

template <class T>
cudaError_t launch_max_pool_of(const T* x, const PoolSize& s, T* y, uint8_t* argmax, cudaStream_t stream) {
  constexpr int kLanes = kLanesOf16Bytes<T>;
  const bool whole =
      s.C % kLanes == 0 && is_aligned(x, 16) && is_aligned(y, 16) && is_aligned(argmax, kLanes);
  const auto kernel = whole ? max_pool_kernel<T, kLanes> : max_pool_kernel<T, 1>;
  return launch(kernel, grid_of(s.N * s.P), dim3(kThreads), 0, stream, x, s, y, argmax);
}

template <class T>
cudaError_t launch_max_pool_backward_of(const T* dy, const uint8_t* argmax, const PoolSize& s, T* dx,
                                        cudaStream_t stream) {
  constexpr int kLanes = kLanesOf16Bytes<T>;
  const bool whole =
      s.C % kLanes == 0 && is_aligned(dy, 16) && is_aligned(dx, 16) && is_aligned(argmax, kLanes);
  const auto kernel = whole ? max_pool_backward_kernel<T, kLanes> : max_pool_backward_kernel<T, 1>;
  return launch(kernel, grid_of(s.N * ((s.H + 1) / 2)), dim3(kThreads), 0, stream, dy, argmax, s, dx);
}

}  // namespace

cudaError_t launch_max_pool(const void* x, DataType dtype, int64_t N, int64_t H, int64_t W, int64_t C,
                            void* y, uint8_t* argmax, cudaStream_t stream) {
  if (N * (H / 2) * (W / 2) * C == 0) return cudaSuccess;
  if (!is_addressable(N, H, W, C)) return cudaErrorInvalidValue;
  const PoolSize s{N, static_cast<int>(H), static_cast<int>(W), static_cast<int>(C)};
  if (dtype == DataType::kFloat32) {
    return launch_max_pool_of(static_cast<const float*>(x), s, static_cast<float*>(y), argmax, stream);
  }
  return launch_max_pool_of(static_cast<const bf16_bits*>(x), s, static_cast<bf16_bits*>(y), argmax, stream);
}

cudaError_t launch_max_pool_backward(const void* dy, const uint8_t* argmax, DataType dtype, int64_t N,
                                     int64_t H, int64_t W, int64_t C, void* dx, cudaStream_t stream) {
  if (N * H * W * C == 0) return cudaSuccess;
  if (!is_addressable(N, H, W, C)) return cudaErrorInvalidValue;
  const PoolSize s{N, static_cast<int>(H), static_cast<int>(W), static_cast<int>(C)};
  if (dtype == DataType::kFloat32) {
    return launch_max_pool_backward_of(static_cast<const float*>(dy), argmax, s, static_cast<float*>(dx),
                                       stream);
  }
  return launch_max_pool_backward_of(static_cast<const bf16_bits*>(dy), argmax, s,
                                     static_cast<bf16_bits*>(dx), stream);
}

}  // namespace maskcore
