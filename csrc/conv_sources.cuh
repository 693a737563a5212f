// Where a convolution's operands come from. A source gives kLanes adjacent channels of one pixel, what 16
// bytes of shared memory hold; what it computes on the way (ReLU mask, max-pool expansion, batch-norm
// gradient) is fused into the load and never stored as a tensor. fetch() only starts the loads, values()
// computes, so that matrix products stand between the two and hide the memory's latency. The formulas are
// those of sources.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "conv_tiling.cuh"
#include "tensor_core.cuh"

namespace maskcore {

/// A bfloat16 as it lies in memory.
struct bf16 {
  uint16_t bits;
};

/// kLanes values of T in registers, as loaded.
template <class T, int kLanes>
struct Packet;

template <int kLanes>
struct Packet<float, kLanes> {
  float v[kLanes];

  __device__ __forceinline__ float operator[](int i) const { return v[i]; }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) v[i] = 0.0f;
  }
  __device__ __forceinline__ void load_aligned(const float* p) {
#pragma unroll
    for (int i = 0; i < kLanes; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(p + i);
      v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
    }
  }
  __device__ __forceinline__ void load_first(const float* p, int count) {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) v[i] = i < count ? p[i] : 0.0f;
  }
};

template <>
struct Packet<bf16, 8> {
  uint32_t v[4];  // low half first

  __device__ __forceinline__ float operator[](int i) const {
    return __uint_as_float(i % 2 == 0 ? v[i / 2] << 16 : v[i / 2] & 0xffff0000u);
  }
  __device__ __forceinline__ void clear() { v[0] = v[1] = v[2] = v[3] = 0; }
  __device__ __forceinline__ void load_aligned(const bf16* p) {
    const uint4 eight = *reinterpret_cast<const uint4*>(p);
    v[0] = eight.x, v[1] = eight.y, v[2] = eight.z, v[3] = eight.w;
  }
  __device__ __forceinline__ void load_first(const bf16* p, int count) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = 2 * i < count ? p[2 * i].bits : 0u;
      const uint32_t high = 2 * i + 1 < count ? p[2 * i + 1].bits : 0u;
      v[i] = low | high << 16;
    }
  }
};

/// The first `count` (1..kLanes, or more) of them; the others are zero.
template <class T, int kLanes>
__device__ __forceinline__ void load_channels(Packet<T, kLanes>& packet, const T* p, int count,
                                              bool aligned) {
  if (aligned && count >= kLanes) {
    packet.load_aligned(p);
  } else {
    packet.load_first(p, count);
  }
}

/// 0 where v is negative; NaN stays.
__device__ __forceinline__ float relu(float v) { return v <= 0.0f ? 0.0f : v; }

/// dy where y > 0, else 0; a NaN in y lets dy pass.
__device__ __forceinline__ float relu_gradient(float dy, float y) { return y <= 0.0f ? 0.0f : dy; }

/// The same of two bfloat16: max(y, 0) is +0, positive, or the NaN 0x7fff, and so reaches the upper bit where
/// 0x7fff is added unless it is 0.
__device__ __forceinline__ uint32_t relu_gradient(uint32_t dy, uint32_t y) {
  return dy & sign_masks<1, 3>(max_nan_bf16(y, 0u) + 0x7fff7fffu);
}

/// Where the first of a channel's kNumbers coefficients is; the others are kCoefficientGroup floats apart, so
/// that lanes read the same one of adjacent channels from one line. Whole groups, with zeros past the last
/// channel.
constexpr int kCoefficientGroup = 32;
template <int kNumbers, class Float>
__host__ __device__ __forceinline__ Float* coefficients_of(Float* coefficients, int c) {
  return coefficients + c / kCoefficientGroup * (kNumbers * kCoefficientGroup) + c % kCoefficientGroup;
}

/// A tensor as it lies in memory.
template <class T>
struct Activation {
  using Element = T;
  static constexpr bool kPlain = true;
  const T* x;  // [N,H,W,C]
  int H, W, C;
  bool aligned;  // x lies on, and a pixel is a multiple of, 16 bytes

  template <int kLanes>
  struct Fetched {
    Packet<T, kLanes> x;
  };

  __device__ __forceinline__ int number(const Pixel& pixel) const { return pixel.number(H, W); }
  template <class From>
  __device__ __forceinline__ void prefetch(const From& pixel, int c) const {
    if (pixel.inside && c < C) prefetch_l2(at(pixel, c));
  }
  template <class From>
  __device__ __forceinline__ const T* at(const From& pixel, int c) const {
    return x + pixel.element(H, W, C, c);
  }
  template <int kLanes, class From>
  __device__ __forceinline__ void fetch(const From& pixel, int c, Fetched<kLanes>& fetched) const {
    fetched.x.clear();
    if (pixel.inside && c < C) load_channels(fetched.x, at(pixel, c), C - c, aligned);
  }
  template <int kLanes>
  __device__ __forceinline__ void values(const Fetched<kLanes>& fetched, int, float (&out)[kLanes]) const {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) out[i] = fetched.x[i];
  }
  __device__ __forceinline__ uint4 packed(const Fetched<8>& fetched, int) const {
    const uint32_t (&x)[4] = fetched.x.v;
    return make_uint4(x[0], x[1], x[2], x[3]);
  }
};

