// 3x3 stride-1 convolution by Winograd's minimal filtering F(4x4, 3x3): 36 multiplications a channel pair
// for 16 outputs instead of 144 (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", 2015).
//
// One dimension first. Four outputs of a 3-tap filter are y = A^T [(G g) . (B^T d)] with d the 6 inputs
// (Toom & Cook: polynomials are multiplied by their values at 6 points and interpolated; transposed).
// For the points p in 0, +-a, +-b and infinity, with m(x) = x (x^2 - a^2) (x^2 - b^2):
//   row p of G      (1, p, p^2) / m'(p);          infinity: (0, 0, 1)
//   row p of B^T    coefficients of m(x)/(x - p);  infinity: those of m(x)
//   column p of A^T (1, p, p^2, p^3);              infinity: (0, 0, 0, 1)
// a = 5/8 and b = 3/2 are exact in binary and give half the rounding error of the usual 1 and 2.
// In two dimensions every transform is applied to the columns and then to the rows:
//   forward          Y  = A^T [U . V] A,   U = G g G^T,  V = B^T X B
//   backward data    the forward pass of the gradient with the filter turned by 180 degrees
//   backward weight  dg = G^T [sum over tiles of V . dM] G,  dM = A dY A^T   (the exact adjoint)
// The products over channels (forward) or tiles (backward weight) are 36 matrix products, one a component.
//
// A block of tiles is transformed, multiplied and transformed back while it lies in a core's L2 cache.
// A number of the output depends on its tile alone, and every sum over tiles runs in their order:
// results are bit-identical from run to run and for any number of threads. A NaN or an infinity in the
// input reaches all outputs of the tiles that see it, a few more than in the direct convolution.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "register_tile.h"
#include "shapes.h"
#include "sources.h"
#include "vector.h"
#include "workspace.h"

