// A 3x3 stride-1 convolution with few input channels, such as the first layer's 3, forward: Winograd's
// F(4, 3) (winograd_transforms.h) along the rows alone, half of the direct convolution's multiply-adds.
//   y[p,4t+i,k] = b[k] + (A^T m)_i,   m_j = sum over r,c of U[r,c,j,k] V[p+r,t,j,c]
//   U[r,c,:,k] = G w[k,c,r,:],        V[h,t,:,c] = B^T x[h,4t..4t+5,c]
// In two dimensions the products are a quarter, but those of 3 channels are then fewer than the operations
// that transform the output. Here an output vector takes 4.5 C products and 2.5 operations of A^T.
//
// A row of V serves three rows of the output. Three of 256 pixels, 18 KB, and U of 32 output channels, 7 KB,
// lie in L1. Registers: kRowTiles * 6 accumulators and a vector of U, 25 of 32; a multiply-add broadcasts V
// itself. A NaN or an infinity may reach any output of the tiles that see it, along its rows.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "conv_direct.h"
#include "conv_winograd.h"
#include "phases.h"
#include "shapes.h"
#include "sources.h"
#include "vector.h"
#include "winograd_transforms.h"
#include "workspace.h"

namespace maskcore {

inline constexpr int64_t kMostFirstLayerChannels = 3;  // a Quad holds a pixel
inline constexpr int kRowTiles = 4;

/// The channels of a pixel, and behind them what follows.
typedef float Quad __attribute__((vector_size(16), aligned(alignof(float)), may_alias));
inline constexpr int64_t kQuad = 4;
inline constexpr int64_t kTileFloats = F4::kIn * kQuad;  // V[h,t]

/// With 16 registers a tile is half as large and waits for its loads, three for two products: on AVX2 the
/// direct convolution is faster.
inline bool is_first_layer(const ConvShape& s) {
  return kVectorBytes == 64 && s.C <= kMostFirstLayerChannels && wanted_way() != "direct";
}

/// U: [vector of output channels][r][c][j][kLanes], zero-padded in K.
inline const float* transform_rows_of_filter(const float* weight, const ConvShape& s, Purpose purpose) {
  const int64_t vectors = ceil_div(s.K, kLanes), step = F4::kIn * kLanes;
  float* out = workspace(purpose, vectors * 3 * s.C * step);
  std::fill_n(out, vectors * 3 * s.C * step, 0.0f);
  for (int64_t k = 0; k < s.K; ++k) {
    for (int64_t r = 0; r < 3; ++r) {
      for (int64_t c = 0; c < s.C; ++c) {
        float taps[3], u[F4::kIn];
        std::copy_n(weight + ((k * s.C + c) * 3 + r) * 3, 3, taps);
        transform_filter(taps, u);
        float* to = out + ((k / kLanes * 3 + r) * s.C + c) * step + k % kLanes;
        for (int64_t j = 0; j < F4::kIn; ++j) to[j * kLanes] = u[j];
      }
    }
  }
  return out;
}

/// V of a padded input row x [width][C]: [tile][j][kQuad], `tiles` of them; pixels past the row count as
/// zero.
inline void transform_row(const float* x, int64_t width, int64_t C, int64_t tiles, float* v) {
  for (int64_t t = 0; t < tiles; ++t, v += kTileFloats) {
    const int64_t begin = t * F4::kOut, pixels = std::clamp<int64_t>(width - begin, 0, F4::kIn);
    const float* from = x + begin * C;
    float edge[kTileFloats + kQuad] = {};
    if ((begin + F4::kIn - 1) * C + kQuad > width * C) {
      std::copy_n(from, pixels * C, edge);
      from = edge;
    }
    Quad d[F4::kIn], transformed[F4::kIn];
#pragma GCC unroll 6
    for (int j = 0; j < F4::kIn; ++j) d[j] = *reinterpret_cast<const Quad*>(from + j * C);
    transform_input(d, transformed);
#pragma GCC unroll 6
    for (int j = 0; j < F4::kIn; ++j) *reinterpret_cast<Quad*>(v + j * kQuad) = transformed[j];
  }
}

/// The rows of V that a thread has ready: row h of image n in slot h % 4.
class TransformedRows {
 public:
  explicit TransformedRows(const ConvShape& s)
      : s_(s),
        width_(s.W + 2 * s.padding),
        tiles_(ceil_div(ceil_div(s.Q, F4::kOut), kRowTiles) * kRowTiles),
        v_(workspace(Purpose::kTransformedRows, kSlots * tiles_ * kTileFloats)) {}

  /// Rows [p, p + 3), with the padding's, of image n of the source.
  template <class Source>
  void hold(const Source& source, int64_t n, int64_t p) {
    for (int64_t h = p; h < p + 3; ++h) {
      int64_t& held = held_[h % kSlots];
      const int64_t wanted = n * (s_.H + 2 * s_.padding) + h;
      if (held == wanted) continue;
      const float* x =
          padded_rows(source, s_.padding, n, h, h + 1, workspace(Purpose::kHeldInput, width_ * s_.C));
      transform_row(x, width_, s_.C, tiles_, v_ + h % kSlots * tiles_ * kTileFloats);
      held = wanted;
    }
  }
  const float* row(int64_t h) const { return v_ + h % kSlots * tiles_ * kTileFloats; }

