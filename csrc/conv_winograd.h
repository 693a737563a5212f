// 3x3 stride-1 convolution by Winograd's minimal filtering (Lavin & Gray, "Fast Algorithms for Convolutional
// Neural Networks", 2015): F(4x4, 3x3) takes 36 multiplications a channel pair for 16 outputs instead of 144,
// F(6x6, 3x3) 64 for 36 instead of 324. winograd_transforms.h has the matrices and where they come from.
//   forward          Y  = A^T [U . V] A,   U = G g G^T,  V = B^T X B
//   backward         dM = A dY A^T,  dX = B [U . dM] B^T,  dg = G^T [sum over tiles of V . dM] G
// (the exact adjoint; 6 x 6 inputs of neighbouring tiles overlap by 2, where dX is their sum). The products
// over input channels, output channels or tiles are 36 (or 64) matrix products each, one a component.
//
// A block of tiles is transformed, multiplied and transformed back while it lies in a core's L2 cache.
// A number of the output depends on its tile alone, and every sum over tiles runs in their order:
// results are bit-identical from run to run and for any number of threads. A NaN or an infinity in the
// input may reach any output of the tiles that see it, not only the 3x3 around it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <type_traits>

#include "operands.h"
#include "phases.h"
#include "read_ahead.h"
#include "register_tile.h"
#include "shapes.h"
#include "sources.h"
#include "tasks.h"
#include "vector.h"
#include "winograd_transforms.h"
#include "workspace.h"

namespace maskcore {

// F(6x6) is for the forward pass, of float32 operands, of so many channels at most: its rounding error is 4
// times F(4x4)'s and grows with the root of the channels, to 2.9e-6 of the result (root mean square) at 64.
// Inference takes 5 % less time with it.
inline constexpr int64_t kMostF6Channels = 64;  // ops.py knows this number too

/// MASKCORE_CONV, to compare the ways: empty, direct, winograd, or winograd4 and winograd6 with tiles of that
/// size wherever they are offered.
inline std::string_view wanted_way() {
  const char* value = std::getenv("MASKCORE_CONV");
  const std::string_view way = value == nullptr ? "" : value;
  STD_TORCH_CHECK(
      way.empty() || way == "direct" || way == "winograd" || way == "winograd4" || way == "winograd6",
      "MASKCORE_CONV must be direct, winograd, winograd4 or winograd6, is ", value);
  return way;
}

/// What the tiles of the first P x Q outputs cost, in multiply-adds: the products, and so many a tile and
/// channel for the transforms, which are mostly loads and stores.
template <class F>
int64_t tile_operations(const ConvShape& s, int64_t P, int64_t Q, int64_t input, int64_t output) {
  const int64_t C = ceil_div(s.C, kLanes) * kLanes, K = ceil_div(s.K, kLanes) * kLanes;
  const int64_t tiles = s.N * ceil_div(P, F::kOut) * ceil_div(Q, F::kOut);
  return tiles * (F::kComponents * s.C * K + input * C + output * K);
}

/// Whether Winograd is the faster way for a shape, by counting in multiply-adds: the direct convolution's 9
/// an output and pair of channels against the tiles' and the filters'. The transforms' figures are times
/// measured on Zen 3: 450 and 400 cycles a tile and vector of channels, at 2 multiply-adds a cycle and lane.
/// The direct convolution has float32 operands whatever the precision: it is for small work.
inline bool use_winograd(const ConvShape& s) {
  const std::string_view way = wanted_way();
  if (!way.empty() && s.N > 0) return way != "direct";
  constexpr int64_t kFilterOperations = 100;
  const int64_t K = ceil_div(s.K, kLanes) * kLanes;
  return tile_operations<F4>(s, s.P, s.Q, 900, 800) + kFilterOperations * s.C * K <
         kTaps * s.C * K * s.N * s.P * s.Q;
}

/// Whether the forward pass has tiles of 6x6 outputs. The transforms' figures are cycles a tile and vector,
/// measured on Zen 4, which does one multiply-add a cycle and lane.
inline bool use_f6(const ConvShape& s, int64_t P, int64_t Q) {
  const std::string_view way = wanted_way();
  if (s.C > kMostF6Channels || way == "winograd4") return false;
  return way == "winograd6" ||
         tile_operations<F6>(s, P, Q, 580, 650) < tile_operations<F4>(s, P, Q, 250, 220);
}

// ---- filters ---------------------------------------------------------------------------------

// A filter's components lie in as many places, and so do the filters of a panel: their lines are asked for so
// many rows before they are needed. 256 to 256 channels that lie in no cache take 0.5 instead of 2.2 ms.
inline constexpr int64_t kFilterRowsAhead = 2;

/// The filters G g G^T as the products read them: [component][panel of columns][row / D][kTileColumns][D]
/// with the D = kDepth of the operands, zero-padded in the columns and in the last D rows. A component begins
/// off the cache sets of the one before: all of a filter are written at once. Forward the rows are input
/// channels and the columns output channels; backward they are exchanged.
struct FilterShape {
  int64_t rows, columns;
  int64_t row_stride, column_stride;  // in the weight, floats
  int64_t panels = ceil_div(columns, kTileColumns);

  /// Elements of a panel of a component.
  template <class Operands>
  int64_t panel_size() const {
    return ceil_div(rows, Operands::kDepth) * kTileColumns * Operands::kDepth;
  }
  /// Elements from a component to the next.
  template <class Operands>
  int64_t component_size() const {
    return panels * panel_size<Operands>() + kTileColumns * Operands::kDepth;
  }
  /// Floats that the components of any instruction set (vector.h) and precision fit in: the widest has 32
  /// columns.
  template <class F>
  int64_t widest_floats() const {
    return F::kComponents * (rows * ceil_div(columns, 32) + 1) * 32;
  }

