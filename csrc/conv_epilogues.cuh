// What a convolution does with its sums before they leave the processor. An epilogue gets four adjacent
// output channels of a pixel at a time, or of the four pixels of a pooling window; what it needs of the
// channels, OfChannels, a lane loads once for all pixels of a tile.
#pragma once

#include <cstdint>

#include "conv_sources.cuh"

namespace maskcore {

/// The first `count` of four values to p; `aligned`: p to four of them.
__device__ __forceinline__ void store_channels(float* p, const float (&v)[4], int count, bool aligned) {
  if (aligned && count >= 4) {
    *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) p[i] = v[i];
    }
  }
}
__device__ __forceinline__ void store_channels(bf16* p, const float (&v)[4], int count, bool aligned) {
  const uint2 four = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
  if (aligned && count >= 4) {
    *reinterpret_cast<uint2*>(p) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = i < 2 ? four.x : four.y;
      if (i < count) p[i].bits = static_cast<uint16_t>(i % 2 == 0 ? pair & 0xffffu : pair >> 16);
    }
  }
}

/// The first `count` of four values from p, the others zero.
__device__ __forceinline__ void load_four(const float* p, int count, bool aligned, float (&v)[4]) {
  Packet<float, 4> four;
  load_channels(four, p, count, aligned);
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = four[i];
}
__device__ __forceinline__ void load_four(const bf16* p, int count, bool aligned, float (&v)[4]) {
  if (aligned && count >= 4) {
    const uint2 four = *reinterpret_cast<const uint2*>(p);
    const float2 low = unpack_bf16(four.x), high = unpack_bf16(four.y);
    v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = i < count ? __uint_as_float(static_cast<uint32_t>(p[i].bits) << 16) : 0.0f;
    }
  }
}

/// bias [k..k+3], 0 from K on and where there is none.
__device__ __forceinline__ void load_bias(const float* bias, int k, int K, float (&b)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) b[i] = bias != nullptr && k + i < K ? bias[k + i] : 0.0f;
}

/// y = sum + bias, and kRelu's maximum with 0. kStatistics: of each tile and channel also a pivot, the sum of
/// y - pivot and of its square (the kernel takes them, batch_norm.cuh merges them).
template <class T, bool kRelu_, bool kStatistics_ = false>
struct StoreOutput {
  static constexpr bool kWindows = false;
  static constexpr bool kStatistics = kStatistics_, kOfGradient = false;
  T* y;               // [N,P,Q,K]
  const float* bias;  // [K], or null
  int P, Q, K;
  bool aligned;
  float* moments;  // [tiles][3][K]
  int* counts;     // [tiles] pixels

  struct OfChannels {
    float bias[4];
  };
  __device__ __forceinline__ void load(OfChannels& of, int k) const { load_bias(bias, k, K, of.bias); }
  __device__ __forceinline__ void finish(float (&v)[4], const OfChannels& of) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] += of.bias[i];
      if constexpr (kRelu_) v[i] = relu(v[i]);
    }
  }
  __device__ __forceinline__ void store(const Pixel& pixel, int k, const float (&v)[4]) const {
    store_channels(y + pixel.element(P, Q, K, k), v, K - k, aligned);
  }
};

/// g = sum where batch norm and ReLU, of z, let it pass (BatchNormRelu), else 0. Of each tile and channel the
/// sums of g and of g (z - mean), in the places of StoreOutput's moments about a pivot of zero.
template <class T>
struct ReluSumsOutput {
  static constexpr bool kWindows = false;
  static constexpr bool kStatistics = true, kOfGradient = true;
  T* g;                       // [N,P,Q,K]
  const T* z;                 // [N,P,Q,K]
  const float* coefficients;  // BatchNormRelu's
  int P, Q, K;
  bool aligned;
  float* moments;  // [tiles][3][K]
  int* counts;     // [tiles] pixels

  struct OfChannels {
    float mean[4], scale[4], beta[4];
  };
  __device__ __forceinline__ void load(OfChannels& of, int k) const {
    if (k >= K) return;
    const float* const from = coefficients_of<3>(coefficients, k);
    load_four(from, 4, true, of.mean);
    load_four(from + kCoefficientGroup, 4, true, of.scale);
    load_four(from + 2 * kCoefficientGroup, 4, true, of.beta);
  }
  __device__ __forceinline__ void prefetch(const Pixel& pixel, int k) const {
    if (pixel.inside && k < K) prefetch_l2(z + pixel.element(P, Q, K, k));
  }
  /// z of a pixel.
  __device__ __forceinline__ void fetch(const Pixel& pixel, int k, float (&z_in)[4]) const {
    load_four(z + pixel.element(P, Q, K, k), K - k, aligned, z_in);
  }
  __device__ __forceinline__ void store(const Pixel& pixel, int k, const OfChannels& of,
                                        const float (&z_in)[4], float (&v)[4], float (&sum)[4],
                                        float (&products)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float d = z_in[j] - of.mean[j];
      v[j] = relu_gradient(v[j], fmaf(of.scale[j], d, of.beta[j]));
      sum[j] += v[j];
      products[j] = fmaf(v[j], d, products[j]);
    }
    store_channels(g + pixel.element(P, Q, K, k), v, K - k, aligned);
  }
};

/// y = the largest of a 2x2 window's max(sum + bias, 0), and its place 2 * row + column, the first if there
/// are several; a NaN wins.
template <class T>
struct MaxPoolOutput {
  static constexpr bool kWindows = true;
  static constexpr bool kStatistics = false, kOfGradient = false;
  T* y;               // [N,P/2,Q/2,K]
  uint8_t* argmax;    // [N,P/2,Q/2,K]
  const float* bias;  // [K]
  int P, Q, K;        // P and Q even
  bool aligned;

  struct OfChannels {
    float bias[4];
  };
  __device__ __forceinline__ void load(OfChannels& of, int k) const { load_bias(bias, k, K, of.bias); }
  __device__ __forceinline__ void store(const Pixel& pixel, int k, const OfChannels& of,
                                        const float (&v)[4][4]) const {
    const float (&b)[4] = of.bias;
    float best[4];
    uint32_t places = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      best[i] = relu(v[0][i] + b[i]);
      uint32_t place = 0;
#pragma unroll
      for (uint32_t corner = 1; corner < 4; ++corner) {
        const float other = relu(v[corner][i] + b[i]);
        // Not (other <= best) lets a NaN win; best == best keeps the first one.
        if (!(other <= best[i]) && best[i] == best[i]) {
          best[i] = other;
          place = corner;
        }
      }
      places |= place << (8 * i);
    }
    const Pixel window{true, pixel.n, pixel.h / 2, pixel.w / 2};
    const int64_t out = window.element(P / 2, Q / 2, K, k);
    store_channels(y + out, best, K - k, aligned);
    if (aligned && K - k >= 4) {
      *reinterpret_cast<uint32_t*>(argmax + out) = places;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < K - k) argmax[out + i] = static_cast<uint8_t>(places >> (8 * i));
      }
    }
  }
};

}  // namespace maskcore
