// One small kernel for every kind of fault, right or faulty as it is told: tests/test_cuda_emulator.py runs
// both. x and y are kElements floats; `faulty` is the same for all threads.
#include <cuda_runtime.h>

#include "launch.cuh"
#include "tensor_core.cuh"

namespace maskcore {
namespace {

constexpr unsigned kThreads = 64;
constexpr unsigned kElements = 256;

// Barriers. ---------------------------------------------------------------------------------------

__global__ void no_barrier_after_writing(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  s[t] = x[t];
  if (!faulty) __syncthreads();
  y[t] = s[kThreads - 1 - t];
}

__global__ void no_barrier_before_the_next_tile(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  for (unsigned tile = 0; tile < kElements; tile += kThreads) {
    s[t] = x[tile + t];
    __syncthreads();
    y[tile + t] = s[(t + 1) % kThreads];
    if (!faulty) __syncthreads();
  }
}

__global__ void no_warp_barrier(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  s[t] = x[t];
  if (!faulty) __syncwarp();
  y[t] = s[t ^ 1];
}

// A shuffle makes the lanes meet, but CUDA does not promise that it orders memory.
__global__ void shuffle_for_a_warp_barrier(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  s[t] = x[t];
  const float sum = __shfl_xor_sync(0xffffffffu, x[t], 1);
  if (!faulty) __syncwarp();
  y[t] = s[t ^ 1] + sum;
}

__global__ void warp_barrier_for_a_barrier(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  s[t] = x[t];
  if (faulty) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  y[t] = s[kThreads - 1 - t];
}

__global__ void two_write_one_place(const float* x, float* y, bool faulty) {
  __shared__ float s[kThreads];
  const unsigned t = threadIdx.x;
  s[faulty ? t / 2 : t] = x[t];
  __syncthreads();
  y[t] = s[faulty ? t / 2 : t];
}

__global__ void race_through_global_memory(const float* x, float* y, bool faulty) {
  const unsigned t = threadIdx.x;
  y[t] = x[t];
  if (!faulty) __syncthreads();
  y[kThreads + t] = y[kThreads - 1 - t];
}

__global__ void barrier_in_a_branch(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  s[t] = x[t];
  if (!faulty || t < 32) __syncthreads();
  y[t] = s[t];
}

__global__ void two_different_barriers(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  s[t] = x[t];
  if (faulty && t % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[t] = s[t];
}

__global__ void return_before_a_barrier(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  if (faulty && t >= 50) return;
  s[t] = x[t];
  __syncthreads();
  y[t] = s[t];
}

// Warp instructions. ------------------------------------------------------------------------------

__global__ void shuffle_in_a_branch(const float* x, float* y, bool faulty) {
  const unsigned t = threadIdx.x;
  float v = x[t];
  if (!faulty || t % 32 < 16) v += __shfl_xor_sync(0xffffffffu, v, 1);
  y[t] = v;
}

__global__ void masks_that_differ(const float* x, float* y, bool faulty) {
  const unsigned t = threadIdx.x;
  y[t] = __shfl_xor_sync(faulty && t % 32 == 3 ? 0x0000ffffu : 0xffffffffu, x[t], 1);
}

__global__ void mask_without_itself(const float* x, float* y, bool faulty) {
  const unsigned t = threadIdx.x;
  y[t] = __ballot_sync(faulty ? 0x0000ffffu : 0xffffffffu, x[t] > 0) != 0 ? 1.0f : 0.0f;
}

__global__ void shuffle_from_outside_of_the_mask(const float* x, float* y, bool faulty) {
  const unsigned t = threadIdx.x;
  float v = x[t];
  if (t % 32 < 16) v = __shfl_xor_sync(0x0000ffffu, v, faulty ? 16 : 8);
  y[t] = v;
}

__global__ void mma_in_a_branch(const float* x, float* y, bool faulty) {
  const unsigned t = threadIdx.x;
  float d[4] = {x[t]};
  const uint32_t a[4] = {}, b[2] = {};
  if (!faulty || t != 7) mma_tf32(d, a, b);
  y[t] = d[0];
}

// D = A B with A = x[0..127] as 16 x 8, B = x[128..191] as 8 x 8, D = y[0..127] as 16 x 8. Run by one warp.
__global__ void swapped_fragment_index(const float* x, float* y, bool faulty) {
  const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto A = [&](unsigned row, unsigned k) { return to_tf32(x[row * 8 + k]); };
  const auto B = [&](unsigned k, unsigned column) { return to_tf32(x[128 + k * 8 + column]); };
  const uint32_t a[4] = {A(g, t), faulty ? A(g, t + 4) : A(g + 8, t), faulty ? A(g + 8, t) : A(g, t + 4),
                         A(g + 8, t + 4)};
  const uint32_t b[2] = {B(t, g), B(t + 4, g)};
  float d[4] = {};
  mma_tf32(d, a, b);
  for (unsigned i = 0; i < 4; ++i) y[(i < 2 ? g : g + 8) * 8 + 2 * t + i % 2] = d[i];
}

// Bounds, alignment, initialisation. --------------------------------------------------------------

// y[i] = x[i-1] + x[i] + x[i+1] with zeros past the border.
__global__ void off_by_one_border(const float* x, float* y, bool faulty) {
  const int last = static_cast<int>(kElements) - (faulty ? 0 : 1);
  for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(kElements); i += kThreads) {
    y[i] = (i > 0 ? x[i - 1] : 0.0f) + x[i] + (i + 1 <= last ? x[i + 1] : 0.0f);
  }
}

__global__ void before_the_beginning(const float* x, float* y, bool faulty) {
  const int64_t t = threadIdx.x;
  y[t] = x[t - (faulty ? 1 : 0)];
}

__global__ void past_the_end_of_shared_memory(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  s[t + (faulty ? 1 : 0)] = x[t];
  __syncthreads();
  y[t] = s[t];
}

__global__ void past_the_end_of_a_local_array(const float* x, float* y, bool faulty) {
  float v[4] = {1, 2, 3, 4};
  const unsigned t = threadIdx.x;
  y[t] = x[t] + v[t % (faulty ? 5 : 4)];
}

__global__ void pointer_to_nowhere(const float* x, float* y, bool faulty) {
  const unsigned t = threadIdx.x;
  y[t] = faulty ? *reinterpret_cast<const float*>(uintptr_t{4096} + t * 4) : x[t];
}

__global__ void misaligned_vector(const float* x, float* y, bool faulty) {
  const unsigned t = threadIdx.x;
  const float4 v = *reinterpret_cast<const float4*>(x + 2 * t + (faulty ? 0 : t % 2 * 2));
  y[t] = v.x + v.y + v.z + v.w;
}

__global__ void misaligned_vector_in_shared_memory(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  if (t < 16)
    *reinterpret_cast<float2*>(s + 2 * t + (faulty && t == 9 ? 1 : 0)) = make_float2(x[t], x[t + 1]);
  __syncthreads();
  y[t] = s[t % 16];
}

__global__ void shared_memory_never_written(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  if (!faulty || t != 20) s[t] = x[t];
  __syncthreads();
  y[t] = s[t];
}

__global__ void static_shared_memory_never_written(const float* x, float* y, bool faulty) {
  __shared__ float s[kThreads + 1];
  const unsigned t = threadIdx.x;
  s[t] = x[t];
  if (!faulty && t == 0) s[kThreads] = 0.0f;
  __syncthreads();
  y[t] = s[t + 1];
}

__global__ void global_memory_never_written(const float* x, float* y, bool faulty) {
  const unsigned t = threadIdx.x;
  if (!faulty) y[t] = 0.0f;
  y[t] += x[t];
}

__global__ void write_through_const(const float* x, float* y, bool faulty) {
  const unsigned t = threadIdx.x;
  (faulty ? const_cast<float*>(x) : y)[t] = 1.0f;
}

__global__ void output_left_out(const float* x, float* y, bool faulty) {
  for (unsigned i = threadIdx.x; i < kElements; i += kThreads) {
    if (!faulty || i != 77) y[i] = x[i];
  }
}

__global__ void overflow_of_an_index(const float* x, float* y, bool faulty) {
  const int t = static_cast<int>(threadIdx.x);
  y[t] = x[t * (faulty ? 1 << 30 : 1) % 64];
}

// cp.async. ---------------------------------------------------------------------------------------

__global__ void no_wait_group(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  cp_async_16(s + 4 * t, x + 4 * t);
  cp_async_commit();
  if (!faulty) cp_async_wait<0>();
  __syncthreads();
  for (unsigned i = 0; i < 4; ++i) y[4 * t + i] = s[4 * t + i];
  cp_async_wait<0>();
}

__global__ void no_commit(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  cp_async_16(s + 4 * t, x + 4 * t);
  if (!faulty) cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  y[t] = s[t];
}

__global__ void wait_group_for_one_too_few(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  cp_async_4(s + t, x + t);
  cp_async_commit();
  cp_async_8(s + kThreads + 2 * t, x + 2 * t);
  cp_async_commit();
  if (faulty) {
    cp_async_wait<2>();
  } else {
    cp_async_wait<1>();
  }
  y[t] = s[t];
  cp_async_wait<0>();
  y[kThreads + t] = s[kThreads + 2 * t + 1];
}

// Its own copies are waited for; those of the other threads only after a barrier.
__global__ void no_barrier_after_wait_group(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  cp_async_4(s + t, x + t);
  cp_async_commit();
  cp_async_wait<0>();
  if (!faulty) __syncthreads();
  y[t] = s[t ^ 1];
}

// The next copy into a buffer that others may still read.
__global__ void no_barrier_before_cp_async(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  for (unsigned tile = 0; tile < kElements; tile += kThreads) {
    cp_async_4(s + t, x + tile + t);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    y[tile + t] = s[kThreads - 1 - t];
    if (!faulty) __syncthreads();
  }
}

__global__ void write_under_cp_async(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  cp_async_4(s + t, x + t);
  cp_async_commit();
  if (faulty) s[t] = 0.0f;
  cp_async_wait<0>();
  y[t] = s[t];
}

__global__ void misaligned_cp_async(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  if (t < 8) cp_async_16(s + 4 * t, x + 4 * t + (faulty ? 1 : 0));
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  y[t] = s[t % 32];
}

__global__ void cp_async_past_the_end(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  cp_async_16(s + 4 * t, x + 4 * t + 4, faulty || t < kThreads - 1);
  cp_async_commit();
  cp_async_wait<0>();
  y[t] = s[4 * t];
}

__global__ void end_with_cp_async_in_flight(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  cp_async_4(s + t, x + t);
  cp_async_commit();
  if (!faulty) cp_async_wait<0>();
  y[t] = x[t];
}

__global__ void misaligned_ldmatrix(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  s[t] = x[t];
  s[kThreads + t] = x[t];
  __syncthreads();
  uint32_t r[4];
  ldmatrix_x4(r, s + t % 16 * 4 + (faulty ? 2 : 0));
  y[t] = __uint_as_float(r[0]);
}

// wgmma. By a warpgroup, on 64 rows of 64 bytes, whose last bytes are the last ones of shared memory. -----

constexpr unsigned kGroup = 128;
constexpr size_t kRowsBytes = 64 * 64;

__device__ __forceinline__ void fill_rows(const float* x, float* s) {
  for (unsigned i = threadIdx.x; i < kRowsBytes / sizeof(float); i += kGroup) s[i] = x[i % kElements];
}

__device__ __forceinline__ void make_rows(const float* x, float* s) {
  fill_rows(x, s);
  wgmma_operand_fence();
  __syncthreads();
}

// A thread's registers, and the product that changes them.
struct Registers {
  float sums[8][4] = {};
  uint32_t fragment[4];
  __device__ __forceinline__ explicit Registers(const float* x)
      : fragment{to_tf32(x[0]), to_tf32(x[1]), to_tf32(x[2]), to_tf32(x[3])} {}
  __device__ __forceinline__ void start(const float* s) {
    wgmma_tf32(sums, fragment, wgmma_rows_of_64(s));
    wgmma_commit();
  }
};

// A product with the rows at s, waited for.
__device__ void store_product(const float* x, const float* s, float* y) {
  Registers r(x);
  wgmma_fence();
  r.start(s);
  wgmma_wait_for(r.sums);
  y[threadIdx.x] = r.sums[0][0];
}

__global__ void operand_without_its_fence(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  fill_rows(x, s);
  if (!faulty || threadIdx.x != 36) wgmma_operand_fence();
  __syncthreads();
  store_product(x, s, y);
}

// Those of the other warps may have read by then.
__global__ void operand_fence_behind_the_barrier(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  fill_rows(x, s);
  if (!faulty) wgmma_operand_fence();
  __syncthreads();
  if (faulty) wgmma_operand_fence();
  store_product(x, s, y);
}

__global__ void operand_fence_before_its_copies(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  for (unsigned i = 4 * threadIdx.x; i < kRowsBytes / sizeof(float); i += 4 * kGroup) {
    cp_async_16(s + i, x + i % kElements);
  }
  cp_async_commit();
  if (faulty) wgmma_operand_fence();
  cp_async_wait<0>();
  if (!faulty) wgmma_operand_fence();
  __syncthreads();
  store_product(x, s, y);
}

__global__ void no_barrier_before_wgmma(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  fill_rows(x, s);
  wgmma_operand_fence();
  if (faulty) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  store_product(x, s, y);
}

__global__ void no_wgmma_fence(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x);
  if (!faulty) wgmma_fence();
  r.start(s);
  wgmma_wait_for(r.sums);
  y[threadIdx.x] = r.sums[0][0];
}

__global__ void fragment_loaded_behind_the_fence(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x);
  if (faulty) wgmma_fence();
  ldmatrix_x4(r.fragment, s + threadIdx.x % 32 * 4);
  if (!faulty) wgmma_fence();
  r.start(s);
  wgmma_wait_for(r.sums);
  y[threadIdx.x] = r.sums[0][0];
}