namespace maskcore {

inline constexpr int kOut = 4;                 // outputs of a tile, in each direction
inline constexpr int kIn = 6;                  // inputs of a tile
inline constexpr int kComponents = kIn * kIn;  // matrix products

/// Whether Winograd is the faster way for a shape, by counting vector operations a lane: the direct
/// convolution's 9 multiply-adds an output and channel, against a tile's 36 and its transforms, and the
/// filter's. MASKCORE_CONV=direct|winograd overrides, to compare the two.
inline bool use_winograd(const ConvShape& s) {
  const char* wanted = std::getenv("MASKCORE_CONV");
  if (wanted != nullptr && *wanted != '\0') {
    const std::string_view name = wanted;
    STD_TORCH_CHECK(name == "direct" || name == "winograd", "MASKCORE_CONV must be direct or winograd, is ",
                    wanted);
    if (s.N > 0) return name == "winograd";
  }
  constexpr int64_t kInputOperations = 300, kOutputOperations = 200, kFilterOperations = 100;
  const int64_t C = ceil_div(s.C, kLanes) * kLanes, K = ceil_div(s.K, kLanes) * kLanes;
  const int64_t tiles = s.N * ceil_div(s.P, kOut) * ceil_div(s.Q, kOut);
  return tiles * (kComponents * s.C * K + kInputOperations * C + kOutputOperations * K) +
             kFilterOperations * s.C * K <
         kTaps * s.C * K * s.N * s.P * s.Q;
}

// ---- transforms of one dimension -------------------------------------------------------------

inline constexpr float kA = 0.625f, kB = 1.5f;
inline constexpr float kA2 = kA * kA, kB2 = kB * kB;
// 1 / m'(p) at 0, at +-a and at +-b
inline constexpr float kNorm0 = 1 / (kA2 * kB2), kNormA = 1 / (2 * kA2 * (kA2 - kB2)),
                       kNormB = 1 / (2 * kB2 * (kB2 - kA2));

/// B^T: 6 inputs -> values at 0, a, -a, b, -b, infinity.
inline void transform_input(const Vec (&d)[kIn], Vec (&v)[kIn]) {
  const Vec even_a = d[4] - kB2 * d[2], odd_a = kA * (d[3] - kB2 * d[1]);
  const Vec even_b = d[4] - kA2 * d[2], odd_b = kB * (d[3] - kA2 * d[1]);
  v[0] = kA2 * kB2 * d[0] + (d[4] - (kA2 + kB2) * d[2]);
  v[1] = even_a + odd_a;
  v[2] = even_a - odd_a;
  v[3] = even_b + odd_b;
  v[4] = even_b - odd_b;
  v[5] = kA2 * kB2 * d[1] + (d[5] - (kA2 + kB2) * d[3]);
}

/// A^T: products -> 4 outputs.
inline void transform_output(const Vec (&m)[kIn], Vec (&y)[kOut]) {
  const Vec sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  const Vec sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  y[0] = m[0] + (sum_a + sum_b);
  y[1] = kA * difference_a + kB * difference_b;
  y[2] = kA2 * sum_a + kB2 * sum_b;
  y[3] = kA2 * kA * difference_a + (kB2 * kB * difference_b + m[5]);
}

/// A: the adjoint of transform_output.
inline void transform_gradient(const Vec (&y)[kOut], Vec (&m)[kIn]) {
  const Vec even_a = y[0] + kA2 * y[2], odd_a = kA * (y[1] + kA2 * y[3]);
  const Vec even_b = y[0] + kB2 * y[2], odd_b = kB * (y[1] + kB2 * y[3]);
  m[0] = y[0];
  m[1] = even_a + odd_a;
  m[2] = even_a - odd_a;
  m[3] = even_b + odd_b;
  m[4] = even_b - odd_b;
  m[5] = y[3];
}

/// G: 3 taps -> their values at the points.
inline void transform_filter(const Vec (&g)[3], Vec (&u)[kIn]) {
  const Vec even_a = kNormA * (g[0] + kA2 * g[2]), odd_a = kNormA * kA * g[1];
  const Vec even_b = kNormB * (g[0] + kB2 * g[2]), odd_b = kNormB * kB * g[1];
  u[0] = kNorm0 * g[0];
  u[1] = even_a + odd_a;
  u[2] = even_a - odd_a;
  u[3] = even_b + odd_b;
  u[4] = even_b - odd_b;
  u[5] = g[2];
}

/// G^T: the adjoint of transform_filter.
inline void transform_filter_gradient(const Vec (&u)[kIn], Vec (&g)[3]) {
  const Vec even_a = kNormA * (u[1] + u[2]), odd_a = kNormA * (u[1] - u[2]);
  const Vec even_b = kNormB * (u[3] + u[4]), odd_b = kNormB * (u[3] - u[4]);
  g[0] = kNorm0 * u[0] + (even_a + even_b);
  g[1] = kA * odd_a + kB * odd_b;
  g[2] = kA2 * even_a + (kB2 * even_b + u[5]);
}

/// T applied to the columns and then to the rows of a From x From square:
/// load(i, j) -> Vec gives its elements, save(i, j, Vec) takes those of the To x To result.
template <int From, int To, class Load, class Save>
inline __attribute__((always_inline)) void transform_square(void (&transform)(const Vec (&)[From],
                                                                              Vec (&)[To]),
                                                            const Load& load, const Save& save) {
  Vec half[To][From];
#pragma GCC unroll 6
  for (int j = 0; j < From; ++j) {
    Vec column[From], transformed[To];
#pragma GCC unroll 6
    for (int i = 0; i < From; ++i) column[i] = load(i, j);
    transform(column, transformed);
#pragma GCC unroll 6
    for (int i = 0; i < To; ++i) half[i][j] = transformed[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < To; ++i) {
    Vec row[To];
    transform(half[i], row);
#pragma GCC unroll 6
    for (int j = 0; j < To; ++j) save(i, j, row[j]);
  }
}

// ---- filters ---------------------------------------------------------------------------------

/// U: [36][panels of K][C][kTileColumns], zero-padded in K. `turned` is as in pack_filter.
inline const float* transform_filters(const float* weight, const ConvShape& s, bool turned) {
  const int64_t panels = ceil_div(s.K, kTileColumns), component = panels * s.C * kTileColumns;
  float* transformed = workspace(Purpose::kFilter, kComponents * component);
  torch::stable::parallel_for(0, panels * s.C, 16, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t panel = row / s.C, c = row % s.C, first = panel * kTileColumns;
      const int64_t lanes = std::min<int64_t>(kTileColumns, s.K - first);
      alignas(kVectorBytes) float taps[kTaps][kTileColumns] = {};
      for (int64_t j = 0; j < lanes; ++j) {
        const int64_t k = first + j;
        const float* g = weight + (turned ? c * s.K + k : k * s.C + c) * kTaps;
        for (int64_t tap = 0; tap < kTaps; ++tap) taps[tap][j] = g[turned ? kTaps - 1 - tap : tap];
      }
      for (int j = 0; j < kTileColumns; j += kLanes) {
        transform_square<3, kIn>(
            transform_filter, [&](int r, int t) { return load(taps[3 * r + t] + j); },
            [&](int r, int t, Vec u) {
              store(transformed + (kIn * r + t) * component + row * kTileColumns + j, u);
            });
      }
    }
  });
  return transformed;
}

