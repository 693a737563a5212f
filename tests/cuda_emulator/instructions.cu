// Every instruction of the emulator by itself: tests/test_cuda_emulator.py gives each lane its registers and
// looks at what comes back.
#include <cuda_runtime.h>

#include "launch.cuh"
#include "tensor_core.cuh"

namespace maskcore {
namespace {

__global__ void mma_tf32_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  const unsigned lane = threadIdx.x;
  const uint32_t fragment_a[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
  const uint32_t fragment_b[2] = {b[lane * 2], b[lane * 2 + 1]};
  float fragment_d[4] = {d[lane * 4], d[lane * 4 + 1], d[lane * 4 + 2], d[lane * 4 + 3]};
  mma_tf32(fragment_d, fragment_a, fragment_b);
  for (unsigned i = 0; i < 4; ++i) d[lane * 4 + i] = fragment_d[i];
}

__global__ void mma_bf16_kernel(const uint32_t* a, const uint32_t* b, float* d) {
  const unsigned lane = threadIdx.x;
  const uint32_t fragment_a[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
  const uint32_t fragment_b[2] = {b[lane * 2], b[lane * 2 + 1]};
  float fragment_d[4] = {d[lane * 4], d[lane * 4 + 1], d[lane * 4 + 2], d[lane * 4 + 3]};
  mma_bf16(fragment_d, fragment_a, fragment_b);
  for (unsigned i = 0; i < 4; ++i) d[lane * 4 + i] = fragment_d[i];
}

// How wgmma_kernel multiplies.
enum class Product { kTf32, kBf16, kBf16Trans };

// Two products on the same sums. Of b, 16 bytes each go to the byte of shared memory that `places` says; a
// warpgroup has its own two descriptors, of rows that begin at byte 0.
template <int NT, Product kProduct>
__global__ void wgmma_kernel(const uint32_t* a, const uint4* b, const int* places, int chunks,
                             const uint64_t* descriptors, float* d) {
  unsigned char* const s = dynamic_shared<unsigned char>();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int i = thread; i < chunks; i += threads) *reinterpret_cast<uint4*>(s + places[i]) = b[i];
  wgmma_operand_fence();
  __syncthreads();
  uint32_t fragments[2][4];
  float sums[NT][4];
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) fragments[i][j] = a[(i * threads + thread) * 4 + j];
  }
  for (int i = 0; i < 4 * NT; ++i) sums[i / 4][i % 4] = d[thread * 4 * NT + i];
  wgmma_fence();
  for (int i = 0; i < 2; ++i) {
    const uint64_t descriptor = descriptors[thread / 128 * 2 + i] + (shared_address(s) >> 4);
    if constexpr (kProduct == Product::kBf16) {
      wgmma_bf16(sums, fragments[i], descriptor);
    } else if constexpr (kProduct == Product::kBf16Trans) {
      wgmma_bf16_trans(sums, fragments[i], descriptor);
    } else {
      wgmma_tf32(sums, fragments[i], descriptor);
    }
  }
  wgmma_commit();
  wgmma_wait_for(sums);
  for (int i = 0; i < 4 * NT; ++i) d[thread * 4 * NT + i] = sums[i / 4][i % 4];
}

__global__ void descriptor_kernel(uint32_t* addresses, uint64_t* descriptors) {
  const unsigned char* const rows = dynamic_shared<unsigned char>() + threadIdx.x / 2 * 512;
  const unsigned char* const step = rows + threadIdx.x % 2 * 32;
  addresses[threadIdx.x] = shared_address(step);
  descriptors[threadIdx.x] = wgmma_rows_of_64(step);
}

__global__ void columns_descriptor_kernel(const int* eight_rows, const int* eight_columns,
                                          uint32_t* addresses, uint64_t* descriptors) {
  const unsigned char* const first = dynamic_shared<unsigned char>() + threadIdx.x * 16;
  addresses[threadIdx.x] = shared_address(first);
  descriptors[threadIdx.x] = wgmma_columns(first, eight_rows[threadIdx.x], eight_columns[threadIdx.x]);
}