__global__ void fragment_made_behind_the_fence(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x);
  if (faulty) wgmma_fence();
  r.fragment[2] = to_tf32(x[5]);
  if (!faulty) wgmma_fence();
  r.start(s);
  wgmma_wait_for(r.sums);
  y[threadIdx.x] = r.sums[0][0];
}

__global__ void sums_made_behind_the_fence(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x);
  if (faulty) wgmma_fence();
  r.sums[7][1] = x[5];
  if (!faulty) wgmma_fence();
  r.start(s);
  wgmma_wait_for(r.sums);
  y[threadIdx.x] = r.sums[0][0];
}

__global__ void sums_read_before_the_wait(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x);
  wgmma_fence();
  r.start(s);
  if (faulty) y[threadIdx.x] = r.sums[0][0];
  wgmma_wait_for(r.sums);
  if (!faulty) y[threadIdx.x] = r.sums[0][0];
}

__global__ void sums_written_in_flight(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x);
  wgmma_fence();
  r.start(s);
  if (faulty) r.sums[3][2] = 0.0f;
  wgmma_wait_for(r.sums);
  y[threadIdx.x] = r.sums[3][2];
}

__global__ void sums_written_between_two_products(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x);
  wgmma_fence();
  r.start(s);
  if (!faulty) wgmma_wait<0>();
  r.sums[3][2] = 0.0f;
  wgmma_fence();
  r.start(s);
  wgmma_wait_for(r.sums);
  y[threadIdx.x] = r.sums[3][2];
}

