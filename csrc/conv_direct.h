// 3x3 stride-1 convolution as an implicit matrix product, all three passes:
//   forward          y[n,p,q,k]   = b[k] + sum over r,s,c of x[n,p+r,q+s,c] w[k,c,r,s]
//   backward data    the same, of the gradient with the filter turned by 180 degrees
//   backward weight  dw[k,c,r,s]  = sum over n,p,q of x[n,p+r,q+s,c] g[n,p,q,k]
// (x already padded). In NHWC the taps s = 0..2 of one filter row are 3C adjacent floats, so each
// register tile is three plain runs of broadcast-multiply-add; nothing is copied to im2col form.
// The register blocking follows Goto & van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication" (ACM TOMS 2008). Every sum runs in an order fixed by the shape alone: results are
// bit-identical from run to run and for any number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "phases.h"
#include "register_tile.h"
#include "shapes.h"
#include "sources.h"
#include "vector.h"
#include "workspace.h"

namespace maskcore {

// Rows are worked on in blocks whose operands stay in a core's L2 (512 KiB and up): input rows,
// output rows and one filter panel (9 * 256 * 16 * 4 = 147 KB at the widest layer) together.
inline constexpr int64_t kRowBlockFloats = 48 * 1024;
inline constexpr int64_t kMaxRowBlock = 16;

/// Rows of output a task computes: even, so that a block holds whole 2x2 pooling windows.
inline int64_t row_block(int64_t width, int64_t channels) {
  return std::clamp<int64_t>(kRowBlockFloats / (width * channels) / 2 * 2, 2, kMaxRowBlock);
}

// ---- filters ---------------------------------------------------------------------------------

/// Filter panels [K / kTileColumns][9 C][kTileColumns], zero-padded in K; rows in the order r, s, c.
/// `turned` packs the filter of the backward-data pass: turned by 180 degrees, C and K exchanged.
inline const float* pack_filter(const float* weight, const ConvShape& s, bool turned,
                                Purpose purpose = Purpose::kFilter) {
  const int64_t panels = ceil_div(s.K, kTileColumns), depth = kTaps * s.C;
  float* packed = workspace(purpose, panels * depth * kTileColumns);
  torch::stable::parallel_for(0, panels, 1, [=](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      float* out = packed + panel * depth * kTileColumns;
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        for (int64_t c = 0; c < s.C; ++c, out += kTileColumns) {
          for (int64_t j = 0; j < kTileColumns; ++j) {
            const int64_t k = panel * kTileColumns + j;
            out[j] = k >= s.K ? 0.0f
                     : turned ? weight[(c * s.K + k) * kTaps + (kTaps - 1 - tap)]
                              : weight[(k * s.C + c) * kTaps + tap];
          }
        }
      }
    }
  });
  return packed;
}

// ---- forward ---------------------------------------------------------------------------------

/// What the innermost function needs of its surroundings.
struct ConvTile {
  const float* x;  // first tap of the tile's first pixel; pixels are C apart
  int64_t pitch;   // floats from one input row to the next
  int64_t C;
  const float* w;     // [9 C][kTileColumns]
  const float* bias;  // [lanes], or null
  bool relu;
  float* y;  // the tile's first output; pixels are K apart
  int64_t K;
  int64_t lanes;  // output channels of this panel, 1..kTileColumns
  bool streamed;  // whole vectors that went through ReLU are written past the caches
};

