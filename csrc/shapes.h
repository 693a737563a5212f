// Shapes and the checks that every kernel relies on. Letters, everywhere in this folder:
//   N batch, H W input height and width, C input channels,
//   P Q output height and width, K output channels, R S filter taps (always 3 x 3).
// Activations are [N,H,W,C] and contiguous; filters are [K,C,3,3] as torch.nn.Conv2d keeps them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace maskcore {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr int64_t kAny = -1;  // a size that only has to be consistent with itself
inline constexpr int64_t kTaps = 9;  // 3 x 3

inline void check_tensor(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes,
                         ScalarType dtype = ScalarType::Float) {
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(sizes.size()), name, " must have ", sizes.size(),
                  " dimensions, has ", tensor.dim());
  int64_t i = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(size == kAny || tensor.size(i) == size, name, " must have size ", size, " in dimension ",
                    i, ", has ", tensor.size(i));
    ++i;
  }
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " must be ",
                  dtype == ScalarType::Float ? "float32" : (dtype == ScalarType::Byte ? "uint8" : "int64"));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

/// What a convolution of float32 tensors may round the operands of its products to; sums are float32.
enum class Precision : std::uint8_t { kFloat32, kTensorFloat32, kBfloat16 };

/// The names are those of torch.backends' fp32_precision.
inline Precision parse_precision(const std::string& name) {
  if (name == "ieee") return Precision::kFloat32;
  if (name == "tf32") return Precision::kTensorFloat32;
  STD_TORCH_CHECK(name == "bf16", "precision must be ieee, tf32 or bf16, is ", name);
  return Precision::kBfloat16;
}

/// A 3x3 stride-1 convolution: P = H + 2 padding - 2, Q = W + 2 padding - 2.
struct ConvShape {
  int64_t N, H, W, C, K, padding;
  int64_t P = H + 2 * padding - 2;
  int64_t Q = W + 2 * padding - 2;

  static ConvShape of(const Tensor& x, const Tensor& weight, int64_t padding) {
    STD_TORCH_CHECK(padding == 0 || padding == 1, "padding must be 0 or 1, is ", padding);
    check_tensor(x, "x", {kAny, kAny, kAny, kAny});
    check_tensor(weight, "weight", {kAny, x.size(3), 3, 3});
    const ConvShape s{.N = x.size(0),
                      .H = x.size(1),
                      .W = x.size(2),
                      .C = x.size(3),
                      .K = weight.size(0),
                      .padding = padding};
    STD_TORCH_CHECK(s.P >= 1 && s.Q >= 1, "x must be at least ", 3 - 2 * padding,
                    " pixels high and wide, is ", s.H, " x ", s.W);
    STD_TORCH_CHECK(s.C >= 1 && s.K >= 1, "weight must have at least one input and one output channel");
    return s;
  }

  /// dx = convolution of dy, padded by 2 - padding, with the filter turned by 180 degrees.
  ConvShape backward_data() const { return {.N = N, .H = P, .W = Q, .C = K, .K = C, .padding = 2 - padding}; }
};

/// A convolution and the one behind it, whose output may be pooled.
struct HeadShape {
  ConvShape first, second;
  bool pool;

  static HeadShape of(const Tensor& x, const Tensor& weight1, const Tensor& weight2, int64_t padding1,
                      int64_t padding2, bool pool) {
    const ConvShape first = ConvShape::of(x, weight1, padding1);
    STD_TORCH_CHECK(padding2 == 0 || padding2 == 1, "padding2 must be 0 or 1, is ", padding2);
    check_tensor(weight2, "weight2", {kAny, first.K, 3, 3});
    const ConvShape second{
        .N = first.N, .H = first.P, .W = first.Q, .C = first.K, .K = weight2.size(0), .padding = padding2};
    STD_TORCH_CHECK(second.P >= 1 && second.Q >= 1, "x is too small for two convolutions: the first gives ",
                    first.P, " x ", first.Q);
    STD_TORCH_CHECK(second.K >= 1, "weight2 must have at least one output channel");
    return {.first = first, .second = second, .pool = pool};
  }
};

/// 2x2 max-pooling with stride 2; an odd last row or column is dropped (VALID).
struct PoolShape {
  int64_t N, H, W, C;
  int64_t P = H / 2;
  int64_t Q = W / 2;
};

}  // namespace maskcore