// ---- tiles -----------------------------------------------------------------------------------

struct Tile {
  int64_t n, p, q;        // image, first output row and column
  int64_t height, width;  // outputs inside the image, 1..4
  bool whole() const { return height == kOut && width == kOut; }
};

/// The 4x4 tiles that cover the first P x Q outputs of N images, numbered image by image, row by row.
struct TileGrid {
  int64_t N, P, Q;
  int64_t rows = ceil_div(P, kOut);
  int64_t columns = ceil_div(Q, kOut);
  int64_t tiles = N * rows * columns;

  int64_t number(const Tile& tile) const { return (tile.n * rows + tile.p / kOut) * columns + tile.q / kOut; }
};

/// f(Tile, its number - begin) for the tiles [begin, end).
template <class F>
void for_each_grid_tile(const TileGrid& grid, int64_t begin, int64_t end, const F& f) {
  int64_t column = begin % grid.columns, row = begin / grid.columns % grid.rows,
          n = begin / grid.columns / grid.rows;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t p = row * kOut, q = column * kOut;
    f(Tile{.n = n,
           .p = p,
           .q = q,
           .height = std::min<int64_t>(kOut, grid.P - p),
           .width = std::min<int64_t>(kOut, grid.Q - q)},
      i - begin);
    if (++column == grid.columns) {
      column = 0;
      if (++row == grid.rows) {
        row = 0;
        ++n;
      }
    }
  }
}

/// V of one tile, whose first input is at (h, w), which may be in the margin of zeros.
/// place(component, c) -> float* is where kLanes numbers from channel c on go.
template <class Source, class Place>
void load_input_tile(const Source& source, int64_t n, int64_t h, int64_t w, const Place& place) {
  const bool inside = h >= 0 && w >= 0 && h + kIn <= source.H && w + kIn <= source.W;
  const auto transform = [&](const auto& load) {
    for_each_vector(source.C, [&](int64_t c, auto lanes) {
      transform_square<kIn, kIn>(
          transform_input, [&](int i, int j) { return load(h + i, w + j, c, lanes); },
          [&](int i, int j, Vec v) { store(place(kIn * i + j, c), v); });
    });
  };
  if (inside) {
    transform([&](int64_t y, int64_t x, int64_t c, auto lanes) { return source.load(n, y, x, c, lanes); });
  } else {
    transform([&](int64_t y, int64_t x, int64_t c, auto lanes) {
      return y >= 0 && x >= 0 && y < source.H && x < source.W ? source.load(n, y, x, c, lanes) : Vec{};
    });
  }
}

