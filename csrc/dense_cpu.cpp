// dense:  y[n,k] = b[k] + sum over c of x[n,c] w[k,c], through ReLU if asked for
// Its gradients, with g = dy where there is no ReLU or y > 0, else 0:
//   dx[n,c] = sum over k of g[n,k] w[k,c];  dw[k,c] = sum over n of g[n,k] x[n,c];  db[k] = sum over n of
//   g[n,k]
// For batches of up to kMostSamples these are bound by the memory that w and dw lie in: forward reads w once,
// backward reads it once more and writes dw in the same pass, past the caches. Larger batches are matrix
// products for the BLAS library. Sums over c run in lanes, then over the lanes, whatever the number of
// threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "arena.h"
#include "register_tile.h"
#include "shapes.h"
#include "vector.h"
#include "workspace.h"

namespace maskcore {
namespace {

inline constexpr int kMostSamples = 8;
// Work that is worth a second thread, in multiply-adds.
inline constexpr int64_t kGrainOperations = 32 * 1024;
// Columns of w that the backward pass works on at a time: x and dx of 8 samples take 16 KB of L1.
inline constexpr int64_t kBlockColumns = 256;
inline constexpr int64_t kBackwardRows = 4;  // of w at a time: a dx is loaded and stored once for them
// How far ahead of its use w is asked for, floats: 2 KiB, some 100 ns at a core's share of the memory's
// speed.
inline constexpr int64_t kAhead = 512;

/// Rows of w that a forward step shares x among: sums, their rows and one x must fit the registers.
template <int N>
inline constexpr int kForwardRows = std::clamp(((kVectorBytes == 64 ? 32 : 16) - 1) / (N + 1), 1, 4);

struct DenseShape {
  int64_t N, C, K;
};

inline float sum_lanes(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

/// The outputs [k, k + kRows) of N samples.
template <int N, int kRows>
void dense_rows(const DenseShape& s, const float* x, const float* w, const float* b, bool relu, int64_t k,
                float* y) {
  Vec acc[kRows][N] = {};
  for_each_vector(s.C, [&](int64_t c, auto lanes) {
    Vec row[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const float* from = w + (k + i) * s.C + c;
      __builtin_prefetch(from + kAhead);
      row[i] = load(from, lanes);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Vec sample = load(x + n * s.C + c, lanes);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) acc[i][n] += sample * row[i];
    }
  });
  for (int i = 0; i < kRows; ++i) {
    for (int n = 0; n < N; ++n) {
      const float sum = b[k + i] + sum_lanes(acc[i][n]);
      y[n * s.K + k + i] = relu && sum <= 0.0f ? 0.0f : sum;
    }
  }
}

template <int N>
void dense_small(const DenseShape& s, const float* x, const float* w, const float* b, bool relu, float* y) {
  constexpr int kRows = kForwardRows<N>;
  const int64_t grain = std::max<int64_t>(kRows, kGrainOperations / std::max<int64_t>(1, N * s.C));
  torch::stable::parallel_for(0, s.K, grain, [=](int64_t begin, int64_t end) {
    int64_t k = begin;
    for (; k + kRows <= end; k += kRows) dense_rows<N, kRows>(s, x, w, b, relu, k, y);
    for (; k < end; ++k) dense_rows<N, 1>(s, x, w, b, relu, k, y);
  });
}

/// dw of kRows rows and `lanes` columns, and what they add to dx.
template <int N, int kRows, class Lanes>
inline MASKCORE_INLINE void dense_backward_step(const DenseShape& s, const float* g, const float* x,
                                                const float* w, int64_t k, int64_t c, Lanes lanes,
                                                bool streamed, float* dx, float* dw) {
  Vec row[kRows], drow[kRows] = {};
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    const float* from = w + (k + i) * s.C + c;
    __builtin_prefetch(from + kRows * s.C);  // the same columns of the next rows
    row[i] = load(from, lanes);
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const Vec sample = load(x + n * s.C + c, lanes);
    Vec sum = load(dx + n * s.C + c, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Vec gradient = broadcast(g[n * s.K + k + i]);
      sum += gradient * row[i];
      drow[i] += gradient * sample;
    }
    store(dx + n * s.C + c, sum, lanes);
  }
  for (int i = 0; i < kRows; ++i) {
    float* to = dw + (k + i) * s.C + c;
    if (streamed) {
      stream(to, drow[i]);
    } else {
      store(to, drow[i], lanes);
    }
  }
}

template <int N>
void dense_backward_small(const DenseShape& s, const float* g, const float* x, const float* w, float* dx,
                          float* dw) {
  const bool streamed = streams(dw, s.C, s.K * s.C);
  const int64_t blocks = ceil_div(s.C, kBlockColumns);
  const int64_t grain = std::max<int64_t>(1, kGrainOperations / (N * s.K * kBlockColumns));
  torch::stable::parallel_for(0, blocks, grain, [=](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlockColumns, columns = std::min(kBlockColumns, s.C - begin);
      for (int n = 0; n < N; ++n) std::fill_n(dx + n * s.C + begin, columns, 0.0f);
      int64_t k = 0;
      const auto rows = [&]<int kRows>(std::integral_constant<int, kRows>) {
        for (; k + kRows <= s.K; k += kRows) {
          for_each_vector(columns, [&](int64_t c, auto lanes) {
            dense_backward_step<N, kRows>(s, g, x, w, k, begin + c, lanes, streamed, dx, dw);
          });
        }
      };
      rows(std::integral_constant<int, kBackwardRows>());
      rows(std::integral_constant<int, 1>());
    }
    stream_fence();
  });
}

