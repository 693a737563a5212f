// A convolution with few input channels, such as the first layer's 3, in front of batch normalisation and
// ReLU: it is cheaper to compute again than to fetch, so that nothing of its size is ever stored. A pixel's
// 9 C taps p, less a shift, and a 1 are a row of a matrix P [pixels][kPatch]. What batch normalisation needs
// of z = w p + b are sums over the batch's M pixels, and all of them follow from two products with P:
//   P^T P    gives mean_p and cov = sum (p - mean_p)(p - mean_p)^T / M
//              mean_k = w_k mean_p + b_k,  var_k = w_k cov w_k
//   P^T g    gives S_k = sum g_k and A_k = sum (p - mean_p) g_k
//              sum g_k (z_k - mean_k) = w_k A_k
//              dw_k = sum p dz_k = scale_k (A_k - slope_k M cov w_k)
// the last as dz = scale (g - S / M - (z - mean) slope), and sum dz = 0 (g, slope: batch_norm.h).
// The products are float32 over at most kPatchPixels pixels and double from there on. relu(bn(z)) is the
// convolution with the normalisation folded in: relu((scale w) p + beta + scale (b - mean)).
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "batch_norm.h"
#include "conv_direct.h"
#include "conv_first_layer.h"
#include "shapes.h"
#include "sources.h"
#include "tasks.h"
#include "workspace.h"

namespace maskcore {

inline constexpr int64_t kMostPatchChannels = kMostFirstLayerChannels;  // ops.py knows this number too
/// Whether neither z nor relu(bn(z)) of such a convolution is stored.
inline bool is_recomputed(const ConvShape& s) { return s.C <= kMostPatchChannels; }
inline constexpr int64_t kPatch = 32;
static_assert(kTaps * kMostPatchChannels + 1 <= kPatch);
// Pixels of a product: their rows of P and of g, 2 * 128 * 32 * 4 = 32 KB, lie in L1 or just behind it.
inline constexpr int64_t kPatchPixels = 128;

/// P of the outputs [q, q + pixels) of a row. x: the three padded input rows, pitch floats apart.
inline void load_patches(const float* x, int64_t pitch, int64_t C, int64_t q, int64_t pixels, float shift,
                         float* patches) {
  const auto load_all = [&]<int kChannels>(std::integral_constant<int, kChannels>) {
    constexpr int kRun = 3 * kChannels;
    for (int64_t i = 0; i < pixels; ++i) {
      float* out = patches + i * kPatch;
      for (int r = 0; r < 3; ++r) {
        const float* taps = x + r * pitch + (q + i) * kChannels;
        for (int j = 0; j < kRun; ++j) out[r * kRun + j] = taps[j] - shift;
      }
      out[3 * kRun] = 1.0f;
      for (int j = 3 * kRun + 1; j < kPatch; ++j) out[j] = 0.0f;
    }
  };
  C == 1   ? load_all(std::integral_constant<int, 1>())
  : C == 2 ? load_all(std::integral_constant<int, 2>())
           : load_all(std::integral_constant<int, 3>());
}

/// sums[i][j] += sum over pixels of patches[pixel][i] right[pixel][j], i < rows, j < columns. right's pixels
/// are `stride` floats apart, and kTileColumns floats behind its last may be read.
inline void add_patch_products(const float* patches, int64_t rows, const float* right, int64_t stride,
                               int64_t columns, int64_t pixels, double* sums) {
  for (int64_t j = 0; j < columns; j += kTileColumns) {
    const int64_t lanes = std::min<int64_t>(kTileColumns, columns - j);
    for_each_tile(rows, [&]<int M>(int64_t i) {
      Vec acc[M][kTileVectors] = {};
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        tile_step<M>(acc, patches + pixel * kPatch + i, 1, right + pixel * stride + j);
      }
      for (int m = 0; m < M; ++m) {
        alignas(kVectorBytes) float sum[kTileColumns];
        for (int v = 0; v < kTileVectors; ++v) store(sum + v * kLanes, acc[m][v]);
        double* out = sums + (i + m) * columns + j;
        for (int64_t lane = 0; lane < lanes; ++lane) out[lane] += static_cast<double>(sum[lane]);
      }
    });
  }
}

