// adam_: one step of Adam (Kingma & Ba 2015) over all tensors of a parameter group, in place, in one launch.
//   g = gradient + 2 l2 p;   m = beta1 m + (1 - beta1) g;   v = beta2 v + (1 - beta2) g^2
//   p -= step_size m / (sqrt(v) + epsilon)
//   Keras:    step_size = lr sqrt(1 - beta2^t) / (1 - beta1^t),  epsilon = eps           ("epsilon hat")
//   PyTorch:  the same step_size,                                epsilon = eps sqrt(1 - beta2^t)
// The tensors' addresses are the kernel's parameters (multi-tensor apply of NVIDIA's Apex, but without its
// copy to the device), so that a captured graph keeps them. A block owns 4,096 elements of one tensor and
// finds them by bisection of the chunks' running count. A captured step cannot be given t:
// launch_adam_counted keeps it on the device, and one thread turns it into the two factors before the blocks
// start.
//
// Bound by memory: 4 floats read and 3 written a parameter, 28 bytes. No shared memory. A thread has two
// float4 of each of the four arrays in flight: 32 registers, and at most 64 with factors and addresses; 4
// blocks of 256 threads (4 * 256 * 64 = 65,536) are half of an SM's 2,048 threads, with 128 KB on their way.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda_launchers.h"
#include "launch.cuh"

namespace maskcore {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSM = 4;
constexpr int kChunk = kThreads * 16;

struct AdamFactors {
  float beta1, beta2, l2_gradient;  // l2_gradient = 2 l2
  // Rounded once from double: 1.0f - 0.999f is off by 1e-5 of itself, and v with it.
  float one_minus_beta1, one_minus_beta2;
  float step_size, epsilon;  // of a step that the host counts
};

/// As many as fit into the 4 KB of parameters that every driver takes, beside the factors and a pointer.
struct AdamTable {
  static constexpr int kTensors = 84;
  AdamTensor tensors[kTensors];
  int first_chunk[kTensors + 1];  // the last one is the number of chunks
  int count;
};
static_assert(sizeof(AdamTable) + sizeof(AdamFactors) + sizeof(float*) <= 4096);

__device__ __forceinline__ void update(float& p, float gradient, float& m, float& v, const AdamFactors& a,
                                       float step_size, float epsilon) {
  const float g = gradient + a.l2_gradient * p;
  m = a.beta1 * m + a.one_minus_beta1 * g;
  v = a.beta2 * v + a.one_minus_beta2 * g * g;
  p -= step_size * m / (sqrtf(v) + epsilon);
}

__device__ __forceinline__ void update(float4& p, const float4& g, float4& m, float4& v, const AdamFactors& a,
                                       float step_size, float epsilon) {
  update(p.x, g.x, m.x, v.x, a, step_size, epsilon);
  update(p.y, g.y, m.y, v.y, a, step_size, epsilon);
  update(p.z, g.z, m.z, v.z, a, step_size, epsilon);
  update(p.w, g.w, m.w, v.w, a, step_size, epsilon);
}

/// The tensor whose chunks the block's is one of.
__device__ __forceinline__ int tensor_of(const AdamTable& table, int chunk) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

/// on_device: step_size and epsilon of a step that the device counts, or null.
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    adam_kernel(const __grid_constant__ AdamTable table, const __grid_constant__ AdamFactors a,
                const float* __restrict__ on_device) {
  const int chunk = static_cast<int>(blockIdx.x), index = tensor_of(table, chunk);
  const AdamTensor& tensor = table.tensors[index];
  const int64_t begin = static_cast<int64_t>(chunk - table.first_chunk[index]) * kChunk;
  const int size = static_cast<int>(min(static_cast<int64_t>(kChunk), tensor.size - begin));
  float* __restrict__ p = tensor.p + begin;
  const float* __restrict__ g = tensor.g + begin;
  float* __restrict__ m = tensor.m + begin;
  float* __restrict__ v = tensor.v + begin;
  const float step_size = on_device != nullptr ? on_device[0] : a.step_size;
  const float epsilon = on_device != nullptr ? on_device[1] : a.epsilon;

  const auto address = [](const float* q) { return reinterpret_cast<uintptr_t>(q); };
  const bool aligned = ((address(p) | address(g) | address(m) | address(v)) & 15) == 0;
  const int fours = aligned ? size / 4 : 0;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < fours; i += kThreads) {
    float4 p4 = reinterpret_cast<float4*>(p)[i], m4 = reinterpret_cast<float4*>(m)[i];
    float4 v4 = reinterpret_cast<float4*>(v)[i];
    const float4 g4 = reinterpret_cast<const float4*>(g)[i];
    update(p4, g4, m4, v4, a, step_size, epsilon);
    reinterpret_cast<float4*>(p)[i] = p4;
    reinterpret_cast<float4*>(m)[i] = m4;
    reinterpret_cast<float4*>(v)[i] = v4;
  }
  for (int i = 4 * fours + static_cast<int>(threadIdx.x); i < size; i += kThreads) {
    update(p[i], g[i], m[i], v[i], a, step_size, epsilon);
  }
}