__global__ void fragment_written_in_flight(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x);
  wgmma_fence();
  r.start(s);
  if (!faulty) wgmma_wait<0>();
  r.fragment[3] = to_tf32(x[4]);
  wgmma_wait_for(r.sums);
  y[threadIdx.x] = r.sums[0][0] + __uint_as_float(r.fragment[3]);
}

__global__ void operand_written_in_flight(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x);
  wgmma_fence();
  r.start(s);
  if (!faulty) wgmma_wait<0>();
  __syncthreads();
  s[threadIdx.x] = 0.0f;
  wgmma_wait_for(r.sums);
  y[threadIdx.x] = r.sums[0][0];
}

__global__ void copy_into_an_operand_in_flight(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x);
  wgmma_fence();
  r.start(s);
  if (!faulty) wgmma_wait<0>();
  __syncthreads();
  cp_async_16(s + 4 * threadIdx.x, x);
  cp_async_commit();
  cp_async_wait<0>();
  wgmma_wait_for(r.sums);
  y[threadIdx.x] = r.sums[0][0];
}

// The writer's own product has ended; those of the other warps only after a barrier behind their waits, even
// where they have come to these before.
__global__ void operand_written_behind_its_own_wait(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x);
  wgmma_fence();
  r.start(s);
  if (faulty) __syncthreads();
  wgmma_wait_for(r.sums);
  if (!faulty) __syncthreads();
  if (threadIdx.x / 32 == 3) s[threadIdx.x] = 0.0f;
  y[threadIdx.x] = r.sums[0][0];
}

