// What a GPU gives at most: reads through L2 and from memory, mma.sync, and on sm_90 wgmma. Each figure is
// the median of seven launches.
//
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -I csrc benchmarks/cuda_ceilings.cu -o ceilings
//   ./ceilings
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>

#include "launch.cuh"
#include "tensor_core.cuh"

namespace maskcore {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kProducts = 16;  // of a turn of mma.sync's loop, independent ones
constexpr int kGroup = 8;      // wgmmas between two waits
constexpr int kSlot = 8192, kSlots = 8;

/// Bits of a bfloat16 pair, or of a float, near 1: products of zeros take less power, and so go faster.
__device__ uint32_t operand(uint32_t number) { return ((number * 2654435761u) & 0xbf80bfffu) | 0x3c003c00u; }

/// The same `count` vectors `rounds` times, each time by all threads together.
__global__ void read_kernel(const uint4* from, int64_t count, int rounds, uint32_t* never) {
  uint32_t bits = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int round = 0; round < rounds; ++round) {
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += 4 * step) {
      uint4 v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = i + j * step < count ? __ldcg(from + i + j * step) : uint4{};
#pragma unroll
      for (int j = 0; j < 4; ++j) bits ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
  }
  if (bits == 12345) *never = bits;
}

/// The same bytes `rounds` times by every block, as a filter is read.
__global__ void read_same_kernel(const unsigned char* from, int bytes, int rounds, uint32_t* never) {
  unsigned char* const shared = dynamic_shared<unsigned char>();
  int slot = 0;
  for (int round = 0; round < rounds; ++round) {
    for (int begin = 0; begin < bytes; begin += kSlot) {
#pragma unroll
      for (int i = 0; i < kSlot; i += 16 * kThreads) {
        const int at = i + static_cast<int>(threadIdx.x) * 16;
        cp_async_16(shared + slot * kSlot + at, from + begin + at);
      }
      cp_async_commit();
      cp_async_wait<kSlots - 2>();
      slot = (slot + 1) % kSlots;
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  if (shared[threadIdx.x * 7] == 255) *never = 1;
}

template <bool kTf32>
__global__ void __launch_bounds__(kThreads, 2) mma_kernel(int rounds, float* never) {
  float d[kProducts][4] = {};
  uint32_t a[4], b[2];
  for (uint32_t i = 0; i < 4; ++i) a[i] = operand(threadIdx.x + 1000 * i);
  for (uint32_t i = 0; i < 2; ++i) b[i] = operand(threadIdx.x + 1000 * i + 500);
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      if constexpr (kTf32) {
        mma_tf32(d[i], a, b);
      } else {
        mma_bf16(d[i], a, b);
      }
    }
  }
  float sum = 0.0f;
  for (const auto& four : d) sum += four[0] + four[1] + four[2] + four[3];
  if (sum == 1.25f) *never = sum;
}

/// Two warpgroups of 64 rows by 8 NT columns.
template <bool kTf32, int NT>
__global__ void __launch_bounds__(kThreads, NT == 16 ? 1 : 2) wgmma_kernel(int rounds, float* never) {
  unsigned char* const shared = dynamic_shared<unsigned char>();
  constexpr int kOperandBytes = NT * 512;  // of two wgmmas, which are 32 bytes of each row
  for (int i = static_cast<int>(threadIdx.x); i < kGroup / 2 * kOperandBytes / 4; i += kThreads) {
    reinterpret_cast<uint32_t*>(shared)[i] = operand(i);
  }
  wgmma_operand_fence();
  __syncthreads();
  float d[NT][4] = {};
  uint32_t a[4];
  for (uint32_t i = 0; i < 4; ++i) a[i] = operand(threadIdx.x + 1000 * i);
  const uint64_t b = wgmma_rows_of_64(shared);
  for (int round = 0; round < rounds; ++round) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const uint64_t of_i = b + ((i / 2 * kOperandBytes + i % 2 * 32) >> 4);
      if constexpr (kTf32) {
        wgmma_tf32(d, a, of_i);
      } else {
        wgmma_bf16(d, a, of_i);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
  }
  wgmma_wait_for(d);
  float sum = 0.0f;
  for (const auto& four : d) sum += four[0] + four[1] + four[2] + four[3];
  if (sum == 1.25f) *never = sum;
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "cuda_ceilings: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

/// Seconds of a launch.
template <class... Parameters>
double seconds(void (*kernel)(Parameters...), int blocks, size_t shared_bytes,
               std::type_identity_t<Parameters>... parameters) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::array<float, 7> times{};
  for (float& time : times) {
    check(cudaEventRecord(begin));
    check(launch(kernel, dim3(blocks), dim3(kThreads), shared_bytes, nullptr, parameters...));
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    check(cudaEventElapsedTime(&time, begin, end));
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] * 1e-3;
}