/// f.operator()<N>() for N = samples, 1 .. kMostSamples.
template <class F>
void with_samples(int64_t samples, const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    ((samples == I + 1 ? f.template operator()<I + 1>() : void()), ...);
  }(std::make_integer_sequence<int, kMostSamples>());
}

DenseShape dense_shape(const Tensor& x, const Tensor& weight) {
  check_tensor(x, "x", {kAny, kAny});
  check_tensor(weight, "weight", {kAny, x.size(1)});
  return {.N = x.size(0), .C = x.size(1), .K = weight.size(0)};
}

Tensor dense_cpu(const Tensor& x, const Tensor& weight, const Tensor& bias, bool relu) {
  const DenseShape s = dense_shape(x, weight);
  check_tensor(bias, "bias", {s.K});
  const float* b = bias.const_data_ptr<float>();
  if (s.N > kMostSamples) {
    Tensor y = torch::stable::matmul(x, torch::stable::transpose(weight, 0, 1));
    float* out = y.mutable_data_ptr<float>();
    for (int64_t n = 0; n < s.N; ++n, out += s.K) {
      for_each_vector(s.K, [&](int64_t k, auto lanes) {
        const Vec sum = load(out + k, lanes) + load(b + k, lanes);
        store(out + k, relu ? maskcore::relu(sum) : sum, lanes);
      });
    }
    return y;
  }
  Tensor y = empty_activation({s.N, s.K});
  with_samples(s.N, [&]<int N>() {
    dense_small<N>(s, x.const_data_ptr<float>(), weight.const_data_ptr<float>(), b, relu,
                   y.mutable_data_ptr<float>());
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> dense_backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                      const Tensor& y, bool relu) {
  const DenseShape s = dense_shape(x, weight);
  check_tensor(dy, "dy", {s.N, s.K});
  check_tensor(y, "y", {s.N, s.K});
  Tensor g = empty_activation({s.N, s.K});
  Tensor dbias = empty_gradient({s.K});
  const float *dy_data = dy.const_data_ptr<float>(), *y_data = y.const_data_ptr<float>();
  float *g_data = g.mutable_data_ptr<float>(), *db = dbias.mutable_data_ptr<float>();
  std::fill_n(db, s.K, 0.0f);
  for (int64_t n = 0; n < s.N; ++n) {
    for (int64_t k = 0; k < s.K; ++k) {
      const int64_t i = n * s.K + k;
      g_data[i] = relu && y_data[i] <= 0.0f ? 0.0f : dy_data[i];
      db[k] += g_data[i];
    }
  }
  if (s.N > kMostSamples || s.N == 0) {
    return {torch::stable::matmul(g, weight), torch::stable::matmul(torch::stable::transpose(g, 0, 1), x),
            dbias};
  }
  Tensor dx = empty_activation({s.N, s.C});
  Tensor dweight = empty_gradient({s.K, s.C});
  with_samples(s.N, [&]<int N>() {
    dense_backward_small<N>(s, g_data, x.const_data_ptr<float>(), weight.const_data_ptr<float>(),
                            dx.mutable_data_ptr<float>(), dweight.mutable_data_ptr<float>());
  });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace maskcore

STABLE_TORCH_LIBRARY_IMPL(maskcore, CPU, m) {
  m.impl("dense", TORCH_BOX(&maskcore::dense_cpu));
  m.impl("_dense_backward", TORCH_BOX(&maskcore::dense_backward_cpu));
}