 private:
  static constexpr int64_t kSlots = 4;

  ConvShape s_;
  int64_t width_, tiles_;
  float* v_;
  int64_t held_[kSlots] = {-1, -1, -1, -1};
};

/// What becomes of a row's sums: y [Q][K] = sum + bias, through ReLU where `relu` says so, and then past the
/// caches where `streamed` does.
struct RowOutput {
  const float* bias;  // [K]
  bool relu, streamed;
  int64_t Q, K;
  float* y;
};

/// y[4t.., k..] of kRowTiles tiles from t on and the vector of channels from k on; rows: V of three rows, u:
/// the channels' U.
inline void row_tile(const float* const (&rows)[3], int64_t t, const float* u, int64_t C, int64_t k,
                     const RowOutput& out) {
  Vec acc[kRowTiles][F4::kIn];
#pragma GCC unroll 4
  for (int i = 0; i < kRowTiles; ++i) {
#pragma GCC unroll 6
    for (int j = 0; j < F4::kIn; ++j) acc[i][j] = Vec{};
  }
  for (const float* row : rows) {
    const float* v = row + t * kTileFloats;
    for (int64_t c = 0; c < C; ++c, ++v, u += F4::kIn * kLanes) {
#pragma GCC unroll 6
      for (int j = 0; j < F4::kIn; ++j) {
        const Vec u_j = load(u + j * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kRowTiles; ++i) acc[i][j] += broadcast(v[i * kTileFloats + j * kQuad]) * u_j;
      }
    }
  }
  const int64_t lanes = out.K - k;
  const Vec bias = load(out.bias + k, lanes);
  float* y = out.y + t * F4::kOut * out.K + k;
  const auto save = [&](const auto& put) MASKCORE_INLINE {
#pragma GCC unroll 4
    for (int i = 0; i < kRowTiles; ++i, y += F4::kOut * out.K) {
      Vec sum[F4::kOut];
      transform_output(acc[i], sum);
#pragma GCC unroll 4
      for (int q = 0; q < F4::kOut; ++q) put(y + q * out.K, sum[q] + bias, (t + i) * F4::kOut + q);
    }
  };
  // Without a branch for each vector where it can be: the products are few.
  if (lanes < kLanes || !out.relu || (t + kRowTiles) * F4::kOut > out.Q) {
    save([&](float* to, Vec sum, int64_t q) MASKCORE_INLINE {
      if (q < out.Q) store(to, out.relu ? relu(sum) : sum, lanes);
    });
  } else if (out.streamed) {
    save([](float* to, Vec sum, int64_t) MASKCORE_INLINE { stream(to, relu(sum)); });
  } else {
    save([](float* to, Vec sum, int64_t) MASKCORE_INLINE { store(to, relu(sum)); });
  }
}

/// Row p of the output; `transformed` holds the input's rows p to p + 2, u is transform_rows_of_filter(..).
inline void convolve_row(const TransformedRows& transformed, int64_t p, const float* u, int64_t C,
                         const RowOutput& out) {
  const float* const rows[3] = {transformed.row(p), transformed.row(p + 1), transformed.row(p + 2)};
  for (int64_t t = 0; t * F4::kOut < out.Q; t += kRowTiles) {
    for (int64_t k = 0; k < out.K; k += kLanes) row_tile(rows, t, u + k * 3 * C * F4::kIn, C, k, out);
  }
}

/// As convolve (conv_direct.h), by whichever way is better for a forward pass.
template <class Source, class OutRow, class Finish>
void convolve_forward(const ConvShape& s, int64_t P, int64_t Q, const Source& source, const float* weight,
                      const float* bias, bool relu, bool streamed, const OutRow& out_row,
                      const Finish& finish) {
  if (!is_first_layer(s)) {
    convolve(s, P, Q, source, pack_filter(weight, s, /*turned=*/false), bias, relu, streamed, out_row,
             finish);
    return;
  }
  const float* u = transform_rows_of_filter(weight, s, Purpose::kFilter);
  const int64_t blocks = ceil_div(P, kMaxRowBlock);
  torch::stable::parallel_for(0, s.N * blocks, 1, [&](int64_t begin, int64_t end) {
    PhaseClock clock;
    TransformedRows transformed(s);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks, first = task % blocks * kMaxRowBlock,
                    last = std::min(P, first + kMaxRowBlock);
      for (int64_t p = first; p < last; ++p) {
        transformed.hold(source, n, p);
        convolve_row(transformed, p, u, s.C,
                     {.bias = bias,
                      .relu = relu,
                      .streamed = streamed,
                      .Q = Q,
                      .K = s.K,
                      .y = out_row(n, p, p - first)});
      }
      finish(n, first, last);
    }
    if (streamed) stream_fence();
    clock.end(Phase::kDirect);
  });
}

}  // namespace maskcore