/// dM of one tile of the gradient, as load_input_tile; sum[c] += the gradient of the tile's outputs.
template <class Gradient, class Place>
void load_gradient_tile(const Gradient& gradient, const Tile& tile, const Place& place, float* sum) {
  const auto transform = [&](const auto& load) {
    for_each_vector(gradient.C, [&](int64_t c, auto lanes) {
      Vec total = maskcore::load(sum + c, lanes);
      transform_square<kOut, kIn>(
          transform_gradient,
          [&](int i, int j) {
            const Vec g = load(i, j, c, lanes);
            total += g;
            return g;
          },
          [&](int i, int j, Vec m) { store(place(kIn * i + j, c), m); });
      store(sum + c, total, lanes);
    });
  };
  if (tile.whole()) {
    transform([&](int i, int j, int64_t c, auto lanes) {
      return gradient.load(tile.n, tile.p + i, tile.q + j, c, lanes);
    });
  } else {
    transform([&](int i, int j, int64_t c, auto lanes) {
      return i < tile.height && j < tile.width ? gradient.load(tile.n, tile.p + i, tile.q + j, c, lanes)
                                               : Vec{};
    });
  }
}

// ---- forward ---------------------------------------------------------------------------------

// V and M of a block of tiles lie in L2 together: 36 * 4 * (C + kOutputChannels) bytes a tile.
inline constexpr int64_t kBlockBytes = (kVectorBytes == 64 ? 896 : 448) * 1024;
inline constexpr int64_t kOutputChannels = 64;

/// The number of blocks that the tiles are cut into; it depends on the shape alone, as block sums must.
inline int64_t block_count(const TileGrid& grid, int64_t C, int64_t K) {
  const int64_t tile_bytes = kComponents * 4 * (C + std::min(K, kOutputChannels));
  const int64_t wanted = std::clamp<int64_t>(kBlockBytes / tile_bytes / kTileRows, 2, 8) * kTileRows;
  const int64_t blocks = ceil_div(grid.tiles, wanted);
  return std::min(grid.tiles, blocks + blocks % 2);  // even, for two cores
}

/// m[i][:] = sum over c of v[i][c] u[c][:], an M x kTileColumns tile of a component's product.
template <int M>
void multiply_tile(const float* v, int64_t v_pitch, const float* u, int64_t C, float* m, int64_t m_pitch) {
  Vec acc[M][kTileVectors] = {};
  for (int64_t c = 0; c < C; ++c, u += kTileColumns) tile_step<M>(acc, v + c, v_pitch, u);
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) store(m + i * m_pitch + j * kLanes, acc[i][j]);
  }
}