/// Near the pictures' mean: what is subtracted from all taps, so that a large mean costs no precision.
inline float patch_shift(const float* x, const ConvShape& s) {
  const int64_t floats = s.H * s.W * s.C;
  double sum = 0;
  for (int64_t i = 0; i < floats; ++i) sum += static_cast<double>(x[i]);
  const auto mean = static_cast<float>(sum / static_cast<double>(floats));
  return std::isfinite(mean) ? mean : 0.0f;
}

/// gram [9 C + 1][9 C + 1] double: P^T P of all outputs.
inline void measure_gram(const ConvShape& s, const float* x, float shift, double* gram) {
  const int64_t size = kTaps * s.C + 1, rows = s.N * s.P, groups = ceil_div(rows, kSlotRows);
  const int64_t pitch = (s.W + 2 * s.padding) * s.C;
  const Activation input{x, s.H, s.W, s.C};
  std::vector<double> sums(static_cast<size_t>(groups * size * kPatch));
  share(groups, [&](const auto& take) {
    PhaseClock clock;
    float* scratch = workspace(Purpose::kHeldInput, 3 * pitch);
    float* patches = workspace(Purpose::kPatches, kPatchPixels * kPatch);
    for (int64_t group = take(); group < groups; group = take()) {
      double* sum = sums.data() + group * size * kPatch;
      for (int64_t row = group * kSlotRows; row < std::min(rows, (group + 1) * kSlotRows); ++row) {
        const int64_t p = row % s.P;
        const float* taps = padded_rows(input, s.padding, row / s.P, p, p + 3, scratch);
        for (int64_t q = 0; q < s.Q; q += kPatchPixels) {
          const int64_t pixels = std::min(kPatchPixels, s.Q - q);
          load_patches(taps, pitch, s.C, q, pixels, shift, patches);
          add_patch_products(patches, size, patches, kPatch, kPatch, pixels, sum);
        }
      }
    }
    clock.end(Phase::kDirect);
  });
  const std::vector<double> total = sum_slots(sums, size * kPatch);
  for (int64_t i = 0; i < size; ++i) std::copy_n(total.data() + i * kPatch, size, gram + i * size);
}

/// What follows from P^T P.
class PatchMoments {
 public:
  PatchMoments(const ConvShape& s, float shift, const double* gram)
      : taps_(kTaps * s.C), shift_(shift), gram_(gram) {}

  double pixels() const { return gram_[taps_ * (taps_ + 1) + taps_]; }
  double mean(int64_t i) const { return gram_[taps_ * (taps_ + 1) + i] / pixels(); }
  double covariance(int64_t i, int64_t j) const {
    return gram_[i * (taps_ + 1) + j] / pixels() - mean(i) * mean(j);
  }

  /// The taps of a filter [C][3][3] in the order of P's columns: r, s, c.
  std::vector<double> taps(const float* filter) const {
    std::vector<double> w(static_cast<size_t>(taps_));
    const int64_t C = taps_ / kTaps;
    for (int64_t i = 0; i < taps_; ++i) w[static_cast<size_t>(i)] = static_cast<double>(filter[place(i, C)]);
    return w;
  }
  /// Where column i of P is in a filter [C][3][3].
  static int64_t place(int64_t i, int64_t C) { return i % C * kTaps + i / C; }

  /// cov w
  std::vector<double> spread(const std::vector<double>& w) const {
    std::vector<double> out(w.size());
    for (int64_t i = 0; i < taps_; ++i) {
      for (int64_t j = 0; j < taps_; ++j)
        out[static_cast<size_t>(i)] += covariance(i, j) * w[static_cast<size_t>(j)];
    }
    return out;
  }