/// What batch normalisation and ReLU make of z, max(scale (z - mean) + beta, 0): by apply_batch_norm_kernel's
/// formula, so that it is the same number. A border is zero behind them, not in front.
template <class T>
struct BatchNormRelu {
  using Element = T;
  static constexpr bool kPlain = false;
  const T* z;                 // [N,H,W,C], the convolution's output
  const float* coefficients;  // mean, scale, beta
  int H, W, C;
  bool aligned;

  template <int kLanes>
  struct Fetched {
    Packet<T, kLanes> z;
    bool there;
  };

  template <class From>
  __device__ __forceinline__ void prefetch(const From& pixel, int c) const {
    if (pixel.inside && c < C) prefetch_l2(z + pixel.element(H, W, C, c));
  }

  __device__ __forceinline__ int number(const Pixel& pixel) const { return pixel.number(H, W); }
  template <int kLanes, class From>
  __device__ __forceinline__ void fetch(const From& pixel, int c, Fetched<kLanes>& fetched) const {
    fetched.z.clear();
    fetched.there = pixel.inside && c < C;
    if (fetched.there) load_channels(fetched.z, z + pixel.element(H, W, C, c), C - c, aligned);
  }
  template <int kLanes>
  __device__ __forceinline__ void values(const Fetched<kLanes>& fetched, int c, float (&out)[kLanes]) const {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) out[i] = 0.0f;
    if (!fetched.there) return;
#pragma unroll
    for (int i = 0; i < kLanes; i += 4) {
      float normalized[4];
      normalize(fetched, c, i, normalized);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i + j] = relu(normalized[j]);
    }
  }
  __device__ __forceinline__ uint4 packed(const Fetched<8>& fetched, int c) const {
    if (!fetched.there) return make_uint4(0, 0, 0, 0);
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      float normalized[4];
      normalize(fetched, c, i, normalized);
      pairs[i / 2] = pack_relu_bf16(normalized[0], normalized[1]);
      pairs[i / 2 + 1] = pack_relu_bf16(normalized[2], normalized[3]);
    }
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }

 private:
  /// Of the channels c + i to c + i + 3, before the ReLU.
  template <int kLanes>
  __device__ __forceinline__ void normalize(const Fetched<kLanes>& fetched, int c, int i,
                                            float (&out)[4]) const {
    Packet<float, 4> mean, scale, beta;
    const float* const of = coefficients_of<3>(coefficients, c) + i;
    mean.load_aligned(of);
    scale.load_aligned(of + kCoefficientGroup);
    beta.load_aligned(of + 2 * kCoefficientGroup);
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = fmaf(scale[j], fetched.z[i + j] - mean[j], beta[j]);
  }
};

/// The gradient in front of a ReLU whose output is y.
template <class T>
struct ReluGradient {
  using Element = T;
  static constexpr bool kPlain = false, kHasBias = true;
  const T* dy;  // [N,H,W,C]
  const T* y;   // [N,H,W,C]
  int H, W, C;
  bool aligned;

  template <int kLanes>
  struct Fetched {
    Packet<T, kLanes> dy, y;
  };

  template <class From>
  __device__ __forceinline__ void prefetch(const From& pixel, int c) const {
    if (!pixel.inside || c >= C) return;
    const int64_t i = pixel.element(H, W, C, c);
    prefetch_l2(dy + i);
    prefetch_l2(y + i);
  }

  __device__ __forceinline__ int number(const Pixel& pixel) const { return pixel.number(H, W); }
  template <int kLanes, class From>
  __device__ __forceinline__ void fetch(const From& pixel, int c, Fetched<kLanes>& fetched) const {
    fetched.dy.clear();
    fetched.y.clear();
    if (pixel.inside && c < C) {
      const int64_t i = pixel.element(H, W, C, c);
      load_channels(fetched.dy, dy + i, C - c, aligned);
      load_channels(fetched.y, y + i, C - c, aligned);
    }
  }
  template <int kLanes>
  __device__ __forceinline__ void values(const Fetched<kLanes>& fetched, int, float (&out)[kLanes]) const {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) out[i] = relu_gradient(fetched.dy[i], fetched.y[i]);
  }
  __device__ __forceinline__ uint4 packed(const Fetched<8>& fetched, int) const {
    const uint32_t (&dy)[4] = fetched.dy.v, (&y)[4] = fetched.y.v;
    return make_uint4(relu_gradient(dy[0], y[0]), relu_gradient(dy[1], y[1]), relu_gradient(dy[2], y[2]),
                      relu_gradient(dy[3], y[3]));
  }
};