  /// The filters of the forward pass that are kept: F(4x4)'s, and where use_f6 may choose it F(6x6)'s behind.
  template <class F>
  int64_t kept_begin() const {
    return std::is_same_v<F, F4> ? 0 : widest_floats<F4>();
  }
  bool keeps_f6() const { return rows <= kMostF6Channels; }
  int64_t kept_floats() const { return widest_floats<F4>() + (keeps_f6() ? widest_floats<F6>() : 0); }

  static FilterShape forward(int64_t K, int64_t C) {
    return {.rows = C, .columns = K, .row_stride = kTaps, .column_stride = C * kTaps};
  }
  static FilterShape backward(int64_t K, int64_t C) {
    return {.rows = K, .columns = C, .row_stride = C * kTaps, .column_stride = kTaps};
  }
};

template <class Operands, class F>
void transform_filters(const float* weight, const FilterShape& f, typename Operands::Element* out) {
  constexpr int64_t kDepth = Operands::kDepth;
  const int64_t groups = ceil_div(f.rows, kDepth), component = f.component_size<Operands>();
  torch::stable::parallel_for(0, f.panels * groups, 16 / kDepth, [=](int64_t begin, int64_t end) {
    PhaseClock clock;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / groups * kTileColumns, first_row = i % groups * kDepth;
      const int64_t lanes = std::min<int64_t>(kTileColumns, f.columns - first);
      for (int64_t row = first_row; row < std::min(f.rows, first_row + kDepth); ++row) {
        const float* g = weight + row * f.row_stride + first * f.column_stride;
        alignas(kVectorBytes) float taps[kTaps][kTileColumns] = {};
        for (int64_t j = 0; j < lanes; ++j) {
          __builtin_prefetch(g + kFilterRowsAhead * kDepth * f.row_stride + j * f.column_stride);
          for (int64_t tap = 0; tap < kTaps; ++tap) taps[tap][j] = g[j * f.column_stride + tap];
        }
        for (int j = 0; j < kTileColumns; j += kLanes) {
          transform_square<3, F::kIn>(
              transform_filter, [&](int r, int t) { return load(taps[3 * r + t] + j); },
              [&](int r, int t, Vec u) {
                auto* to = out + (F::kIn * r + t) * component + (i * kTileColumns + j) * kDepth;
                __builtin_prefetch(to + kFilterRowsAhead * kTileColumns * kDepth, /*rw=*/1);
                Operands::save_term(to, row - first_row, u);
              });
        }
      }
    }
    clock.end(Phase::kFilterTransform);
  });
}

/// In scratch memory.
template <class Operands, class F>
const typename Operands::Element* transform_filters(const float* weight, const FilterShape& f) {
  float* const memory = workspace(Purpose::kFilter, f.widest_floats<F>());
  auto* out = reinterpret_cast<typename Operands::Element*>(memory);
  transform_filters<Operands, F>(weight, f, out);
  return out;
}

// ---- tiles -----------------------------------------------------------------------------------

struct Tile {
  int64_t n, p, q;        // image, first output row and column
  int64_t height, width;  // outputs inside the image, 1..m
};

/// The tiles that cover the first P x Q outputs of N images, numbered image by image, row by row.
template <class F>
struct TileGrid {
  int64_t N, P, Q;
  int64_t rows = ceil_div(P, F::kOut);
  int64_t columns = ceil_div(Q, F::kOut);
  int64_t tiles = N * rows * columns;

  int64_t number(const Tile& tile) const {
    return (tile.n * rows + tile.p / F::kOut) * columns + tile.q / F::kOut;
  }
};

/// call.operator()<Operands, F>(TileGrid<F>) with the operands of a precision, and with the tiles that cover
/// the first P x Q outputs in least time.
template <class Call>
void with_tiles(const ConvShape& s, int64_t P, int64_t Q, Precision precision, const Call& call) {
  with_operands(precision, [&]<class Operands>() {
    if constexpr (std::is_same_v<Operands, Float32>) {
      if (use_f6(s, P, Q)) {
        call.template operator()<Operands>(TileGrid<F6>{.N = s.N, .P = P, .Q = Q});
        return;
      }
    }
    call.template operator()<Operands>(TileGrid<F4>{.N = s.N, .P = P, .Q = Q});
  });
}

/// visit(i, j) for the whole kStep x kStep windows of a tile's outputs; unrolled where the tile is whole.
template <int kSize, int kStep = 1, class Visit>
inline MASKCORE_INLINE void for_each_output(const Tile& tile, const Visit& visit) {
  if (tile.height == kSize && tile.width == kSize) {
#pragma GCC unroll 6
    for (int i = 0; i < kSize / kStep; ++i) {
#pragma GCC unroll 6
      for (int j = 0; j < kSize / kStep; ++j) visit(i, j);
    }
  } else {
    for (int64_t i = 0; i < tile.height / kStep; ++i) {
      for (int64_t j = 0; j < tile.width / kStep; ++j) visit(i, j);
    }
  }
}