/// M pixels times kTileColumns output channels: M * 2 accumulators + 2 of w + 1 of x.
template <int M>
void conv_tile(const ConvTile& t) {
  Vec acc[M][kTileVectors];
#pragma GCC unroll 2
  for (int j = 0; j < kTileVectors; ++j) {
    const Vec bias = t.bias == nullptr ? Vec{} : load(t.bias + j * kLanes, t.lanes - j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) acc[i][j] = bias;
  }
  const float* w = t.w;
  for (int64_t r = 0; r < 3; ++r) {
    const float* x = t.x + r * t.pitch;
    for (int64_t sc = 0; sc < 3 * t.C; ++sc, w += kTileColumns) tile_step<M>(acc, x + sc, t.C, w);
  }
  // Without a branch for each vector where it can be: the first layer's 27 steps are few.
  const auto save = [&](const auto& put) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kTileVectors; ++j) put(t.y + i * t.K + j * kLanes, acc[i][j], j);
    }
  };
  if (t.lanes < kTileColumns || !t.relu) {
    save([&](float* out, Vec sum, int j) { store(out, t.relu ? relu(sum) : sum, t.lanes - j * kLanes); });
  } else if (t.streamed) {
    save([](float* out, Vec sum, int) { stream(out, relu(sum)); });
  } else {
    save([](float* out, Vec sum, int) { store(out, relu(sum)); });
  }
}

/// A row of Q outputs; x and y are those of its first pixel.
inline void conv_row(ConvTile t, const float* x, float* y, int64_t Q) {
  for_each_tile(Q, [&]<int M>(int64_t q) {
    t.x = x + q * t.C;
    t.y = y + q * t.K;
    conv_tile<M>(t);
  });
}

/// y[n,p,q,:] for every n and the first `P`, `Q` rows and columns of the output.
///   source    rows of the unpadded input
///   filter    pack_filter(...)
///   streamed  whether the output, which goes through ReLU, may be written past the caches
///   out_row   (n, p, slot) -> float*: where row p of image n goes, [Q][K]; slot = p - the block's first row
///   finish    (n, begin, end): called when rows [begin, end) of image n are complete
template <class Source, class OutRow, class Finish>
void convolve(const ConvShape& s, int64_t P, int64_t Q, const Source& source, const float* filter,
              const float* bias, bool relu, bool streamed, const OutRow& out_row, const Finish& finish) {
  const int64_t width = s.W + 2 * s.padding, pitch = width * s.C;
  const int64_t rows = row_block(std::max(width, Q), std::max(s.C, s.K)), blocks = ceil_div(P, rows);
  const int64_t panels = ceil_div(s.K, kTileColumns);
  torch::stable::parallel_for(0, s.N * blocks, 1, [&](int64_t begin, int64_t end) {
    PhaseClock clock;
    float* scratch = workspace(Purpose::kRows, (rows + 2) * pitch);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks, first = task % blocks * rows, last = std::min(P, first + rows);
      const float* x = padded_rows(source, s.padding, n, first, last + 2, scratch);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t k = panel * kTileColumns;
        const ConvTile t{.x = nullptr,
                         .pitch = pitch,
                         .C = s.C,
                         .w = filter + k * kTaps * s.C,
                         .bias = bias == nullptr ? nullptr : bias + k,
                         .relu = relu,
                         .y = nullptr,
                         .K = s.K,
                         .lanes = std::min<int64_t>(kTileColumns, s.K - k),
                         .streamed = streamed};
        for (int64_t p = first; p < last; ++p) {
          conv_row(t, x + (p - first) * pitch, out_row(n, p, p - first) + k, Q);
        }
      }
      finish(n, first, last);
    }
    if (streamed) stream_fence();
    clock.end(Phase::kDirect);
  });
}

/// dx [N,H,W,C] of a convolution with the given filter; `gradient` gives rows of the gradient at its
/// output, [P][Q][K].
template <class Gradient>
void convolve_backward_data(const ConvShape& s, const Gradient& gradient, const float* weight, float* dx) {
  const ConvShape b = s.backward_data();
  const float* filter = pack_filter(weight, b, /*turned=*/true);
  convolve(
      b, s.H, s.W, gradient, filter, nullptr, /*relu=*/false, /*streamed=*/false,
      [=](int64_t n, int64_t h, int64_t) { return dx + (n * s.H + h) * s.W * s.C; },
      [](int64_t, int64_t, int64_t) {});
}