/// The gradient in front of ReLU and 2x2 max-pool: dy goes to the maximum's place if that was positive.
template <class T>
struct PooledReluGradient {
  using Element = T;
  static constexpr bool kPlain = false, kHasBias = true;
  const T* dy;            // [N,H/2,W/2,C]
  const T* y;             // [N,H/2,W/2,C]
  const uint8_t* argmax;  // [N,H/2,W/2,C], 2 * (row in the window) + (column in the window)
  int H, W, C;
  bool aligned;  // argmax to kLanes bytes

  template <int kLanes>
  struct Fetched {
    Packet<T, kLanes> dy, y;
    uint32_t places[kLanes / 4];  // a byte each
    uint32_t place;
  };

  template <class From>
  __device__ __forceinline__ void prefetch(const From& pixel, int c) const {
    const auto window = pixel.window(H, W);
    if (!window.inside || c >= C || pixel.place() != 0) return;  // once for the four that mostly are there
    const int64_t i = window.element(H / 2, W / 2, C, c);
    prefetch_l2(dy + i);
    prefetch_l2(y + i);
    prefetch_l2(argmax + i);
  }

  /// Of its window, and its place there.
  __device__ __forceinline__ int number(const Pixel& pixel) const {
    const int window = pixel.window(H, W).number(H / 2, W / 2);
    return window < 0 ? window : window * 4 + pixel.place();
  }
  template <int kLanes, class From>
  __device__ __forceinline__ void fetch(const From& pixel, int c, Fetched<kLanes>& fetched) const {
    fetched.dy.clear();
    fetched.y.clear();
    fetched.place = static_cast<uint32_t>(pixel.place());
#pragma unroll
    for (int i = 0; i < kLanes / 4; ++i) fetched.places[i] = 0;
    const auto window = pixel.window(H, W);
    if (window.inside && c < C) {
      const int64_t i = window.element(H / 2, W / 2, C, c);
      load_channels(fetched.dy, dy + i, C - c, aligned);
      load_channels(fetched.y, y + i, C - c, aligned);
      if (aligned && C - c >= kLanes) {
#pragma unroll
        for (int j = 0; j < kLanes / 4; ++j) {
          fetched.places[j] = *reinterpret_cast<const uint32_t*>(argmax + i + 4 * j);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          if (j < C - c) fetched.places[j / 4] |= static_cast<uint32_t>(argmax[i + j]) << (j % 4 * 8);
        }
      }
    }
  }
  template <int kLanes>
  __device__ __forceinline__ void values(const Fetched<kLanes>& fetched, int, float (&out)[kLanes]) const {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const bool here = (fetched.places[i / 4] >> (i % 4 * 8) & 0xffu) == fetched.place;
      out[i] = here ? relu_gradient(fetched.dy[i], fetched.y[i]) : 0.0f;
    }
  }
  __device__ __forceinline__ uint4 packed(const Fetched<8>& fetched, int) const {
    const uint32_t (&dy)[4] = fetched.dy.v, (&y)[4] = fetched.y.v;
    // A byte's upper bit where the place, 0 to 3, is this one.
    const auto here = [&](int i) { return 0x80808080u - (fetched.places[i] ^ fetched.place * 0x01010101u); };
    const uint32_t first = here(0), last = here(1);
    return make_uint4(relu_gradient(dy[0], y[0]) & sign_masks<0, 1>(first),
                      relu_gradient(dy[1], y[1]) & sign_masks<2, 3>(first),
                      relu_gradient(dy[2], y[2]) & sign_masks<0, 1>(last),
                      relu_gradient(dy[3], y[3]) & sign_masks<2, 3>(last));
  }
};

/// The gradient in front of batch normalisation (batch statistics over M = N*H*W) and ReLU
/// (Ioffe & Szegedy 2015, section 3):
///   g = dy where scale (z - mean) + beta > 0, else 0;   zhat = (z - mean) inv_std
///   dz = gamma inv_std (g - mean(g) - zhat mean(g zhat)) = scale (g - mean_g) + slope (z - mean)
/// The bias in front of it has no effect: its gradient, the sum of dz, is zero.
template <class T>
struct BatchNormReluGradient {
  using Element = T;
  static constexpr bool kPlain = false, kHasBias = false;
  const T* dy;                // [N,H,W,C]
  const T* z;                 // [N,H,W,C], the convolution's output
  const float* coefficients;  // mean, scale, beta, slope, mean_g
  int H, W, C;
  bool aligned;