/// visit(Tile, its number - begin) for the tiles [begin, end).
template <class F, class Visit>
void for_each_grid_tile(const TileGrid<F>& grid, int64_t begin, int64_t end, const Visit& visit) {
  int64_t column = begin % grid.columns, row = begin / grid.columns % grid.rows,
          n = begin / grid.columns / grid.rows;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t p = row * F::kOut, q = column * F::kOut;
    visit(Tile{.n = n,
               .p = p,
               .q = q,
               .height = std::min<int64_t>(F::kOut, grid.P - p),
               .width = std::min<int64_t>(F::kOut, grid.Q - q)},
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

/// Notes the pixels of `source` that the tiles [begin, end) read: `size` x `size` each, a tile's first at
/// (p - margin, q - margin).
template <class Source, class F>
void add_reads(const Source& source, const TileGrid<F>& grid, int64_t begin, int64_t end, int64_t size,
               int64_t margin, ReadAhead& ahead) {
  while (begin < end) {
    const int64_t column = begin % grid.columns, row = begin / grid.columns % grid.rows,
                  n = begin / grid.columns / grid.rows;
    const int64_t tiles = std::min(end - begin, grid.columns - column);
    const int64_t w = std::max<int64_t>(0, column * F::kOut - margin);
    const int64_t pixels = std::min(source.W, column * F::kOut - margin + (tiles - 1) * F::kOut + size) - w;
    for (int64_t i = 0; i < size; ++i) {
      const int64_t h = row * F::kOut - margin + i;
      if (h < 0 || h >= source.H || pixels <= 0) continue;
      source.for_each_run(n, h, w, pixels, [&](const float* run, int64_t floats) { ahead.add(run, floats); });
    }
    begin += tiles;
  }
}

/// The components of up to `capacity` tiles, each with room for [panel of channels][tile][kTileColumns]
/// floats: the results of products, or operands, which begin their panels and may be shorter.
template <class F>
struct TilePanels {
  int64_t channels, capacity;
  int64_t panels = ceil_div(channels, kTileColumns);
  int64_t panel_floats = capacity * kTileColumns;
  int64_t component_floats = panels * panel_floats + kTileColumns;  // off the last one's cache sets
  float* data = nullptr;

  TilePanels(Purpose purpose, int64_t channels, int64_t capacity) : channels(channels), capacity(capacity) {
    data = workspace(purpose, F::kComponents * component_floats);
  }
  float* at(int64_t component, int64_t panel, int64_t tile) const {
    return data + component * component_floats + panel * panel_floats + tile * kTileColumns;
  }
  /// Component 0 of a tile's channels from c on; c is a multiple of kLanes.
  float* channel(int64_t tile, int64_t c) const { return at(0, c / kTileColumns, tile) + c % kTileColumns; }

  /// Operands from a tile on, in either order if the tile is a multiple of kDepth.
  template <class Operands>
  typename Operands::Element* operands(int64_t component, int64_t panel, int64_t tile) const {
    return reinterpret_cast<typename Operands::Element*>(at(component, panel, 0)) + tile * kTileColumns;
  }
};

/// Where the components of a tile's channels [c, c + kLanes) go as operands.
template <class Operands, SumOver kSum>
class OperandTile {
 public:
  template <class F>
  OperandTile(const TilePanels<F>& panels, int64_t tile, int64_t c) : term_(tile % Operands::kDepth) {
    constexpr int64_t kDepth = Operands::kDepth;
    const int64_t panel = c / kTileColumns, column = c % kTileColumns;
    out_ = kSum == SumOver::kChannels
               ? panels.template operands<Operands>(0, panel, tile) + column
               : panels.template operands<Operands>(0, panel, tile / kDepth * kDepth) + column * kDepth;
    component_ = panels.component_floats * static_cast<int64_t>(sizeof(float) / sizeof(*out_));
  }
  void save(int component, Vec v) const {
    if constexpr (kSum == SumOver::kChannels) {
      Operands::save(out_ + component * component_, v);
    } else {
      Operands::save_term(out_ + component * component_, term_, v);
    }
  }

 private:
  typename Operands::Element* out_;
  int64_t component_, term_;
};

/// V of one tile, whose first input is at (h, w), which may be in the margin of zeros.
template <class Operands, SumOver kSum, class Source, class F>
void load_input_tile(const Source& source, int64_t n, int64_t h, int64_t w, const TilePanels<F>& v,
                     int64_t at) {
  constexpr int kIn = F::kIn;
  const bool inside = h >= 0 && w >= 0 && h + kIn <= source.H && w + kIn <= source.W;
  const auto transform = [&](const auto& load) {
    for_each_vector(source.C, [&](int64_t c, auto lanes) {
      const OperandTile<Operands, kSum> out(v, at, c);
      transform_square<kIn, kIn>(
          transform_input, [&](int i, int j) { return load(h + i, w + j, c, lanes); },
          [&](int i, int j, Vec value) { out.save(kIn * i + j, value); });
    });
  };
  if (inside) {
    transform([&](int64_t y, int64_t x, int64_t c, auto lanes) {
      if (x >= w + kIn - F::kOut) source.prefetch(n, y, x + F::kOut, c);  // what the tile to the right adds
      return source.load(n, y, x, c, lanes);
    });
  } else {
    transform([&](int64_t y, int64_t x, int64_t c, auto lanes) {
      return y >= 0 && x >= 0 && y < source.H && x < source.W ? source.load(n, y, x, c, lanes) : Vec{};
    });
  }
}

// ---- forward ---------------------------------------------------------------------------------

// V and M of a block of tiles lie in L2 together: 36 or 64 times 4 * (C + kOutputChannels) bytes a tile.
inline constexpr int64_t kBlockBytes = 448 * 1024;
inline constexpr int64_t kOutputChannels = 64;

/// The number of blocks that the tiles are cut into; it depends on the shape alone, as block sums must.
template <class F>
int64_t block_count(const TileGrid<F>& grid, int64_t C, int64_t K) {
  const int64_t tile_bytes = F::kComponents * 4 * (C + std::min(K, kOutputChannels));
  const int64_t wanted = std::clamp<int64_t>(kBlockBytes / tile_bytes / kTileRows, 1, 8) * kTileRows;
  const int64_t blocks = ceil_div(grid.tiles, wanted);
  return std::min(grid.tiles, blocks + blocks % 2);  // even, for two cores
}

/// m[i][:] = sum over c of v[i][c] u[c][:], an M x kTileColumns tile of a component's product.
///   v  panels of kTileColumns channels, v_panel elements apart
template <class Operands, int M>
void multiply_tile(const typename Operands::Element* v, int64_t v_panel, const typename Operands::Element* u,
                   int64_t C, float* m, ReadAhead& ahead) {
  constexpr int64_t kDepth = Operands::kDepth;
  Vec acc[M][kTileVectors] = {};
  for (int64_t c = 0; c < C; c += kTileColumns, v += v_panel) {
    const int64_t count = std::min<int64_t>(kTileColumns, C - c);
    const float* chunk = ahead.chunk();
    for (int64_t i = 0; i < count; i += kDepth, u += kTileColumns * kDepth) {
#pragma GCC unroll 2
      for (int64_t line = i; line < i + kDepth; ++line) {
        __builtin_prefetch(chunk + line * ReadAhead::kLine, /*rw=*/0, /*locality=*/2);
      }
      Operands::template add_channels<M>(acc, v + i, kTileColumns, u);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) store(m + i * kTileColumns + j * kLanes, acc[i][j]);
  }
}

/// The panels [first, last) of U (of `panels`) times one component of v: those of m from 0 on.
template <class Operands, class F>
void multiply_component(int64_t component, const TilePanels<F>& v, const FilterShape& f,
                        const typename Operands::Element* filter, int64_t first, int64_t last, int64_t tiles,
                        const TilePanels<F>& m, ReadAhead& ahead) {
  constexpr int64_t kElements = sizeof(float) / sizeof(typename Operands::Element);  // in a float's place
  for (int64_t panel = first; panel < last; ++panel) {
    const auto* u = filter + component * f.component_size<Operands>() + panel * f.panel_size<Operands>();
    for_each_tile(tiles, [&]<int M>(int64_t i) {
      multiply_tile<Operands, M>(v.template operands<Operands>(component, 0, i), v.panel_floats * kElements,
                                 u, v.channels, m.at(component, panel - first, i), ahead);
    });
  }
}

/// How often the products of a block call ReadAhead::chunk().
template <class F>
int64_t chunk_calls(const FilterShape& f, int64_t tiles) {
  return F::kComponents * f.panels * ceil_div(tiles, kTileRows) * ceil_div(f.rows, kTileColumns);
}

/// Computes the outputs of `grid`, the first rows and columns of the whole output.
///   source  the unpadded input
///   filter  transform_filters<Operands, F>(...)
///   sink    sink.save(block, tile, k, lanes, y): takes the m x m outputs of channels [k, k + lanes);
///           what is beyond the tile's height and width is meaningless
template <class Operands, class F, class Source, class Sink>
void convolve_winograd(const ConvShape& s, const TileGrid<F>& grid, const Source& source,
                       const typename Operands::Element* filter, const Sink& sink) {
  const int64_t blocks = block_count(grid, s.C, s.K), block_tiles = ceil_div(grid.tiles, blocks);
  const FilterShape f = FilterShape::forward(s.K, s.C);
  const int64_t pass_panels = std::min<int64_t>(f.panels, kOutputChannels / kTileColumns);
  share(blocks, [&](const auto& take) {
    const TilePanels<F> v(Purpose::kInputPanel, s.C, block_tiles);
    const TilePanels<F> m(Purpose::kConvolved, pass_panels * kTileColumns, block_tiles);
    Source held = source;
    ReadAhead ahead;
    PhaseClock clock;
    const auto first_tile = [&](int64_t block) { return std::min(block, blocks) * grid.tiles / blocks; };
    for (int64_t block = take(), next; block < blocks; block = next) {
      next = take();
      const int64_t begin = first_tile(block), end = first_tile(block + 1);
      ahead.clear();
      add_reads(source, grid, first_tile(next), first_tile(next + 1), F::kIn, s.padding, ahead);
      ahead.spread(chunk_calls<F>(f, end - begin));
      for_each_grid_tile(grid, begin, end, [&](const Tile& tile, int64_t i) {
        const int64_t h = tile.p - s.padding, w = tile.q - s.padding;
        if (i == 0 || tile.q == 0) held.hold(tile.n, h, h + F::kIn);
        load_input_tile<Operands, SumOver::kChannels>(held, tile.n, h, w, v, i);
      });
      clock.end(Phase::kInputTransform);
      for (int64_t first = 0; first < f.panels; first += pass_panels) {
        const int64_t last = std::min(f.panels, first + pass_panels);
        for (int64_t component = 0; component < F::kComponents; ++component) {
          multiply_component<Operands>(component, v, f, filter, first, last, end - begin, m, ahead);
        }
        clock.end(Phase::kProducts);
        const int64_t k = first * kTileColumns, channels = std::min(s.K - k, m.channels);
        for_each_grid_tile(grid, begin, end, [&](const Tile& tile, int64_t i) {
          for_each_vector(channels, [&](int64_t pass_k, auto lanes) {
            Vec y[F::kOut][F::kOut];
            const float* products = m.channel(i, pass_k);
            transform_square<F::kIn, F::kOut>(
                transform_output,
                [&](int r, int t) { return load(products + (F::kIn * r + t) * m.component_floats); },
                [&](int r, int t, Vec value) { y[r][t] = value; });
            sink.save(block, tile, k + pass_k, lanes, y);
          });
        });
        clock.end(Phase::kOutputTransform);
      }
    }
    stream_fence();
  });
}

/// y = the convolution plus bias [K], through ReLU if kRelu.
template <bool kRelu>
struct StoreOutput {
  float* y;  // [N,P,Q,K]
  int64_t N, P, Q, K;
  const float* bias;
  bool streamed = streams(y, K, N * P * Q * K);

  template <class Lanes, int kSize>
  void save(int64_t, const Tile& tile, int64_t k, Lanes lanes, const Vec (&y_tile)[kSize][kSize]) const {
    const Vec b = load(bias + k, lanes);
    float* out = y + ((tile.n * P + tile.p) * Q + tile.q) * K + k;
    for_each_output<kSize>(tile, [&](int64_t i, int64_t j) {
      const Vec sum = y_tile[i][j] + b, v = kRelu ? relu(sum) : sum;
      if (streamed) {
        stream(out + (i * Q + j) * K, v);
      } else {
        store(out + (i * Q + j) * K, v, lanes);
      }
    });
  }
};

// ---- backward --------------------------------------------------------------------------------

// The backward pass is F(4x4, 3x3) throughout.
inline constexpr int kOut = F4::kOut, kIn = F4::kIn, kComponents = F4::kComponents;

// Two ways to share the work out. Where dU is small, the rows of tiles are cut into pieces, each with a dU of
// its own; a piece works on blocks of tiles whose V and dM lie in L2. Where dU is large, all cores transform
// a batch of tiles into the shared L3, share out the components of one dU, and then transform dV back, an
// image and a panel of channels at a time. On Zen 4 at batch 8 the first takes 21 ms for 128 -> 128 channels
// where the second takes 26, and 23 ms for 256 -> 256 where the second takes 17.
inline constexpr int64_t kPieceBytes = 2560 * 1024;  // the largest dU of a piece
// Pieces: at most so many, and so few that all their dU together are about a sixth of what V and dM take in
// all; an even number, for two cores. They depend on the shape alone, not on the threads.
inline constexpr int64_t kMostPieces = 16, kLeastPieces = 2;
static_assert(kMostPieces % 2 == 0);
inline constexpr int64_t kBatchBytes = 8 * 1024 * 1024;  // V and dM of a batch
// Tiles that a register tile sums at once: both panels, 2 * 4 * kTileColumns bytes a tile, lie in L1.
inline constexpr int64_t kSumTiles = 128;
// Tiles that are transformed together, with a partial bias gradient of their own.
inline constexpr int64_t kGroupTiles = 16;

/// du[i][:] (+)= sum over tiles of v[tile][i] m[tile][:], an M x kTileColumns tile of a component of dU.
template <class Operands, int M>
void multiply_weight_tile(const typename Operands::Element* v, const typename Operands::Element* m,
                          int64_t tiles, bool add, float* du) {
  Vec acc[M][kTileVectors] = {};
  for (int64_t i = 0; i < tiles; i += Operands::kDepth) {
    Operands::template add_tiles<M>(acc, v + i * kTileColumns, m + i * kTileColumns, tiles - i);
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; ++j) {
      float* out = du + i * kTileColumns + j * kLanes;
      store(out, add ? load(out) + acc[i][j] : acc[i][j]);
    }
  }
}

/// dU of one component: [panel of K][C][kTileColumns] (+)= the sums over tiles.
template <class Operands>
void multiply_weight_component(int64_t component, const TilePanels<F4>& v, const TilePanels<F4>& m,
                               int64_t tiles, bool add, float* du) {
  for (int64_t panel = 0; panel < m.panels; ++panel, du += v.channels * kTileColumns) {
    for (int64_t tile = 0; tile < tiles; tile += kSumTiles) {
      const int64_t count = std::min(kSumTiles, tiles - tile);
      for (int64_t c_panel = 0; c_panel < v.panels; ++c_panel) {
        const int64_t c = c_panel * kTileColumns;
        for_each_tile(std::min<int64_t>(kTileColumns, v.channels - c), [&]<int M>(int64_t i) {
          multiply_weight_tile<Operands, M>(
              v.operands<Operands>(component, c_panel, tile) + i * Operands::kDepth,
              m.operands<Operands>(component, panel, tile), count, add || tile > 0,
              du + (c + i) * kTileColumns);
        });
      }
    }
  }
}

/// dM of one tile of the gradient; sum[c] += the gradient of the tile's outputs.
template <class Operands, class Gradient>
void load_gradient_tile(const Gradient& gradient, const Tile& tile, const TilePanels<F4>& m, int64_t at,
                        float* sum) {
  for_each_vector(gradient.C, [&](int64_t c, auto lanes) {
    const OperandTile<Operands, SumOver::kChannels> out(m, at, c);
    Vec g[kOut][kOut];
    if (tile.height == kOut && tile.width == kOut) {
      for (int i = 0; i < kOut; ++i) {
        for (int j = 0; j < kOut; ++j) gradient.prefetch(tile.n, tile.p + i, tile.q + kOut + j, c);
      }
      load_square(gradient, tile.n, tile.p, tile.q, c, lanes, g);
    } else {
      for (int i = 0; i < kOut; ++i) {
        for (int j = 0; j < kOut; ++j) {
          const bool inside = i < tile.height && j < tile.width;
          g[i][j] = inside ? gradient.load(tile.n, tile.p + i, tile.q + j, c, lanes) : Vec{};
        }
      }
    }
    Vec total = load(sum + c, lanes);
    transform_square<kOut, kIn>(
        transform_gradient,
        [&](int i, int j) {
          total += g[i][j];
          return g[i][j];
        },
        [&](int i, int j, Vec value) { out.save(kIn * i + j, value); });
    store(sum + c, total, lanes);
  });
}

/// dX of a tile of V's place, B dV B^T: save(i, j, d, c, lanes) takes input (i, j) of the channels
/// [begin, end), c and lanes as for_each_vector gives them.
template <class Save>
void save_gradient_tile(const TilePanels<F4>& v, int64_t at, int64_t begin, int64_t end, const Save& save) {
  for_each_vector(end - begin, [&](int64_t i, auto lanes) {
    const int64_t c = begin + i;
    const float* products = v.channel(at, c);
    transform_square<kIn, kIn>(
        transform_input_gradient,
        [&](int r, int t) { return load(products + (kIn * r + t) * v.component_floats); },
        [&](int r, int t, Vec d) { save(r, t, d, c, lanes); });
  });
}

/// Adds dX of a tile, whose dV is tile `at` of v, to what the tiles above it (if `above`) and to the left
/// have added; where it is the first it writes. For the channels [begin, end) of rows [W][C].
///   row(h)  row h of dX, called for rows that exist
///   kFar    the rows lie in memory: what the tile to the right will add to is fetched
template <bool kFar, class Row>
void add_gradient_tile(const TilePanels<F4>& v, int64_t at, const Tile& tile, const ConvShape& s, bool above,
                       int64_t begin, int64_t end, const Row& row) {
  constexpr int kShared = kIn - kOut;  // rows and columns that neighbours share
  const int64_t h = tile.p - s.padding, w = tile.q - s.padding;
  float* out[kIn];
  for (int64_t i = 0; i < kIn; ++i) out[i] = h + i >= 0 && h + i < s.H ? row(h + i) : nullptr;
  if (h >= 0 && w >= 0 && h + kIn <= s.H && w + kIn <= s.W && above && tile.q > 0) {
    save_gradient_tile(v, at, begin, end, [&](int i, int j, Vec d, int64_t c, auto lanes) {
      float* to = out[i] + (w + j) * s.C + c;
      if (kFar && j >= kShared) __builtin_prefetch(to + kOut * s.C, /*rw=*/1);
      store(to, i < kShared || j < kShared ? load(to, lanes) + d : d, lanes);
    });
  } else {
    save_gradient_tile(v, at, begin, end, [&](int i, int j, Vec d, int64_t c, auto lanes) {
      if (out[i] == nullptr || w + j < 0 || w + j >= s.W) return;
      float* to = out[i] + (w + j) * s.C + c;
      const bool overlaps = (i < kShared && above) || (j < kShared && tile.q > 0);
      store(to, overlaps ? load(to, lanes) + d : d, lanes);
    });
  }
}

/// The rows of dX that the current row of tiles reaches, in L2: [kRows][W][C], row h in slot h % kRows.
struct GradientRows {
  static constexpr int64_t kRows = 8;  // 6 are reached; a power of two
  float* rows;
  int64_t floats;  // of a row

  float* row(int64_t h) const { return rows + (h & (kRows - 1)) * floats; }
};

/// What becomes of a finished row of dX: it is written. A sink's take(input, slot, n, h, row) is called once
/// for each row of each image; `input` is the convolution's own, with row h held. The rows of a slot, of
/// which there are 2 kMostPieces, come in an order that does not depend on the threads. The row may be
/// changed, and kTileColumns floats behind it may be read.
struct StoreRows {
  float* dx;  // [N,H,W,C], or null: not wanted
  int64_t H, W, C, floats;
  bool streamed = streams(dx, C, floats);

  static StoreRows of(float* dx, const ConvShape& s) {
    return {.dx = dx, .H = s.H, .W = s.W, .C = s.C, .floats = s.N * s.H * s.W * s.C};
  }
  bool wanted() const { return dx != nullptr; }

  template <class Input>
  void take(const Input&, int64_t, int64_t n, int64_t h, const float* row) const {
    float* out = dx + (n * H + h) * W * C;
    if (!streamed) {
      std::copy(row, row + W * C, out);
      return;
    }
    for (int64_t i = 0; i < W * C; i += kLanes) stream(out + i, load(row + i));
  }
};

/// Any sink, for one kind of input: so WinogradBackward is compiled once for all of them, at a call a row.
template <class Input>
class GradientSink {
 public:
  template <class Sink>
  explicit GradientSink(const Sink& sink)
      : dx(sink.dx),
        wanted_(sink.wanted()),
        sink_(&sink),
        take_([](const void* s, const Input& input, int64_t slot, int64_t n, int64_t h, float* row) {
          static_cast<const Sink*>(s)->take(input, slot, n, h, row);
        }) {}
  bool wanted() const { return wanted_; }
  void take(const Input& input, int64_t slot, int64_t n, int64_t h, float* row) const {
    take_(sink_, input, slot, n, h, row);
  }

  float* const dx;

 private:
  const bool wanted_;
  const void* const sink_;
  void (*const take_)(const void*, const Input&, int64_t, int64_t, int64_t, float*);
};

/// dw [K,C,3,3] of dU: `pieces` of [36][panel of K][C][kTileColumns], one behind another, that are added up.
inline void transform_filter_gradients(const float* du, int64_t pieces, int64_t K, int64_t C, float* dw) {
  const int64_t panels = ceil_div(K, kTileColumns), component = panels * C * kTileColumns;
  torch::stable::parallel_for(0, panels * C, 16, [=](int64_t begin, int64_t end) {
    PhaseClock clock;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t c = row % C, first = row / C * kTileColumns;
      const int64_t lanes = std::min<int64_t>(kTileColumns, K - first);
      alignas(kVectorBytes) float taps[kTaps][kTileColumns];
      for (int j = 0; j < kTileColumns; j += kLanes) {
        transform_square<kIn, 3>(
            transform_filter_gradient,
            [&](int r, int t) {
              const float* part = du + (kIn * r + t) * component + row * kTileColumns + j;
              Vec total{};
              for (int64_t piece = 0; piece < pieces; ++piece, part += kComponents * component) {
                __builtin_prefetch(part + kFilterRowsAhead * kTileColumns);
                total += load(part);
              }
              return total;
            },
            [&](int r, int t, Vec g) { store(taps[3 * r + t] + j, g); });
      }
      for (int64_t j = 0; j < lanes; ++j) {
        float* to = dw + ((first + j) * C + c) * kTaps;
        __builtin_prefetch(to + kFilterRowsAhead * kTaps, /*rw=*/1);
        for (int64_t tap = 0; tap < kTaps; ++tap) to[tap] = taps[tap][j];
      }
    }
    clock.end(Phase::kFilterTransform);
  });
}