// Four 8 x 8 matrices, one under the other, whose rows lie 48 bytes apart in shared memory.
__global__ void ldmatrix_kernel(const uint16_t* matrices, uint32_t* r, int count, bool transposed) {
  constexpr unsigned kPitch = 24;
  uint16_t* s = dynamic_shared<uint16_t>();
  const unsigned lane = threadIdx.x;
  for (unsigned i = 0; i < 8; ++i) s[lane * kPitch + i] = matrices[lane * 8 + i];
  __syncthreads();
  const uint16_t* row = s + lane * kPitch;
  uint32_t one[1] = {}, two[2] = {}, four[4] = {};
  if (count == 1) {
    ldmatrix_x1(one, row);
    r[lane] = one[0];
  } else if (count == 2) {
    if (transposed) {
      ldmatrix_x2_trans(two, row);
    } else {
      ldmatrix_x2(two, row);
    }
    for (unsigned j = 0; j < 2; ++j) r[lane * 2 + j] = two[j];
  } else {
    if (transposed) {
      ldmatrix_x4_trans(four, row);
    } else {
      ldmatrix_x4(four, row);
    }
    for (unsigned j = 0; j < 4; ++j) r[lane * 4 + j] = four[j];
  }
}

template <class T>
__global__ void shuffle_kernel(const T* values, T* results, int kind, int operand, int width) {
  const unsigned lane = threadIdx.x;
  const T value = values[lane];
  if (kind == 0) results[lane] = __shfl_sync(0xffffffffu, value, operand, width);
  if (kind == 1) results[lane] = __shfl_up_sync(0xffffffffu, value, operand, width);
  if (kind == 2) results[lane] = __shfl_down_sync(0xffffffffu, value, operand, width);
  if (kind == 3) results[lane] = __shfl_xor_sync(0xffffffffu, value, operand, width);
}

// The lower half votes among itself, then all.
__global__ void vote_kernel(const int* votes, uint32_t* results) {
  const unsigned lane = threadIdx.x;
  uint32_t* mine = results + lane * 4;
  mine[0] = 0;
  if (lane < 16) mine[0] = __ballot_sync(0x0000ffffu, votes[lane]);
  mine[1] = __ballot_sync(0xffffffffu, votes[lane]);
  mine[2] = __any_sync(0xffffffffu, votes[lane]) != 0;
  mine[3] = __all_sync(0xffffffffu, votes[lane]) != 0;
}

__global__ void convert_kernel(const float* x, uint32_t* tf32, uint32_t* pairs, float* unpacked, int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += 32) {
    tf32[i] = to_tf32(x[i]);
    pairs[i] = pack_bf16(x[i], x[n - 1 - i]);
    const float2 back = unpack_bf16(pairs[i]);
    unpacked[2 * i] = back.x;
    unpacked[2 * i + 1] = back.y;
  }
}

// Two bfloat16 a word.
__global__ void pair_kernel(const uint32_t* a, const uint32_t* b, uint32_t* larger, uint32_t* masks,
                            uint32_t* relu, int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += 32) {
    larger[i] = max_nan_bf16(a[i], b[i]);
    masks[2 * i] = sign_masks<1, 3>(a[i]);
    masks[2 * i + 1] = sign_masks<2, 0>(a[i]);
    const float2 two = unpack_bf16(a[i]);
    relu[i] = pack_relu_bf16(two.x, two.y);
  }
}

// 28 bytes a thread by copies of every size; where not valid, zeros.
__global__ void cp_async_kernel(const float* x, float* y, int valid) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  float* const mine = s + 8 * t;
  cp_async_16(mine, x + 8 * t, (valid & 1) != 0);
  cp_async_commit();
  cp_async_commit();  // an empty group
  cp_async_8(mine + 4, x + 8 * t + 4, (valid & 2) != 0);
  cp_async_4(mine + 6, x + 8 * t + 6, (valid & 4) != 0);
  cp_async_commit();
  cp_async_wait<2>();
  for (unsigned i = 0; i < 4; ++i) y[7 * t + i] = mine[i];
  cp_async_wait<0>();
  for (unsigned i = 4; i < 7; ++i) y[7 * t + i] = mine[i];
}

__global__ void index_kernel(unsigned* seen) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  unsigned* mine = seen + (block * blockDim.x * blockDim.y * blockDim.z + thread) * 6;
  mine[0] = blockIdx.x;
  mine[1] = blockIdx.y;
  mine[2] = blockIdx.z;
  mine[3] = threadIdx.x;
  mine[4] = threadIdx.y;
  mine[5] = threadIdx.z;
}

// Every thread writes down, twice, when it came: before and after its warp has met.
__global__ void order_kernel(int* sequence, int* count) {
  const int thread = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  sequence[atomicAdd(count, 1)] = thread;
  __syncwarp();
  sequence[atomicAdd(count, 1)] = thread;
}