template <bool kTf32, int NT>
void measure_wgmma(int multiprocessors, float* never) {
  constexpr int kRounds = 20000, kBlocks = NT == 16 ? 1 : 2, kDepth = kTf32 ? 8 : 16;
  const double time =
      seconds(&wgmma_kernel<kTf32, NT>, multiprocessors * kBlocks, kGroup / 2 * NT * 512, kRounds, never);
  const double products = 2.0 * kRounds * kGroup * 64 * 8 * NT * kDepth * multiprocessors * kBlocks;
  std::printf("wgmma, A in registers, %3d columns, %s: %.0f TFLOP/s\n", 8 * NT, kTf32 ? "TF32" : "bf16",
              2.0 * products / time / 1e12);
}

template <bool kTf32>
void measure_mma(int multiprocessors, float* never) {
  constexpr int kRounds = 20000, kBlocks = 2, kDepth = kTf32 ? 8 : 16;
  const double time = seconds(&mma_kernel<kTf32>, multiprocessors * kBlocks, 0, kRounds, never);
  const double products = 1.0 * kRounds * kProducts * kWarps * 16 * 8 * kDepth * multiprocessors * kBlocks;
  std::printf("mma.sync, %s: %.0f TFLOP/s\n", kTf32 ? "TF32" : "bf16", 2.0 * products / time / 1e12);
}

void measure() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  const int multiprocessors = device.multiProcessorCount;
  std::printf("%s, %d multiprocessors, %d MB of L2\n", device.name, multiprocessors,
              device.l2CacheSize >> 20);
  constexpr int64_t kMega = 1 << 20, kMemory = 2048 * kMega;
  unsigned char* memory;
  float* never;
  check(cudaMalloc(&memory, kMemory));
  check(cudaMemset(memory, 1, kMemory));
  check(cudaMalloc(&never, sizeof(float)));
  auto* const bits = reinterpret_cast<uint32_t*>(never);
  for (const int64_t bytes : {8 * kMega, 16 * kMega, 24 * kMega, 40 * kMega, kMemory}) {
    const int rounds = static_cast<int>(kMemory / bytes);
    const double time = seconds(&read_kernel, multiprocessors * 8, 0, reinterpret_cast<const uint4*>(memory),
                                bytes / 16, rounds, bits);
    std::printf("%4d MB again and again: %.2f TB/s\n", static_cast<int>(bytes / kMega),
                static_cast<double>(bytes) * rounds / time / 1e12);
  }
  for (const int bytes : {64 << 10, 288 << 10, 576 << 10, 1152 << 10}) {
    const int rounds = (64 << 20) / bytes, blocks = multiprocessors * 3;
    const double time = seconds(&read_same_kernel, blocks, kSlots * kSlot, memory, bytes, rounds, bits);
    std::printf("the same %4d KB by all blocks: %.2f TB/s\n", bytes >> 10,
                static_cast<double>(bytes) * rounds * blocks / time / 1e12);
  }
  measure_mma<false>(multiprocessors, never);
  measure_mma<true>(multiprocessors, never);
  if (device.major != 9) return;
  measure_wgmma<false, 16>(multiprocessors, never);
  measure_wgmma<true, 16>(multiprocessors, never);
  measure_wgmma<false, 8>(multiprocessors, never);
  measure_wgmma<true, 8>(multiprocessors, never);
}

}  // namespace
}  // namespace maskcore

int main() { maskcore::measure(); }