/// Floats of dU.
inline int64_t filter_gradient_floats(const ConvShape& s) {
  return kComponents * ceil_div(s.K, kTileColumns) * s.C * kTileColumns;
}
/// Whether the backward pass works in pieces, and so gives finished rows of dX to its sink. Otherwise dX is
/// only written.
inline bool backward_in_pieces(const ConvShape& s) { return filter_gradient_floats(s) * 4 <= kPieceBytes; }

/// The three gradients of a convolution. `Input` is the source of x, `Gradient` that of the gradient at its
/// output, the sink takes dX.
template <class Operands, class Input, class Gradient>
class WinogradBackward {
 public:
  WinogradBackward(const ConvShape& s, const Input& input, const Gradient& gradient, const float* weight,
                   const GradientSink<Input>& sink)
      : s_(s), input_(input), gradient_(gradient), sink_(sink) {
    if (sink.wanted()) filter_ = transform_filters<Operands, F4>(weight, filter_shape_);
  }

  /// dw [K,C,3,3]; db [K] if it is not null.
  void run(float* dw, float* db) {
    const bool in_pieces = backward_in_pieces(s_);
    const int64_t tile_floats = kComponents * (s_.C + s_.K);
    const int64_t afforded =
        std::clamp(grid_.tiles * tile_floats / (6 * du_floats_), kLeastPieces, kMostPieces);
    const int64_t even = afforded + afforded % 2;
    const int64_t pieces = in_pieces ? std::min(grid_.N * grid_.rows, even) : 1;
    const int64_t sums = in_pieces ? pieces : ceil_div(grid_.tiles, kGroupTiles);
    du_ = workspace(Purpose::kPartial, pieces * du_floats_);
    partial_db_ = workspace(Purpose::kStatistics, sums * s_.K);
    std::fill(partial_db_, partial_db_ + sums * s_.K, 0.0f);
    if (in_pieces) {
      run_pieces(pieces);
    } else {
      run_batches();
    }
    transform_filter_gradients(du_, pieces, s_.K, s_.C, dw);
    for (int64_t k = 0; db != nullptr && k < s_.K; ++k) {
      double total = 0;
      for (int64_t i = 0; i < sums; ++i) total += partial_db_[i * s_.K + k];
      db[k] = static_cast<float>(total);
    }
  }