__global__ void wgmma_wait_for_one_too_few(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x), other(x + 4);
  wgmma_fence();
  r.start(s);
  wgmma_fence();
  other.start(s);
  if (faulty) {
    wgmma_wait<2>();
  } else {
    wgmma_wait<1>();
  }
  r.fragment[0] = to_tf32(x[8]);
  wgmma_wait_for(other.sums);
  y[threadIdx.x] = r.sums[0][0] + other.sums[0][0] + __uint_as_float(r.fragment[0]);
}

__global__ void wgmma_without_a_commit(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x);
  wgmma_fence();
  wgmma_tf32(r.sums, r.fragment, wgmma_rows_of_64(s));
  if (!faulty) wgmma_commit();
  wgmma_wait_for(r.sums);
  y[threadIdx.x] = r.sums[0][0];
}

__global__ void end_with_wgmma_in_flight(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x);
  wgmma_fence();
  r.start(s);
  if (!faulty) wgmma_wait_for(r.sums);
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void warp_without_its_wgmma(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x);
  wgmma_fence();
  if (!faulty || threadIdx.x / 32 != 2) r.start(s);
  wgmma_wait_for(r.sums);
  y[threadIdx.x] = r.sums[0][0];
}

// Of three warps.
__global__ void warpgroup_without_its_last_warp(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  for (unsigned i = threadIdx.x; i < kRowsBytes / sizeof(float); i += blockDim.x) s[i] = x[i % kElements];
  wgmma_operand_fence();
  __syncthreads();
  Registers r(x);
  if (faulty) {
    wgmma_fence();
    r.start(s);
    wgmma_wait_for(r.sums);
  }
  y[threadIdx.x] = r.sums[0][0];
}