struct StepFactors {
  double step_size, epsilon;
};

__host__ __device__ inline StepFactors step_factors(const AdamSettings& settings, double step) {
  const double correction1 = 1.0 - pow(settings.beta1, step);
  const double correction2 = sqrt(1.0 - pow(settings.beta2, step));
  return {settings.lr * correction2 / correction1,
          settings.keras_epsilon ? settings.eps : settings.eps * correction2};
}

/// One thread: counts the step and leaves its factors for the kernel that follows.
__global__ void __launch_bounds__(1) adam_count_kernel(int64_t* step, AdamSettings settings, float* factors) {
  *step += 1;
  const StepFactors f = step_factors(settings, static_cast<double>(*step));
  factors[0] = static_cast<float>(f.step_size);
  factors[1] = static_cast<float>(f.epsilon);
}

cudaError_t launch_chunks(const AdamTensor* tensors, int64_t count, const AdamFactors& factors,
                          const float* on_device, cudaStream_t stream) {
  for (int64_t i = 0; i < count;) {
    AdamTable table{};
    int64_t chunks = 0;
    for (; i < count && table.count < AdamTable::kTensors; ++i) {
      if (tensors[i].size == 0) continue;
      const int64_t more = (tensors[i].size - 1) / kChunk + 1;
      if (more > std::numeric_limits<int>::max()) return cudaErrorInvalidValue;
      if (chunks + more > std::numeric_limits<int>::max()) break;
      table.tensors[table.count] = tensors[i];
      table.first_chunk[table.count++] = static_cast<int>(chunks);
      chunks += more;
    }
    if (table.count == 0) return cudaSuccess;
    table.first_chunk[table.count] = static_cast<int>(chunks);
    const cudaError_t error = launch(adam_kernel, dim3(static_cast<unsigned>(chunks)), dim3(kThreads), 0,
                                     stream, table, factors, on_device);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

AdamFactors constant_factors(const AdamSettings& settings) {
  return {.beta1 = static_cast<float>(settings.beta1),
          .beta2 = static_cast<float>(settings.beta2),
          .l2_gradient = static_cast<float>(2.0 * settings.l2),
          .one_minus_beta1 = static_cast<float>(1.0 - settings.beta1),
          .one_minus_beta2 = static_cast<float>(1.0 - settings.beta2),
          .step_size = 0.0f,
          .epsilon = 0.0f};
}

}  // namespace

cudaError_t launch_adam(const AdamTensor* tensors, int64_t count, const AdamSettings& settings, int64_t step,
                        cudaStream_t stream) {
  AdamFactors factors = constant_factors(settings);
  const StepFactors f = step_factors(settings, static_cast<double>(step));
  factors.step_size = static_cast<float>(f.step_size);
  factors.epsilon = static_cast<float>(f.epsilon);
  return launch_chunks(tensors, count, factors, nullptr, stream);
}

cudaError_t launch_adam_counted(const AdamTensor* tensors, int64_t count, const AdamSettings& settings,
                                int64_t* step, float* factors, cudaStream_t stream) {
  const cudaError_t error = launch(adam_count_kernel, dim3(1), dim3(1), 0, stream, step, settings, factors);
  if (error != cudaSuccess) return error;
  return launch_chunks(tensors, count, constant_factors(settings), factors, stream);
}

}  // namespace maskcore