  template <int kLanes>
  struct Fetched {
    Packet<T, kLanes> dy, z;
    bool there;
  };

  template <class From>
  __device__ __forceinline__ void prefetch(const From& pixel, int c) const {
    if (!pixel.inside || c >= C) return;
    const int64_t i = pixel.element(H, W, C, c);
    prefetch_l2(dy + i);
    prefetch_l2(z + i);
  }

  __device__ __forceinline__ int number(const Pixel& pixel) const { return pixel.number(H, W); }
  template <int kLanes, class From>
  __device__ __forceinline__ void fetch(const From& pixel, int c, Fetched<kLanes>& fetched) const {
    fetched.dy.clear();
    fetched.z.clear();
    fetched.there = pixel.inside && c < C;
    if (fetched.there) {
      const int64_t i = pixel.element(H, W, C, c);
      load_channels(fetched.dy, dy + i, C - c, aligned);
      load_channels(fetched.z, z + i, C - c, aligned);
    }
  }
  template <int kLanes>
  __device__ __forceinline__ void values(const Fetched<kLanes>& fetched, int c, float (&out)[kLanes]) const {
#pragma unroll
    for (int i = 0; i < kLanes; ++i) out[i] = 0.0f;
    if (!fetched.there) return;
    const float* const of = coefficients_of<5>(coefficients, c);
#pragma unroll
    for (int i = 0; i < kLanes; i += 2) {  // for four at once a tile's sums leave too few registers
      float2 v[5];
#pragma unroll
      for (int j = 0; j < 5; ++j) v[j] = *reinterpret_cast<const float2*>(of + j * kCoefficientGroup + i);
      const auto value = [&](int lane, float mean, float scale, float beta, float slope, float mean_g) {
        const float d = fetched.z[lane] - mean, g = relu_gradient(fetched.dy[lane], fmaf(scale, d, beta));
        return fmaf(scale, g - mean_g, slope * d);
      };
      out[i] = value(i, v[0].x, v[1].x, v[2].x, v[3].x, v[4].x);
      out[i + 1] = value(i + 1, v[0].y, v[1].y, v[2].y, v[3].y, v[4].y);
    }
  }
};

/// Asks for `count` channels of a pixel from c on, line by line.
template <class Source, class From>
__device__ __forceinline__ void prefetch_channels(const Source& source, const From& pixel, int c, int count) {
  constexpr int kInLine = 128 / static_cast<int>(sizeof(typename Source::Element));
#pragma unroll
  for (int i = 0; i < count; i += kInLine) source.prefetch(pixel, c + i);
}

/// Whether a source's values are made two a register, in bfloat16.
template <class Math, class Source>
constexpr bool kPacked = std::is_same_v<typename Source::Element, typename Math::Shared> &&
                         requires(const Source& source, typename Source::template Fetched<8> fetched) {
                           { source.packed(fetched, 0) };
                         } && Math::kLanes == 8;

/// What goes into shared memory of what was fetched.
template <class Math, class Source, class Fetched>
__device__ __forceinline__ uint4 pack_values(const Source& source, const Fetched& fetched, int c) {
  if constexpr (kPacked<Math, Source>) {
    return source.packed(fetched, c);
  } else {
    float v[Math::kLanes];
    source.template values<Math::kLanes>(fetched, c, v);
    return Math::pack(v);
  }
}

/// 16 bytes of an operand on their way from a source to shared memory: by cp.async where the source is a
/// tensor that the products take as it is, else through registers.
template <class Math, class Source, bool kMayCopy_ = true>
struct Item {
  static constexpr int kLanes = Math::kLanes;
  static constexpr bool kMayCopy =
      kMayCopy_ && Source::kPlain && std::is_same_v<typename Source::Element, typename Math::Shared>;

  typename Source::template Fetched<kLanes> fetched;

  /// Whether nothing is left to finish.
  static __device__ __forceinline__ bool copies(const Source& source) {
    if constexpr (kMayCopy) return source.aligned;
    return false;
  }
  template <class From>
  __device__ __forceinline__ void start(const Source& source, const From& from, int c, unsigned char* to) {
    if constexpr (kMayCopy) {
      if (copies(source)) {
        const bool there = from.inside && c < source.C;
        cp_async_16(to, there ? source.at(from, c) : source.x, there);
        return;
      }
    }
    source.template fetch<kLanes>(from, c, fetched);
  }
  __device__ __forceinline__ void finish(const Source& source, int c, unsigned char* to) const {
    if (copies(source)) return;
    *reinterpret_cast<uint4*>(to) = pack_values<Math>(source, fetched, c);
  }
};

}  // namespace maskcore