__global__ void wgmma_in_a_branch(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x);
  wgmma_fence();
  if (!faulty || threadIdx.x != 70) r.start(s);
  wgmma_wait_for(r.sums);
  y[threadIdx.x] = r.sums[0][0];
}

__global__ void warps_with_different_descriptors(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x);
  wgmma_fence();
  r.start(s + (faulty && threadIdx.x / 32 == 1 ? 8 : 0));
  wgmma_wait_for(r.sums);
  y[threadIdx.x] = r.sums[0][0];
}

__global__ void lanes_with_different_descriptors(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x);
  wgmma_fence();
  r.start(s + (faulty && threadIdx.x == 41 ? 8 : 0));
  wgmma_wait_for(r.sums);
  y[threadIdx.x] = r.sums[0][0];
}

// 64 bytes behind a multiple of 512, or 512.
__global__ void rows_amid_a_swizzle(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  s[kRowsBytes / sizeof(float) + threadIdx.x] = 0.0f;
  wgmma_operand_fence();
  __syncthreads();
  Registers r(x);
  wgmma_fence();
  r.start(s + (faulty ? 16 : 128));
  wgmma_wait_for(r.sums);
  y[threadIdx.x] = r.sums[0][0];
}

__global__ void rows_past_the_end_of_shared_memory(const float* x, float* y, bool faulty) {
  float* s = dynamic_shared<float>();
  make_rows(x, s);
  Registers r(x);
  wgmma_fence();
  r.start(s + (faulty ? 128 : 0));
  wgmma_wait_for(r.sums);
  y[threadIdx.x] = r.sums[0][0];
}