 private:
  /// Whole groups of tiles whose V and dM take about so many bytes.
  int64_t tiles_in(int64_t bytes, int64_t least_groups) const {
    const int64_t panels = ceil_div(s_.C, kTileColumns) + ceil_div(s_.K, kTileColumns);
    const int64_t groups = bytes / (kComponents * 4 * kTileColumns * panels * kGroupTiles);
    return std::min(ceil_div(grid_.tiles, kGroupTiles), std::max(groups, least_groups)) * kGroupTiles;
  }

  /// V and dM of the tiles [begin, end), from tile `at` of v and m on.
  void transform(Input& input, int64_t begin, int64_t end, const TilePanels<F4>& v, const TilePanels<F4>& m,
                 int64_t at, float* sum) const {
    for_each_grid_tile(grid_, begin, end, [&](const Tile& tile, int64_t i) {
      const int64_t h = tile.p - s_.padding, w = tile.q - s_.padding;
      if (i == 0 || tile.q == 0) input.hold(tile.n, h, h + kIn);
      load_input_tile<Operands, SumOver::kTiles>(input, tile.n, h, w, v, at + i);
      load_gradient_tile<Operands>(gradient_, tile, m, at + i, sum);
    });
  }

  /// One component's dU (+)= V dM, then its dV, in the place of V, which is not needed any more.
  void multiply(int64_t component, const TilePanels<F4>& v, const TilePanels<F4>& m, int64_t tiles, bool add,
                float* du, ReadAhead& ahead) const {
    multiply_weight_component<Operands>(component, v, m, tiles, add,
                                        du + component * (du_floats_ / kComponents));
    if (filter_ != nullptr) {
      multiply_component<Operands>(component, m, filter_shape_, filter_, 0, v.panels, tiles, v, ahead);
    }
  }