// ---- backward weight -------------------------------------------------------------------------

/// acc[i][j] += sum over pixels of x[pixel][i] g[pixel][j]: an M x kTileColumns tile of dw.
/// x is a panel of M channels, g one of kTileColumns; `rows` runs of `Q` pixels, x's are x_pitch apart.
template <int M>
void conv_weight_tile(const float* x, int64_t x_pitch, const float* g, int64_t rows, int64_t Q, float* dw) {
  Vec acc[M][kTileVectors] = {};
  for (int64_t p = 0; p < rows; ++p) {
    const float* xp = x + p * x_pitch;
    for (int64_t q = 0; q < Q; ++q, xp += M, g += kTileColumns) tile_step<M>(acc, xp, 1, g);
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) {
      float* out = dw + i * kTileColumns + j * kLanes;
      store(out, load(out) + acc[i][j]);
    }
  }
}

/// sum[j] = the sum over chunks of p[chunk * stride + j], in the chunks' order.
inline void sum_chunks(const float* p, int64_t stride, int64_t chunks, float sum[kTileColumns]) {
  Vec total[kTileVectors] = {};
  for (int64_t chunk = 0; chunk < chunks; ++chunk, p += stride) {
    for (int j = 0; j < kTileVectors; ++j) total[j] += load(p + j * kLanes);
  }
  for (int j = 0; j < kTileVectors; ++j) store(sum + j * kLanes, total[j]);
}

// Pixels that a weight tile sums in registers: long enough to hide the 2 M loads and stores of its
// accumulators, short enough that both panels (4 (6 + 16) * 256 = 23 KB) stay in L1.
inline constexpr int64_t kWeightPixels = 256;
// Pieces the pass is cut into, each with a partial dw of its own. The number is fixed so that the
// order of the sum does not depend on the threads; 32 pieces keep 16 cores busy.
inline constexpr int64_t kDirectPieces = 32;
// Output channels of one piece: a wider piece packs x less often, a narrower one has a smaller dw.
inline constexpr int64_t kWeightChannels = 64;