// Blocks. -----------------------------------------------------------------------------------------

__global__ void blocks_write_one_place(const float* x, float* y, bool faulty) {
  const unsigned t = threadIdx.x;
  y[t + (faulty ? 0 : blockIdx.x * kThreads)] = x[t];
}

__global__ void block_reads_what_another_wrote(const float* x, float* y, bool faulty) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  y[i] = x[i];
  if (faulty && blockIdx.x != 1) y[i] += y[kThreads];
}

// Run after a kernel that wrote y.
__global__ void block_writes_what_another_read(const float* x, float* y, bool faulty) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  y[i] = x[i] + y[faulty ? (i + kThreads) % kElements : i];
}

__global__ void copy(const float* x, float* y) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  y[i] = x[i];
}

}  // namespace

cudaError_t launch_block_writes_what_another_read(const float* x, float* y, bool faulty,
                                                  cudaStream_t stream) {
  const cudaError_t error = launch(copy, 4, kThreads, 0, stream, x, y);
  if (error != cudaSuccess) return error;
  return launch(block_writes_what_another_read, 4, kThreads, 0, stream, x, y, faulty);
}

// The launcher itself is instrumented as well.
cudaError_t launch_overflow_in_the_launcher(const float* x, float* y, bool faulty, cudaStream_t stream) {
  int elements = 1;
  for (int i = 0; i < (faulty ? 5 : 1); ++i) elements *= static_cast<int>(kElements);
  return launch(copy, elements == kElements ? 4 : 1, kThreads, 0, stream, x, y);
}

#define LAUNCHER(kernel, blocks, threads, shared_bytes)                                     \
  cudaError_t launch_##kernel(const float* x, float* y, bool faulty, cudaStream_t stream) { \
    return launch(kernel, blocks, threads, shared_bytes, stream, x, y, faulty);             \
  }