  /// mean [K] and biased var [K] of the convolution's outputs.
  void statistics(const float* weight, const float* bias, int64_t K, float* mean_z, float* var) const {
    for (int64_t k = 0; k < K; ++k) {
      const std::vector<double> w = taps(weight + k * taps_), cov_w = spread(w);
      double m = static_cast<double>(bias[k]), v = 0;
      for (int64_t i = 0; i < taps_; ++i) {
        const auto at = static_cast<size_t>(i);
        m += w[at] * (mean(i) + static_cast<double>(shift_));
        v += w[at] * cov_w[at];
      }
      mean_z[k] = static_cast<float>(m);
      var[k] = static_cast<float>(v < 0 ? 0.0 : v);
    }
  }

  /// dweight [K,C,3,3] and the sums that BatchNormGradient takes, of products [9 C + 1][K] = P^T g.
  std::vector<double> gradient_sums(const std::vector<double>& products, const float* weight,
                                    int64_t K) const {
    std::vector<double> total(static_cast<size_t>(2 * K));
    for (int64_t k = 0; k < K; ++k) {
      const std::vector<double> w = taps(weight + k * taps_);
      total[static_cast<size_t>(k)] = products[static_cast<size_t>(taps_ * K + k)];
      for (int64_t i = 0; i < taps_; ++i) {
        total[static_cast<size_t>(K + k)] += w[static_cast<size_t>(i)] * centred(products, K, i, k);
      }
    }
    return total;
  }
  void filter_gradient(const std::vector<double>& products, const float* weight, int64_t K,
                       const float* scale, const float* slope, float* dweight) const {
    for (int64_t k = 0; k < K; ++k) {
      const std::vector<double> cov_w = spread(taps(weight + k * taps_));
      for (int64_t i = 0; i < taps_; ++i) {
        const double d = centred(products, K, i, k) -
                         static_cast<double>(slope[k]) * pixels() * cov_w[static_cast<size_t>(i)];
        dweight[k * taps_ + place(i, taps_ / kTaps)] = static_cast<float>(static_cast<double>(scale[k]) * d);
      }
    }
  }

 private:
  /// A: sum (p - mean_p) g.
  double centred(const std::vector<double>& products, int64_t K, int64_t i, int64_t k) const {
    return products[static_cast<size_t>(i * K + k)] - mean(i) * products[static_cast<size_t>(taps_ * K + k)];
  }

  int64_t taps_;  // 9 C
  float shift_;
  const double* gram_;
};

/// A source (sources.h): relu(bn(conv(x))), computed when its rows are read.
class RecomputedActivation {
 public:
  int64_t H, W, C;  // the convolution's P, Q, K

  /// The filters with the normalisation folded in are kept in the calling thread's workspace.
  RecomputedActivation(const ConvShape& s, const float* x, const float* weight, const float* bias,
                       const Affine& affine, const float* mean)
      : H(s.P), W(s.Q), C(s.K), s_(s), x_{x, s.H, s.W, s.C} {
    std::vector<float> folded(weight, weight + s.K * kTaps * s.C);
    for (int64_t i = 0; i < static_cast<int64_t>(folded.size()); ++i) {
      folded[static_cast<size_t>(i)] *= affine.scale[static_cast<size_t>(i / (kTaps * s.C))];
    }
    filter_ = transformed_ ? transform_rows_of_filter(folded.data(), s, Purpose::kPackedFilter)
                           : pack_filter(folded.data(), s, /*turned=*/false, Purpose::kPackedFilter);
    bias_.resize(static_cast<size_t>(s.K));
    for (size_t k = 0; k < bias_.size(); ++k)
      bias_[k] = affine.scale[k] * (bias[k] - mean[k]) + affine.beta[k];
  }