// Every thread goes through its column of `program`, [steps][threads]: bits 0..1 nothing, read or write, bits
// 2..3 the access's size as a power of two, from bit 4 on its address. After a step, `joins` says who joins
// whom: bit 0 warp 0, bit 1 warp 1, bit 2 the block.
__global__ void program_kernel(const int* program, const int* joins, int steps, unsigned char* global) {
  unsigned char* const shared = dynamic_shared<unsigned char>();
  unsigned char* const memory = global == nullptr ? shared : global;
  const int threads = static_cast<int>(gridDim.x * blockDim.x);
  const int thread = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (global == nullptr) {
    if (threadIdx.x < 32) shared[threadIdx.x] = 0;
    __syncthreads();
  }
  unsigned sum = 0;
  for (int step = 0; step < steps; ++step) {
    const int access = program[step * threads + thread];
    unsigned char* const at = memory + (access >> 4);
    const int kind = access & 3, size = access >> 2 & 3;
    if (kind == 1 && size == 0) sum += *at;
    if (kind == 1 && size == 1) sum += *reinterpret_cast<uint16_t*>(at);
    if (kind == 1 && size == 2) sum += *reinterpret_cast<uint32_t*>(at);
    if (kind == 2 && size == 0) *at = static_cast<unsigned char>(sum);
    if (kind == 2 && size == 1) *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(sum);
    if (kind == 2 && size == 2) *reinterpret_cast<uint32_t*>(at) = sum;
    if ((joins[step] & 4) != 0) __syncthreads();
    if ((joins[step] >> (threadIdx.x / 32) & 1) != 0) __syncwarp();
  }
}

__constant__ const float kTable[4] = {1.5f, 2.5f, 3.5f, 4.5f};
__global__ void constants_kernel(const float* x, float* y) {
  const float* entry = kTable + threadIdx.x % 4;
  y[threadIdx.x] = x[threadIdx.x] * *entry;
}

__global__ void copy_kernel(const float* x, float* y) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  y[i] = x[i];
}

__global__ void traffic_kernel(const float* x, float* y, int stride) {
  float* s = dynamic_shared<float>();
  const int lane = static_cast<int>(threadIdx.x);
  if (lane == 1) s[0] = 0.0f;
  __syncthreads();
  const float mine = x[lane * stride];
  __syncthreads();
  s[lane * stride] = mine;
  __syncthreads();
  float sum = s[lane * stride];
  for (int i = 0; i < 3; ++i) sum += s[i * stride];
  y[lane] = sum;
}

__global__ void ldmatrix_traffic_kernel(float* y, int pitch) {
  char* s = dynamic_shared<char>();
  const int lane = static_cast<int>(threadIdx.x);
  *reinterpret_cast<float4*>(s + lane * pitch) = make_float4(1, 2, 3, 4);
  __syncthreads();
  uint32_t r[4];
  ldmatrix_x4(r, s + lane * pitch);
  y[lane] = __uint_as_float(r[0]);
}

}  // namespace