/// Computes the outputs of `grid`, the first rows and columns of the whole output.
///   source  the unpadded input
///   filter  transform_filters(...)
///   sink    sink.save(block, tile, k, lanes, y): takes the 4x4 outputs of channels [k, k + lanes);
///           what is beyond the tile's height and width is meaningless
template <class Source, class Sink>
void convolve_winograd(const ConvShape& s, const TileGrid& grid, const Source& source, const float* filter,
                       const Sink& sink) {
  constexpr int64_t kLine = 16;  // a component's first line must not share cache sets with the next one's
  const int64_t panels = ceil_div(s.K, kTileColumns), blocks = block_count(grid, s.C, s.K);
  const int64_t block_tiles = ceil_div(grid.tiles, blocks);
  const int64_t v_pitch = ceil_div(s.C, kLanes) * kLanes, v_component = block_tiles * v_pitch + kLine;
  const int64_t pass_panels = std::min<int64_t>(panels, kOutputChannels / kTileColumns);
  const int64_t m_pitch = pass_panels * kTileColumns, m_component = block_tiles * m_pitch + kLine;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first_block, int64_t last_block) {
    float* v = workspace(Purpose::kInputPanel, kComponents * v_component);
    float* m = workspace(Purpose::kConvolved, kComponents * m_component);
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t begin = block * grid.tiles / blocks, end = (block + 1) * grid.tiles / blocks;
      for_each_grid_tile(grid, begin, end, [&](const Tile& tile, int64_t i) {
        load_input_tile(source, tile.n, tile.p - s.padding, tile.q - s.padding,
                        [=](int component, int64_t c) { return v + component * v_component + i * v_pitch + c; });
      });
      for (int64_t first = 0; first < panels; first += pass_panels) {
        const int64_t last = std::min(panels, first + pass_panels);
        for (int64_t component = 0; component < kComponents; ++component) {
          for (int64_t panel = first; panel < last; ++panel) {
            const float* u = filter + (component * panels + panel) * s.C * kTileColumns;
            float* m_panel = m + component * m_component + (panel - first) * kTileColumns;
            for_each_tile(end - begin, [&]<int M>(int64_t i) {
              multiply_tile<M>(v + component * v_component + i * v_pitch, v_pitch, u, s.C,
                               m_panel + i * m_pitch, m_pitch);
            });
          }
        }
        const int64_t first_k = first * kTileColumns, channels = std::min(s.K - first_k, m_pitch);
        for_each_grid_tile(grid, begin, end, [&](const Tile& tile, int64_t i) {
          for_each_vector(channels, [&](int64_t k, auto lanes) {
            Vec y[kOut][kOut];
            const float* products = m + i * m_pitch + k;
            transform_square<kIn, kOut>(
                transform_output,
                [&](int r, int t) { return load(products + (kIn * r + t) * m_component); },
                [&](int r, int t, Vec value) { y[r][t] = value; });
            sink.save(block, tile, first_k + k, lanes, y);
          });
        });
      }
    }
  });
}

/// y = the convolution plus `bias` (may be null), through ReLU if `relu`.
template <bool kRelu>
struct StoreOutput {
  float* y;  // [N,P,Q,K]
  int64_t P, Q, K;
  const float* bias;

  template <class Lanes>
  void save(int64_t, const Tile& tile, int64_t k, Lanes lanes, const Vec (&y_tile)[kOut][kOut]) const {
    const Vec b = bias == nullptr ? Vec{} : load(bias + k, lanes);
    float* out = y + ((tile.n * P + tile.p) * Q + tile.q) * K + k;
    for (int64_t i = 0; i < tile.height; ++i) {
      for (int64_t j = 0; j < tile.width; ++j) {
        const Vec v = y_tile[i][j] + b;
        store(out + (i * Q + j) * K, kRelu ? relu(v) : v, lanes);
      }
    }
  }
};

/// dx [N,H,W,C] of a convolution with the given filter; `gradient` gives the gradient at its output.
template <class Gradient>
void convolve_backward_data_winograd(const ConvShape& s, const Gradient& gradient, const float* weight,
                                     float* dx) {
  const ConvShape b = s.backward_data();
  const float* filter = transform_filters(weight, b, /*turned=*/true);
  convolve_winograd(b, TileGrid{.N = s.N, .P = s.H, .Q = s.W}, gradient, filter,
                    StoreOutput<false>{.y = dx, .P = s.H, .Q = s.W, .K = s.C, .bias = nullptr});
}

// ---- backward weight -------------------------------------------------------------------------

// Two ways to share the work out. Where dU is small, the tiles are cut into a fixed number of pieces, each with
// a dU of its own, and a piece works on blocks of tiles whose V and dM lie in L2. Where dU is large, all cores
// transform a batch of tiles into the shared L3 and then share out the components of one dU.
inline constexpr int64_t kWeightPieces = 16;
inline constexpr int64_t kPieceBytes = 1024 * 1024;      // the largest dU of a piece
inline constexpr int64_t kBatchBytes = 8 * 1024 * 1024;  // V and dM of a batch
// Tiles that a register tile sums at once: both panels, 2 * 4 * kTileColumns bytes a tile, lie in L1.
inline constexpr int64_t kSumTiles = 128;
// Tiles that are transformed together, with a partial bias gradient of their own.
inline constexpr int64_t kGroupTiles = 16;