  void run_pieces(int64_t pieces) const {
    const int64_t tile_rows = grid_.N * grid_.rows, columns = grid_.columns;
    // A block is of whole rows of tiles or a part of one, so that it does not reach into a row that it cannot
    // finish.
    const int64_t most = tiles_in(kBlockBytes, 1), block_rows = std::max<int64_t>(1, most / columns);
    const int64_t parts = ceil_div(columns, most), block = std::min(most, block_rows * columns);
    const auto first_row = [=](int64_t piece) { return piece * tile_rows / pieces; };
    // What a piece that begins or ends within an image adds to the two rows that it shares with its
    // neighbour: [piece][its top, its bottom][2][W][C].
    const int64_t row_floats = s_.W * s_.C, shared_floats = (kIn - kOut) * row_floats;
    float* shared =
        workspace(Purpose::kRows, filter_ == nullptr ? 0 : 2 * pieces * shared_floats + kTileColumns);
    share(pieces, [&](const auto& take) {
      const TilePanels<F4> v(Purpose::kInputPanel, s_.C, block), m(Purpose::kGradientPanel, s_.K, block);
      const int64_t ring_floats = filter_ == nullptr ? 0 : GradientRows::kRows * row_floats + kTileColumns;
      const GradientRows rows{.rows = workspace(Purpose::kGradientRows, ring_floats), .floats = row_floats};
      Input input = input_;
      ReadAhead ahead;
      PhaseClock clock;
      for (int64_t piece = take(); piece < pieces; piece = take()) {
        const int64_t begin = first_row(piece), end = first_row(piece + 1);
        float* top = shared + 2 * piece * shared_floats;
        for (int64_t row = begin; row < end; row += block_rows) {
          const int64_t row_end = std::min(end, row + block_rows);
          for (int64_t part = 0; part < parts; ++part) {
            const int64_t first = row * columns + part * columns / parts;
            const int64_t last = parts > 1 ? row * columns + (part + 1) * columns / parts : row_end * columns;
            ahead.clear();
            const int64_t next_last = std::min(end * columns, last + (last - first));
            add_reads(input_, grid_, last, next_last, kIn, s_.padding, ahead);
            add_reads(gradient_, grid_, last, next_last, kOut, 0, ahead);
            ahead.spread(chunk_calls<F4>(filter_shape_, last - first));
            transform(input, first, last, v, m, 0, partial_db_ + piece * s_.K);
            clock.end(Phase::kInputTransform);
            for (int64_t component = 0; component < kComponents; ++component) {
              multiply(component, v, m, last - first, first > begin * columns, du_ + piece * du_floats_,
                       ahead);
            }
            clock.end(Phase::kProducts);
            if (filter_ == nullptr) continue;
            for_each_grid_tile(grid_, first, last, [&](const Tile& tile, int64_t i) {
              const int64_t tile_row = (first + i) / columns;
              add_gradient_tile</*kFar=*/false>(v, i, tile, s_, tile.p > 0 && tile_row > begin, 0, s_.C,
                                                [&](int64_t h) { return rows.row(h); });
              if (tile.q + kOut < grid_.Q) return;
              finish_rows(input, rows, piece, tile, tile_row == begin, tile_row + 1 == end, top);
            });
            clock.end(Phase::kOutputTransform);
          }
        }
      }
      stream_fence();
    });
    Input input = input_;
    for (int64_t piece = 1; filter_ != nullptr && piece < pieces; ++piece) {
      const int64_t n = first_row(piece) / grid_.rows, row = first_row(piece) % grid_.rows;
      if (row == 0) continue;
      const float* bottom = shared + (2 * piece - 1) * shared_floats;  // of the piece before
      float* top = shared + 2 * piece * shared_floats;
      for (int64_t i = 0; i < kIn - kOut; ++i) {
        const int64_t h = row * kOut - s_.padding + i;
        if (h >= s_.H) continue;
        for (int64_t j = i * row_floats; j < (i + 1) * row_floats; ++j) top[j] = bottom[j] + top[j];
        input.hold(n, h, h + 1);
        sink_.take(input, pieces + piece, n, h, top + i * row_floats);
      }
    }
    stream_fence();
  }