  /// Rows [begin, end) of image n are read next, by this thread; of those behind, kRows at most are
  /// remembered.
  void hold(int64_t n, int64_t begin, int64_t end) {
    if (rows_ == nullptr) {
      rows_ = workspace(Purpose::kHeldRows, kRows * W * C);
      ahead_.emplace(s_);
      std::fill_n(held_, kRows, int64_t{-1});
    }
    for (int64_t h = std::max<int64_t>(0, begin); h < std::min(H, end); ++h) {
      int64_t& held = held_[h & (kRows - 1)];
      if (held == n * H + h) continue;
      compute_row(*ahead_, n, h, rows_ + (h & (kRows - 1)) * W * C);
      held = n * H + h;
    }
  }
  const float* held_row(int64_t h) const { return rows_ + (h & (kRows - 1)) * W * C; }

  Vec load(int64_t, int64_t h, int64_t w, int64_t c, int64_t lanes) const {
    return maskcore::load(held_row(h) + w * C + c, lanes);
  }
  void prefetch(int64_t, int64_t, int64_t, int64_t) const {}
  template <class F>
  void for_each_run(int64_t, int64_t, int64_t, int64_t, const F&) const {}

  /// The three padded rows of x under output row h, *pitch floats apart.
  const float* taps(int64_t n, int64_t h, int64_t* pitch) const {
    *pitch = (s_.W + 2 * s_.padding) * s_.C;
    return padded_rows(x_, s_.padding, n, h, h + 3, workspace(Purpose::kHeldInput, 3 * *pitch));
  }
  const ConvShape& shape() const { return s_; }

  /// `ahead` holds what neighbouring rows share.
  void compute_row(TransformedRows& ahead, int64_t n, int64_t h, float* out) const {
    if (transformed_) {
      ahead.hold(x_, n, h);
      convolve_row(ahead, h, filter_, s_.C,
                   {.bias = bias_.data(), .relu = true, .streamed = false, .Q = W, .K = C, .y = out});
      return;
    }
    ConvTile t{};
    t.C = s_.C;
    t.relu = true;
    t.K = C;
    const float* x = taps(n, h, &t.pitch);
    for (int64_t k = 0; k < C; k += kTileColumns) {
      t.w = filter_ + k * kTaps * s_.C;
      t.bias = bias_.data() + k;
      t.lanes = std::min<int64_t>(kTileColumns, C - k);
      conv_row(t, x, out + k, W);
    }
  }

 private:
  static constexpr int64_t kRows = 8;  // a tile reads 6 or 8; a power of two
  static_assert(kRows >= F6::kIn);

  ConvShape s_;
  bool transformed_ = is_first_layer(s_);
  Activation x_;
  const float* filter_;
  std::vector<float> bias_;
  float* rows_ = nullptr;  // the thread's [kRows][W][C], row h in slot h % kRows
  int64_t held_[kRows];
  std::optional<TransformedRows> ahead_;  // the thread's
};

inline void load_row(const RecomputedActivation& source, int64_t n, int64_t h, float* out) {
  TransformedRows ahead(source.shape());
  source.compute_row(ahead, n, h, out);
}

/// What becomes of a row of the gradient at a RecomputedActivation (StoreRows): it is masked by the ReLU, in
/// place, and multiplied by P.
struct PatchRows {
  double* products;  // [slot][9 C + 1][K]
  float shift;
  float* dx = nullptr;

  bool wanted() const { return true; }
  void take(const RecomputedActivation& input, int64_t slot, int64_t n, int64_t h, float* row) const {
    const int64_t K = input.C, Q = input.W, C = input.shape().C, size = kTaps * C + 1;
    const float* y = input.held_row(h);
    for_each_vector(Q * K, [&](int64_t i, auto lanes) {
      store(row + i, relu_gradient(load(row + i, lanes), load(y + i, lanes)), lanes);
    });
    int64_t pitch = 0;
    const float* x = input.taps(n, h, &pitch);
    float* patches = workspace(Purpose::kPatches, kPatchPixels * kPatch);
    for (int64_t q = 0; q < Q; q += kPatchPixels) {
      const int64_t pixels = std::min(kPatchPixels, Q - q);
      load_patches(x, pitch, C, q, pixels, shift, patches);
      add_patch_products(patches, size, row + q * K, K, K, pixels, products + slot * size * K);
    }
  }
};

}  // namespace maskcore