/// du[i][:] (+)= sum over tiles of v[tile][i] m[tile][:], an M x kTileColumns tile of a component of dU.
/// Tiles are kTileColumns floats apart in both.
template <int M>
void multiply_weight_tile(const float* v, const float* m, int64_t tiles, bool add, float* du) {
  Vec acc[M][kTileVectors] = {};
  for (int64_t i = 0; i < tiles; ++i) tile_step<M>(acc, v + i * kTileColumns, 1, m + i * kTileColumns);
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) {
      float* out = du + i * kTileColumns + j * kLanes;
      store(out, add ? load(out) + acc[i][j] : acc[i][j]);
    }
  }
}

/// V or dM of up to `capacity` tiles: [36][panel of channels][tile][kTileColumns].
struct TilePanels {
  float* data;
  int64_t panels, capacity;
  int64_t panel_floats = capacity * kTileColumns;
  int64_t component_floats = panels * panel_floats + kTileColumns;  // off the last one's cache sets

  int64_t floats() const { return kComponents * component_floats; }
  float* at(int64_t component, int64_t panel, int64_t tile) const {
    return data + component * component_floats + panel * panel_floats + tile * kTileColumns;
  }
  /// As load_input_tile wants it.
  auto place(int64_t tile) const {
    return [*this, tile](int component, int64_t c) {
      return at(component, c / kTileColumns, tile) + c % kTileColumns;
    };
  }
};

/// The sums over tiles of one component and one panel of K: du [C][kTileColumns].
inline void multiply_weight_panel(const TilePanels& v, const TilePanels& m, int64_t component, int64_t panel,
                                  int64_t C, int64_t tiles, bool add, float* du) {
  for (int64_t tile = 0; tile < tiles; tile += kSumTiles) {
    const int64_t count = std::min(kSumTiles, tiles - tile);
    for (int64_t c_panel = 0; c_panel < v.panels; ++c_panel) {
      const int64_t c = c_panel * kTileColumns;
      for_each_tile(std::min<int64_t>(kTileColumns, C - c), [&]<int M>(int64_t i) {
        multiply_weight_tile<M>(v.at(component, c_panel, tile) + i, m.at(component, panel, tile), count,
                                add || tile > 0, du + (c + i) * kTileColumns);
      });
    }
  }
}