LAUNCHER(no_barrier_after_writing, 1, kThreads, kElements * sizeof(float))
LAUNCHER(no_barrier_before_the_next_tile, 1, kThreads, kElements * sizeof(float))
LAUNCHER(no_warp_barrier, 1, kThreads, kElements * sizeof(float))
LAUNCHER(shuffle_for_a_warp_barrier, 1, kThreads, kElements * sizeof(float))
LAUNCHER(warp_barrier_for_a_barrier, 1, kThreads, kElements * sizeof(float))
LAUNCHER(two_write_one_place, 1, kThreads, 0)
LAUNCHER(race_through_global_memory, 1, kThreads, 0)
LAUNCHER(barrier_in_a_branch, 1, kThreads, kElements * sizeof(float))
LAUNCHER(two_different_barriers, 1, kThreads, kElements * sizeof(float))
LAUNCHER(return_before_a_barrier, 1, kThreads, kElements * sizeof(float))
LAUNCHER(shuffle_in_a_branch, 1, kThreads, 0)
LAUNCHER(masks_that_differ, 1, kThreads, 0)
LAUNCHER(mask_without_itself, 1, kThreads, 0)
LAUNCHER(shuffle_from_outside_of_the_mask, 1, kThreads, 0)
LAUNCHER(mma_in_a_branch, 1, kThreads, 0)
LAUNCHER(swapped_fragment_index, 1, 32, 0)
LAUNCHER(off_by_one_border, 1, kThreads, 0)
LAUNCHER(before_the_beginning, 1, kThreads, 0)
LAUNCHER(past_the_end_of_shared_memory, 1, kThreads, kThreads * sizeof(float))
LAUNCHER(past_the_end_of_a_local_array, 1, kThreads, 0)
LAUNCHER(pointer_to_nowhere, 1, kThreads, 0)
LAUNCHER(misaligned_vector, 1, kThreads, 0)
LAUNCHER(misaligned_vector_in_shared_memory, 1, kThreads, kElements * sizeof(float))
LAUNCHER(shared_memory_never_written, 1, kThreads, kElements * sizeof(float))
LAUNCHER(static_shared_memory_never_written, 1, kThreads, 0)
LAUNCHER(global_memory_never_written, 1, kThreads, 0)
LAUNCHER(write_through_const, 1, kThreads, 0)
LAUNCHER(output_left_out, 1, kThreads, 0)
LAUNCHER(overflow_of_an_index, 1, kThreads, 0)
LAUNCHER(no_wait_group, 1, kThreads, kElements * sizeof(float))
LAUNCHER(no_commit, 1, kThreads, kElements * sizeof(float))
LAUNCHER(wait_group_for_one_too_few, 1, kThreads, kElements * sizeof(float))
LAUNCHER(no_barrier_after_wait_group, 1, kThreads, kElements * sizeof(float))
LAUNCHER(no_barrier_before_cp_async, 1, kThreads, kElements * sizeof(float))
LAUNCHER(write_under_cp_async, 1, kThreads, kElements * sizeof(float))
LAUNCHER(misaligned_cp_async, 1, kThreads, kElements * sizeof(float))
LAUNCHER(cp_async_past_the_end, 1, kThreads, kElements * sizeof(float))
LAUNCHER(end_with_cp_async_in_flight, 1, kThreads, kElements * sizeof(float))
LAUNCHER(misaligned_ldmatrix, 1, kThreads, kElements * sizeof(float))
LAUNCHER(operand_without_its_fence, 1, kGroup, kRowsBytes)
LAUNCHER(operand_fence_behind_the_barrier, 1, kGroup, kRowsBytes)
LAUNCHER(operand_fence_before_its_copies, 1, kGroup, kRowsBytes)
LAUNCHER(no_barrier_before_wgmma, 1, kGroup, kRowsBytes)
LAUNCHER(no_wgmma_fence, 1, kGroup, kRowsBytes)
LAUNCHER(fragment_loaded_behind_the_fence, 1, kGroup, kRowsBytes)
LAUNCHER(fragment_made_behind_the_fence, 1, kGroup, kRowsBytes)
LAUNCHER(sums_made_behind_the_fence, 1, kGroup, kRowsBytes)
LAUNCHER(sums_read_before_the_wait, 1, kGroup, kRowsBytes)
LAUNCHER(sums_written_in_flight, 1, kGroup, kRowsBytes)
LAUNCHER(sums_written_between_two_products, 1, kGroup, kRowsBytes)
LAUNCHER(fragment_written_in_flight, 1, kGroup, kRowsBytes)
LAUNCHER(operand_written_in_flight, 1, kGroup, kRowsBytes)
LAUNCHER(copy_into_an_operand_in_flight, 1, kGroup, kRowsBytes)
LAUNCHER(operand_written_behind_its_own_wait, 1, kGroup, kRowsBytes)
LAUNCHER(wgmma_wait_for_one_too_few, 1, kGroup, kRowsBytes)
LAUNCHER(wgmma_without_a_commit, 1, kGroup, kRowsBytes)
LAUNCHER(end_with_wgmma_in_flight, 1, kGroup, kRowsBytes)
LAUNCHER(warp_without_its_wgmma, 1, kGroup, kRowsBytes)
LAUNCHER(warpgroup_without_its_last_warp, 1, kGroup - 32, kRowsBytes)
LAUNCHER(wgmma_in_a_branch, 1, kGroup, kRowsBytes)
LAUNCHER(warps_with_different_descriptors, 1, kGroup, kRowsBytes)
LAUNCHER(lanes_with_different_descriptors, 1, kGroup, kRowsBytes)
LAUNCHER(rows_amid_a_swizzle, 1, kGroup, kRowsBytes + 512)
LAUNCHER(rows_past_the_end_of_shared_memory, 1, kGroup, kRowsBytes)
LAUNCHER(blocks_write_one_place, 4, kThreads, 0)
LAUNCHER(block_reads_what_another_wrote, 4, kThreads, 0)

}  // namespace maskcore