cudaError_t launch_copy(const float* x, float* y, int64_t blocks, cudaStream_t stream) {
  return launch(copy_kernel, static_cast<unsigned>(blocks), 64, 0, stream, x, y);
}
cudaError_t launch_traffic(const float* x, float* y, int stride, cudaStream_t stream) {
  return launch(traffic_kernel, 1, 32, 33 * 32 * sizeof(float), stream, x, y, stride);
}
cudaError_t launch_ldmatrix_traffic(float* y, int pitch, cudaStream_t stream) {
  return launch(ldmatrix_traffic_kernel, 1, 32, 32 * 144, stream, y, pitch);
}
cudaError_t launch_mma_tf32(const uint32_t* a, const uint32_t* b, float* d, cudaStream_t stream) {
  return launch(mma_tf32_kernel, 1, 32, 0, stream, a, b, d);
}
cudaError_t launch_mma_bf16(const uint32_t* a, const uint32_t* b, float* d, cudaStream_t stream) {
  return launch(mma_bf16_kernel, 1, 32, 0, stream, a, b, d);
}
cudaError_t launch_wgmma(const uint32_t* a, const uint4* b, const int* places, int chunks,
                         const uint64_t* descriptors, float* d, int columns, bool of_bf16, int groups,
                         cudaStream_t stream) {
  const auto with = [&](auto* kernel) {
    return launch(kernel, 1, static_cast<unsigned>(128 * groups), 64 * 1024, stream, a, b, places, chunks,
                  descriptors, d);
  };
  constexpr Product kRows[2] = {Product::kTf32, Product::kBf16};
  if (columns == 64) return with(of_bf16 ? wgmma_kernel<8, kRows[1]> : wgmma_kernel<8, kRows[0]>);
  return with(of_bf16 ? wgmma_kernel<16, kRows[1]> : wgmma_kernel<16, kRows[0]>);
}
cudaError_t launch_wgmma_trans(const uint32_t* a, const uint4* b, const int* places, int chunks,
                               const uint64_t* descriptors, float* d, int groups, cudaStream_t stream) {
  return launch(wgmma_kernel<8, Product::kBf16Trans>, 1, static_cast<unsigned>(128 * groups), 64 * 1024,
                stream, a, b, places, chunks, descriptors, d);
}
cudaError_t launch_columns_descriptor(const int* eight_rows, const int* eight_columns, uint32_t* addresses,
                                      uint64_t* descriptors, cudaStream_t stream) {
  return launch(columns_descriptor_kernel, 1, 32, 16 * 32, stream, eight_rows, eight_columns, addresses,
                descriptors);
}
cudaError_t launch_descriptor(uint32_t* addresses, uint64_t* descriptors, cudaStream_t stream) {
  return launch(descriptor_kernel, 1, 32, 16 * 512, stream, addresses, descriptors);
}
cudaError_t launch_ldmatrix(const uint16_t* matrices, uint32_t* r, int count, bool transposed,
                            cudaStream_t stream) {
  return launch(ldmatrix_kernel, 1, 32, 32 * 48, stream, matrices, r, count, transposed);
}
cudaError_t launch_shuffle(const int* values, int* results, int kind, int operand, int width,
                           cudaStream_t stream) {
  return launch(shuffle_kernel<int>, 1, 32, 0, stream, values, results, kind, operand, width);
}
cudaError_t launch_shuffle_64(const double* values, double* results, int kind, int operand, int width,
                              cudaStream_t stream) {
  return launch(shuffle_kernel<double>, 1, 32, 0, stream, values, results, kind, operand, width);
}
cudaError_t launch_vote(const int* votes, uint32_t* results, cudaStream_t stream) {
  return launch(vote_kernel, 1, 32, 0, stream, votes, results);
}
cudaError_t launch_convert(const float* x, uint32_t* tf32, uint32_t* pairs, float* unpacked, int n,
                           cudaStream_t stream) {
  return launch(convert_kernel, 1, 32, 0, stream, x, tf32, pairs, unpacked, n);
}
cudaError_t launch_pairs(const uint32_t* a, const uint32_t* b, uint32_t* larger, uint32_t* masks,
                         uint32_t* relu, int n, cudaStream_t stream) {
  return launch(pair_kernel, 1, 32, 0, stream, a, b, larger, masks, relu, n);
}
cudaError_t launch_cp_async(const float* x, float* y, int valid, cudaStream_t stream) {
  return launch(cp_async_kernel, 1, 64, 64 * 32, stream, x, y, valid);
}
cudaError_t launch_index(unsigned* seen, cudaStream_t stream) {
  return launch(index_kernel, dim3(2, 3, 2), dim3(4, 2, 3), 0, stream, seen);
}
cudaError_t launch_order(int* sequence, int* count, cudaStream_t stream) {
  return launch(order_kernel, 2, 64, 0, stream, sequence, count);
}
cudaError_t launch_program(const int* program, const int* joins, int steps, int blocks, unsigned char* global,
                           cudaStream_t stream) {
  return launch(program_kernel, static_cast<unsigned>(blocks), 64, 32, stream, program, joins, steps, global);
}
cudaError_t launch_constants(const float* x, float* y, cudaStream_t stream) {
  return launch(constants_kernel, 1, 32, 0, stream, x, y);
}
cudaError_t launch_too_much_shared_memory(float* y, cudaStream_t stream) {
  return launch(order_kernel, 1, 32, 228 * 1024, stream, static_cast<int*>(nullptr),
                reinterpret_cast<int*>(y));
}
cudaError_t launch_empty_grid(float* y, cudaStream_t stream) {
  return launch(order_kernel, dim3(1, 0), 32, 0, stream, static_cast<int*>(nullptr),
                reinterpret_cast<int*>(y));
}

}  // namespace maskcore