/// dw [K,C,3,3] and db [K] (may be null), as convolve_backward_weight.
template <class Input, class Gradient>
void convolve_backward_weight_winograd(const ConvShape& s, const Input& input, const Gradient& gradient,
                                       float* dw, float* db) {
  const TileGrid grid{.N = s.N, .P = s.P, .Q = s.Q};
  const int64_t groups = ceil_div(grid.tiles, kGroupTiles);
  const int64_t C_panels = ceil_div(s.C, kTileColumns), K_panels = ceil_div(s.K, kTileColumns);
  const int64_t group_bytes = kGroupTiles * kComponents * 4 * kTileColumns * (C_panels + K_panels);
  // dU: [piece][36][panel of K][C][kTileColumns]
  const int64_t du_panel = s.C * kTileColumns, du_component = K_panels * du_panel,
                du_piece = kComponents * du_component;
  const bool shared = du_piece * 4 > kPieceBytes;
  const int64_t pieces = shared ? 1 : std::min(groups, kWeightPieces);
  float* du = workspace(Purpose::kPartial, pieces * du_piece);
  float* partial_db = workspace(Purpose::kStatistics, groups * s.K);
  const int64_t batch_groups =
      std::min(groups, std::max<int64_t>((shared ? kBatchBytes : kBlockBytes) / group_bytes, shared ? 4 : 2));
  const auto panels = [&](Purpose purpose, int64_t count) {
    TilePanels p{.data = nullptr, .panels = count, .capacity = batch_groups * kGroupTiles};
    p.data = workspace(purpose, p.floats());
    return p;
  };
  const auto transform = [&](const TilePanels& v, const TilePanels& m, int64_t group, int64_t first_group) {
    float* sum = partial_db + group * s.K;
    std::fill(sum, sum + s.K, 0.0f);
    const int64_t begin = group * kGroupTiles, offset = (group - first_group) * kGroupTiles;
    for_each_grid_tile(
        grid, begin, std::min(grid.tiles, begin + kGroupTiles), [&](const Tile& tile, int64_t i) {
          load_input_tile(input, tile.n, tile.p - s.padding, tile.q - s.padding, v.place(offset + i));
          load_gradient_tile(gradient, tile, m.place(offset + i), sum);
        });
  };
  const auto tiles_of = [&](int64_t first_group, int64_t last_group) {
    return std::min(grid.tiles, last_group * kGroupTiles) - first_group * kGroupTiles;
  };

  if (shared) {
    const TilePanels v = panels(Purpose::kInputPanel, C_panels), m = panels(Purpose::kGradientPanel, K_panels);
    for (int64_t first = 0; first < groups; first += batch_groups) {
      const int64_t last = std::min(groups, first + batch_groups);
      torch::stable::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; ++group) transform(v, m, group, first);
      });
      torch::stable::parallel_for(0, kComponents * K_panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          multiply_weight_panel(v, m, task / K_panels, task % K_panels, s.C, tiles_of(first, last), first > 0,
                                du + task * du_panel);
        }
      });
    }
  } else {
    torch::stable::parallel_for(0, pieces, 1, [&](int64_t first_piece, int64_t last_piece) {
      const TilePanels v = panels(Purpose::kInputPanel, C_panels),
                       m = panels(Purpose::kGradientPanel, K_panels);
      for (int64_t piece = first_piece; piece < last_piece; ++piece) {
        const int64_t begin = piece * groups / pieces, end = (piece + 1) * groups / pieces;
        for (int64_t first = begin; first < end; first += batch_groups) {
          const int64_t last = std::min(end, first + batch_groups);
          for (int64_t group = first; group < last; ++group) transform(v, m, group, first);
          for (int64_t task = 0; task < kComponents * K_panels; ++task) {
            multiply_weight_panel(v, m, task / K_panels, task % K_panels, s.C, tiles_of(first, last),
                                  first > begin, du + piece * du_piece + task * du_panel);
          }
        }
      }
    });
  }

  torch::stable::parallel_for(0, K_panels * s.C, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t panel = row / s.C, c = row % s.C, first = panel * kTileColumns;
      const int64_t lanes = std::min<int64_t>(kTileColumns, s.K - first);
      alignas(kVectorBytes) float taps[kTaps][kTileColumns];
      for (int j = 0; j < kTileColumns; j += kLanes) {
        transform_square<kIn, 3>(
            transform_filter_gradient,
            [&](int r, int t) {
              const float* sums = du + (kIn * r + t) * du_component + row * kTileColumns + j;
              Vec total = load(sums);
              for (int64_t piece = 1; piece < pieces; ++piece) total += load(sums + piece * du_piece);
              return total;
            },
            [&](int r, int t, Vec g) { store(taps[3 * r + t] + j, g); });
      }
      for (int64_t j = 0; j < lanes; ++j) {
        for (int64_t tap = 0; tap < kTaps; ++tap) dw[((first + j) * s.C + c) * kTaps + tap] = taps[tap][j];
      }
    }
  });
  if (db != nullptr) {
    for (int64_t k = 0; k < s.K; ++k) {
      double total = 0;
      for (int64_t group = 0; group < groups; ++group) total += partial_db[group * s.K + k];
      db[k] = static_cast<float>(total);
    }
  }
}

}  // namespace maskcore
