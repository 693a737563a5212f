// conv_relu and conv_relu_max_pool of any source (sources.h), by the way that suits the shape.
#pragma once

#include <algorithm>

#include "conv_first_layer.h"
#include "conv_winograd.h"
#include "max_pool.h"
#include "shapes.h"

namespace maskcore {

/// The filters transformed before (transform_filter), or null: they are transformed now.
template <class Operands, class F>
const typename Operands::Element* forward_filters(const ConvShape& s, const float* weight,
                                                  const float* transformed) {
  const FilterShape f = FilterShape::forward(s.K, s.C);
  if (transformed == nullptr) return transform_filters<Operands, F>(weight, f);
  return reinterpret_cast<const typename Operands::Element*>(transformed + f.kept_begin<F>());
}

/// y [N,P,Q,K] = max(conv(input, weight) + bias, 0)
template <class Source>
void convolve_relu(const ConvShape& s, Precision precision, const Source& input, const float* weight,
                   const float* transformed, const float* bias, float* y) {
  if (use_winograd(s)) {
    const StoreOutput<true> sink{.y = y, .N = s.N, .P = s.P, .Q = s.Q, .K = s.K, .bias = bias};
    with_tiles(s, s.P, s.Q, precision, [&]<class Operands, class F>(const TileGrid<F>& grid) {
      convolve_winograd<Operands>(s, grid, input, forward_filters<Operands, F>(s, weight, transformed), sink);
    });
    return;
  }
  convolve_forward(
      s, s.P, s.Q, input, weight, bias, /*relu=*/true, streams(y, s.K, s.N * s.P * s.Q * s.K),
      [=](int64_t n, int64_t p, int64_t) { return y + (n * s.P + p) * s.Q * s.K; },
      [](int64_t, int64_t, int64_t) {});
}

/// The 2x2 windows of a tile, pooled in registers.
struct PoolOutput {
  float* y;         // [N,P,Q,K]
  uint8_t* argmax;  // [N,P,Q,K]
  int64_t P, Q, K;
  const float* bias;

  template <class Lanes, int kSize>
  void save(int64_t, const Tile& tile, int64_t k, Lanes lanes, const Vec (&y_tile)[kSize][kSize]) const {
    const Vec b = load(bias + k, lanes);
    const int64_t first = ((tile.n * P + tile.p / 2) * Q + tile.q / 2) * K + k;
    for_each_output<kSize, 2>(tile, [&](int64_t i, int64_t j) {
      const Vec window[4] = {relu(y_tile[2 * i][2 * j] + b), relu(y_tile[2 * i][2 * j + 1] + b),
                             relu(y_tile[2 * i + 1][2 * j] + b), relu(y_tile[2 * i + 1][2 * j + 1] + b)};
      const Pooled pooled = max_pool_window(window);
      store(y + first + (i * Q + j) * K, pooled.best, lanes);
      store_bytes(argmax + first + (i * Q + j) * K, pooled.place, lanes);
    });
  }
};

/// y, argmax [N,P/2,Q/2,K] = max_pool(max(conv(input, weight) + bias, 0))
template <class Source>
void convolve_relu_max_pool(const ConvShape& s, Precision precision, const Source& input, const float* weight,
                            const float* transformed, const float* bias, float* y, uint8_t* argmax) {
  // The pool drops an odd last row and column: they are not computed.
  const PoolShape pool{.N = s.N, .H = s.P, .W = s.Q, .C = s.K};
  const int64_t P = 2 * pool.P, Q = 2 * pool.Q;
  if (use_winograd(s)) {
    const PoolOutput sink{.y = y, .argmax = argmax, .P = pool.P, .Q = pool.Q, .K = s.K, .bias = bias};
    with_tiles(s, P, Q, precision, [&]<class Operands, class F>(const TileGrid<F>& grid) {
      convolve_winograd<Operands>(s, grid, input, forward_filters<Operands, F>(s, weight, transformed), sink);
    });
    return;
  }
  const auto convolved = [=](int64_t slot) {
    return workspace(Purpose::kConvolved, kMaxRowBlock * Q * s.K) + slot * Q * s.K;
  };
  convolve_forward(
      s, P, Q, input, weight, bias, /*relu=*/true, /*streamed=*/false,
      [=](int64_t, int64_t, int64_t slot) { return convolved(slot); },
      [=](int64_t n, int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; p += 2) {
          const int64_t out = (n * pool.P + p / 2) * pool.Q * s.K;
          max_pool_row(convolved(p - begin), convolved(p - begin + 1), pool.Q, s.K, y + out, argmax + out);
        }
      });
}

/// What conv_relu_max_pool allocates.
inline PoolShape pooled_shape(const ConvShape& s) {
  const PoolShape pool{.N = s.N, .H = s.P, .W = s.Q, .C = s.K};
  STD_TORCH_CHECK(pool.P >= 1 && pool.Q >= 1, "x is too small to be pooled: the convolution gives ", s.P,
                  " x ", s.Q);
  return pool;
}

}  // namespace maskcore
