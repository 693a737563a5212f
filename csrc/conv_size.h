// The size of a 3x3 stride-1 convolution, and what its CUDA launchers need to know besides the tensors.
//   N batch, H W input height and width, C input channels, P Q output height and width, K output channels.
#pragma once

#include <cstdint>

namespace maskcore {

struct ConvSize {
  int64_t N, H, W, C, K, padding;  // padding 0 or 1; of a backward-data convolution 2 or 1
  int64_t P = H + 2 * padding - 2;
  int64_t Q = W + 2 * padding - 2;

  /// dx = convolution of dy, padded by 2 - padding, with the filter turned by 180 degrees.
  ConvSize backward_data() const { return {.N = N, .H = P, .W = Q, .C = K, .K = C, .padding = 2 - padding}; }
};

enum class DataType { kFloat32, kBfloat16 };  // of activations; filters and everything per channel is float32

/// How float32 activations are multiplied, by torch's names; bfloat16 ones are always kBf16. Sums are
/// float32.
enum class Precision { kIeee, kTf32, kBf16 };

/// What one launcher call computes with.
struct ConvCall {
  ConvSize size;
  DataType dtype;
  Precision precision;
  int multiprocessors;  // of the device
  int shared_bytes;     // of a multiprocessor
  bool wgmma;           // whether the device has it, as sm_90 alone does
};

}  // namespace maskcore
