// A convolution with the batch's mean and variance of its output: each tile's moments come from the epilogue
// and are merged here. What the operators with a batch norm share.
#pragma once

#include "batch_norm.cuh"
#include "conv_dispatch.cuh"

namespace maskcore {

/// Channels that have coefficients.
inline int64_t padded_channels(int64_t K) { return round_up(K, kCoefficientGroup); }

/// Tiles of a convolution's pixels that are not pooled, as its kernel cuts them: that of pictures, or one of
/// halo tiles (a SpreadTiling, which may be of another number).
inline int64_t tiles_of(const ConvSize& s, bool of_pictures) {
  return Tiling::choose(s, /*pooled=*/false, kTilePixels, kPatchPixels, /*spread=*/!of_pictures).tiles;
}

struct TrainWorkspace {
  void* packed;
  float* moments;
  int* counts;
  double2* parts;
  float* scale;
  int64_t tiles, bytes;

  TrainWorkspace(const ConvCall& call, void* memory) {
    const ConvSize& s = call.size;
    tiles = tiles_of(s, /*of_pictures=*/s.C <= kPictureChannels);
    Pieces pieces{static_cast<unsigned char*>(memory)};
    packed = pieces.take<unsigned char>(packed_filter_bytes(s.C, s.K));
    moments = pieces.take<float>(tiles * 3 * s.K);
    counts = pieces.take<int>(tiles);
    parts = pieces.take<double2>(moment_parts(tiles) * s.K);
    scale = pieces.take<float>(s.K);
    bytes = pieces.used;
  }
};

/// Adds up tiles' moments, in an order fixed by the shape.
inline cudaError_t add_moments(const float* moments, const int* counts, int64_t tiles, int64_t K,
                               double2* parts, cudaStream_t stream) {
  const dim3 grid(channel_blocks(K, kChannelThreads), static_cast<unsigned>(moment_parts(tiles)));
  return launch(&add_moments_kernel, grid, dim3(kChannelThreads, kGroupThreads), kAddBytes, stream, moments,
                counts, static_cast<int>(tiles), static_cast<int>(K), parts);
}

/// z = conv(x, weight) + bias, its mean and var [K], and room.scale.
template <class Math, class T>
cudaError_t convolve_with_moments(const ConvCall& call, const T* x, const float* weight, const float* bias,
                                  const float* gamma, double eps, T* z, float* mean, float* var,
                                  const TrainWorkspace& room, cudaStream_t stream) {
  const ConvSize& s = call.size;
  const int K = static_cast<int>(s.K);
  const StoreOutput<T, false, true> output{.y = z,
                                           .bias = bias,
                                           .P = static_cast<int>(s.P),
                                           .Q = static_cast<int>(s.Q),
                                           .K = K,
                                           .aligned = aligned(z, s.K),
                                           .moments = room.moments,
                                           .counts = room.counts};
  cudaError_t error = convolve_forward<Math>(call, x, output, weight, room.packed, stream);
  if (error != cudaSuccess) return error;
  error = add_moments(room.moments, room.counts, room.tiles, s.K, room.parts, stream);
  if (error != cudaSuccess) return error;
  return launch(&finish_moments_kernel, dim3(channel_blocks(s.K, kChannelThreads)),
                dim3(kChannelThreads, kGroupThreads), kAddBytes, stream, room.parts,
                static_cast<int>(moment_parts(room.tiles)), room.moments,
                static_cast<double>(s.N * s.P * s.Q), gamma, eps, K, mean, var, room.scale);
}

}  // namespace maskcore