  /// After the last tile of a row of tiles: the rows of dX that no other row of tiles reaches.
  void finish_rows(Input& input, const GradientRows& rows, int64_t piece, const Tile& tile, bool first,
                   bool last, float* top) const {
    const int64_t shared = kIn - kOut, row_floats = s_.W * s_.C;
    const int64_t begin = tile.p - s_.padding;
    const bool image_first = tile.p == 0, image_last = tile.p + kOut >= grid_.P;
    const int64_t end = image_last ? std::min(s_.H, begin + kIn) : begin + kOut;
    const bool keep_top = first && !image_first, keep_bottom = last && !image_last;
    for (int64_t h = std::max<int64_t>(0, begin); h < end; ++h) {
      if (keep_top && h < begin + shared) {
        std::copy_n(rows.row(h), row_floats, top + (h - begin) * row_floats);
      } else {
        input.hold(tile.n, h, h + 1);
        sink_.take(input, piece, tile.n, h, rows.row(h));
      }
    }
    for (int64_t i = 0; keep_bottom && i < shared; ++i) {
      if (end + i < s_.H) std::copy_n(rows.row(end + i), row_floats, top + (shared + i) * row_floats);
    }
  }

  void run_batches() const {
    const int64_t batch = tiles_in(kBatchBytes, 4), image_tiles = grid_.rows * grid_.columns;
    const TilePanels<F4> v(Purpose::kInputPanel, s_.C, batch), m(Purpose::kGradientPanel, s_.K, batch);
    for (int64_t first = 0; first < grid_.tiles; first += batch) {
      const int64_t last = std::min(grid_.tiles, first + batch);
      in_parallel(ceil_div(last - first, kGroupTiles), Phase::kInputTransform, [&](int64_t task) {
        const int64_t begin = first + task * kGroupTiles, group = begin / kGroupTiles;
        Input input = input_;
        transform(input, begin, std::min(last, begin + kGroupTiles), v, m, begin - first,
                  partial_db_ + group * s_.K);
      });
      in_parallel(kComponents, Phase::kProducts, [&](int64_t component) {
        ReadAhead nothing;  // the shared batch is read by all
        multiply(component, v, m, last - first, first > 0, du_, nothing);
      });
      if (filter_ == nullptr) continue;
      const int64_t first_image = first / image_tiles, images = ceil_div(last, image_tiles) - first_image;
      in_parallel(images * v.panels, Phase::kOutputTransform, [&](int64_t task) {
        const int64_t image = first_image + task / v.panels, c = task % v.panels * kTileColumns;
        const int64_t begin = std::max(first, image * image_tiles),
                      end = std::min(last, (image + 1) * image_tiles);
        for_each_grid_tile(grid_, begin, end, [&](const Tile& tile, int64_t i) {
          add_gradient_tile</*kFar=*/true>(
              v, begin - first + i, tile, s_, tile.p > 0, c, std::min(s_.C, c + kTileColumns),
              [&](int64_t h) { return sink_.dx + (tile.n * s_.H + h) * s_.W * s_.C; });
        });
      });
    }
  }

  template <class F>
  static void in_parallel(int64_t count, Phase phase, const F& f) {
    share(count, [&](const auto& take) {
      PhaseClock clock;
      for (int64_t task = take(); task < count; task = take()) f(task);
      clock.end(phase);
    });
  }

  const ConvShape s_;
  const TileGrid<F4> grid_{.N = s_.N, .P = s_.P, .Q = s_.Q};
  const int64_t du_floats_ = filter_gradient_floats(s_);
  const Input input_;
  const Gradient gradient_;
  const GradientSink<Input> sink_;
  const FilterShape filter_shape_ = FilterShape::backward(s_.K, s_.C);
  const typename Operands::Element* filter_ = nullptr;  // if dx is wanted
  float* du_ = nullptr;                                 // [piece][36][panel of K][C][kTileColumns]
  float* partial_db_ = nullptr;                         // [piece or group of tiles][K]
};

}  // namespace maskcore