/// dw [K,C,3,3] and db [K]. `input` gives rows of x, `gradient` rows of the gradient at the
/// convolution's output; `db` may be null.
template <class Input, class Gradient>
void convolve_backward_weight(const ConvShape& s, const Input& input, const Gradient& gradient, float* dw,
                              float* db) {
  const int64_t width = s.W + 2 * s.padding;
  const int64_t k_parts = ceil_div(s.K, kWeightChannels), part_panels = kWeightChannels / kTileColumns;
  const int64_t image_rows = s.N * s.P;
  const int64_t chunks = std::max<int64_t>(1, std::min(image_rows, kDirectPieces / k_parts));
  const int64_t panels = ceil_div(s.K, kTileColumns);
  const int64_t panel_floats = kTaps * s.C * kTileColumns, partial_floats = panels * panel_floats;
  const int64_t rows_max = std::clamp<int64_t>(kWeightPixels / s.Q, 1, 16);
  // partial: [chunk][panel][tap][c][kTileColumns]; then the bias gradient [chunk][panel][kTileColumns]
  float* partial = workspace(Purpose::kPartial, chunks * (partial_floats + panels * kTileColumns));
  float* partial_db = partial + chunks * partial_floats;

  torch::stable::parallel_for(0, chunks * k_parts, 1, [&](int64_t begin, int64_t end) {
    PhaseClock clock;
    float* row = workspace(Purpose::kRows, std::max(width * s.C, s.Q * s.K));
    float* x_panels = workspace(Purpose::kInputPanel, (rows_max + 2) * width * s.C);
    float* g_panels = workspace(Purpose::kGradientPanel, part_panels * rows_max * s.Q * kTileColumns);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t chunk = piece / k_parts, part = piece % k_parts;
      const int64_t first_panel = part * part_panels,
                    last_panel = std::min(panels, first_panel + part_panels);
      float* dw_chunk = partial + chunk * partial_floats;
      float* db_chunk = partial_db + chunk * panels * kTileColumns;
      std::fill(dw_chunk + first_panel * panel_floats, dw_chunk + last_panel * panel_floats, 0.0f);
      std::fill(db_chunk + first_panel * kTileColumns, db_chunk + last_panel * kTileColumns, 0.0f);

      const int64_t chunk_end = (chunk + 1) * image_rows / chunks;
      for (int64_t i = chunk * image_rows / chunks; i < chunk_end;) {
        const int64_t n = i / s.P, p = i % s.P, rows = std::min({rows_max, s.P - p, chunk_end - i});
        const int64_t x_pitch = width * s.C;
        // x_panels: [row][channel tile][pixel][M]. Tiles of a row lie one behind another, so the tile
        // that starts at channel c starts at width * c.
        for (int64_t h = 0; h < rows + 2; ++h) {
          const float* x = padded_rows(input, s.padding, n, p + h, p + h + 1, row);
          float* out = x_panels + h * x_pitch;
          for_each_tile(s.C, [&]<int M>(int64_t c) {
            for (int64_t w = 0; w < width; ++w) {
              std::memcpy(out + (width * c + w * M), x + w * s.C + c, M * sizeof(float));
            }
          });
        }
        // g_panels: [panel][row][q][kTileColumns], zero-padded in K
        for (int64_t pp = 0; pp < rows; ++pp) {
          const float* g = padded_rows(gradient, 0, n, p + pp, p + pp + 1, row);
          for (int64_t panel = first_panel; panel < last_panel; ++panel) {
            const int64_t k = panel * kTileColumns, lanes = std::min<int64_t>(kTileColumns, s.K - k);
            float* out = g_panels + ((panel - first_panel) * rows + pp) * s.Q * kTileColumns;
            Vec sum[kTileVectors] = {};
            for (int64_t q = 0; q < s.Q; ++q, out += kTileColumns) {
              for (int j = 0; j < kTileVectors; ++j) {
                const Vec v = load(g + q * s.K + k + j * kLanes, lanes - j * kLanes);
                store(out + j * kLanes, v);
                sum[j] += v;
              }
            }
            for (int j = 0; j < kTileVectors; ++j) {
              float* total = db_chunk + k + j * kLanes;
              store(total, load(total) + sum[j]);
            }
          }
        }
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
          const float* g = g_panels + (panel - first_panel) * rows * s.Q * kTileColumns;
          for_each_tile(s.C, [&]<int M>(int64_t c) {
            for (int64_t tap = 0; tap < kTaps; ++tap) {
              const float* x = x_panels + tap / 3 * x_pitch + width * c + tap % 3 * M;
              float* out = dw_chunk + panel * panel_floats + (tap * s.C + c) * kTileColumns;
              conv_weight_tile<M>(x, x_pitch, g, rows, s.Q, out);
            }
          });
        }
        i += rows;
      }
    }
    clock.end(Phase::kDirect);
  });

  torch::stable::parallel_for(0, panels * kTaps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / kTaps, tap = task % kTaps, k = panel * kTileColumns;
      const int64_t lanes = std::min<int64_t>(kTileColumns, s.K - k);
      for (int64_t c = 0; c < s.C; ++c) {
        float sum[kTileColumns];
        sum_chunks(partial + panel * panel_floats + (tap * s.C + c) * kTileColumns, partial_floats, chunks,
                   sum);
        for (int64_t j = 0; j < lanes; ++j) dw[((k + j) * s.C + c) * kTaps + tap] = sum[j];
      }
      if (db != nullptr && tap == 0) {
        float sum[kTileColumns];
        sum_chunks(partial_db + k, panels * kTileColumns, chunks, sum);
        std::copy(sum, sum + lanes, db + k);
      }
    }
  });
}

}  // namespace maskcore
