// CUDA on the host, for proving kernels where there is no GPU: the part of CUDA C++ that csrc/*.cu use, and
// the functions of csrc/launch.cuh and csrc/tensor_core.cuh, so that the kernels' own sources compile
// unchanged with g++ -DMASKCORE_CUDA_EMULATION. Run by tests/cuda_emulator/__init__.py.
//
// How. g++ -fsanitize=thread puts a call before every memory access of the kernel; the calls go to memory.cpp
// instead of a sanitizer's runtime. Every thread of a block is a fiber on one host thread; machine.cpp
// switches between them at barriers and warp instructions, in one of four orders (forward, reverse, random by
// seed, or one warp after the other), and runs one block after the other, in the same order. warp.cpp has the
// warp instructions and warpgroup.cpp wgmma, with the fragment layouts of the PTX ISA; traffic.cpp counts
// bank conflicts and sectors.
//
// What is detected, each with a sentence that names kernel, block, thread, address and source line:
//  - an access outside of the tensors given to the kernel, of the block's shared memory, or of a local array;
//  - an access that is not aligned to its size; 16 bytes for cp.async's and ldmatrix's rows;
//  - a read of shared or global memory that nothing has written, a write through a pointer to const;
//  - an access to bytes that a cp.async in flight owns. They arrive at the cp.async.wait_group that waits for
//    them and not before, so that a missing wait also gives wrong results; one never waited for is a fault;
//  - a race: two threads of a block access a byte, one of them writes, and neither a barrier nor, within a
//    warp, a __syncwarp lies between. Shuffles, votes and mma order no memory here, as CUDA promises none;
//  - a race of two blocks: no block may read or write in global memory what another one writes in a launch;
//  - a wgmma whose operand was written without a fence.proxy.async that a barrier follows, whose registers
//    were without a wgmma.fence, or whose sums, fragments or operand are written before a wgmma.wait_group
//    has ended it; its sums are NaN until then. Registers count as written where their values have changed;
//  - warps of a warpgroup that issue different wgmmas, or fewer than four; lanes' different descriptors;
//  - divergence: threads that end, or wait elsewhere, while others wait at a barrier or warp instruction;
//    different masks; a shuffle from a lane that takes no part;
//  - integer overflow, shifts by too much, division by zero.
//
// What is not. Time, registers and caches are nvcc's and the GPU's business. Nothing is seen of a compiler's
// mistakes in device code, nor of memory order weaker than "ordered or a race": fences and flags between
// blocks are refused as races. Local arrays may be read before they are written; static shared arrays of one
// source file are one piece of memory, within which only an index beyond its own array is found. The tensor
// core's sums are rounded once an instruction, from exact products; a GPU's last bits differ. Blocks may use
// partial masks in shuffles and votes, but not in __syncwarp. Not there: clusters, TMA, operands of wgmma
// other than a 64-byte swizzle's rows and unswizzled columns, textures, streams that overlap.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
// One block runs at a time, so that a static array is its shared memory; the section tells where.
#define __shared__ static __attribute__((section("cuda_shared")))

// Vectors. ----------------------------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(2) uchar2 {
  unsigned char x, y;
};
struct alignas(4) uchar4 {
  unsigned char x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uchar2 make_uchar2(unsigned char x, unsigned char y) { return {x, y}; }
inline uchar4 make_uchar4(unsigned char x, unsigned char y, unsigned char z, unsigned char w) {
  return {x, y, z, w};
}
inline double2 make_double2(double x, double y) { return {x, y}; }

// The runtime's functions that launchers call. ----------------------------------------------------

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* global, int value, size_t bytes, cudaStream_t stream);

// What the emulator offers the functions below. ---------------------------------------------------

namespace cuda_emulator {

// Where in the source a thread waits: threads that meet must have come to the same place.
struct Place {
  const char* file;
  int line;
};

// The same from a thread's first instruction to its last, so that the compiler may keep them.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_size();
[[gnu::const]] dim3 grid_size();
[[gnu::const]] void* dynamic_shared_memory();

struct Launch {
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  char *static_shared, *static_shared_end;
  void (*body)(const void* call);
  const void* call;  // the kernel's parameters, which its threads read
  size_t call_bytes;
};
cudaError_t run(const Launch& launch);

extern "C" {
[[gnu::weak, gnu::visibility("hidden")]] extern char __start_cuda_shared[];
[[gnu::weak, gnu::visibility("hidden")]] extern char __stop_cuda_shared[];
}

void block_barrier(Place place);
void warp_barrier(uint32_t mask, Place place);

enum class Shuffle { kIndex, kUp, kDown, kXor };
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, unsigned operand, int width, Place place);
uint32_t ballot(const char* name, uint32_t mask, bool vote, Place place);

void atomic_access(const void* address, size_t bytes);

void copy_async(void* shared, const void* global, size_t bytes, bool valid);
void prefetch(const void* global);
void commit_async();
void wait_async(int pending);

void load_matrices(uint32_t* r, int matrices, bool transposed, const void* shared_row, Place place);
void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place);
void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place);

uint32_t shared_window(const void* shared);  // its address there
void fence_operands();
void fence_warpgroup(Place place);
void multiply_warpgroup(const char* instruction, float* d, int columns, const uint32_t (&a)[4],
                        uint64_t descriptor, Place place);
void commit_warpgroup(Place place);
void wait_warpgroup(int pending, Place place);

template <class T>
T shuffled(Shuffle kind, uint32_t mask, T value, unsigned operand, int width, Place place) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, operand, width, place);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// A result that no other operation is fused with: g++ does not see where it comes from.
template <class T>
T rounded(T result) {
  __asm__("" : "+m"(result));
  return result;
}

}  // namespace cuda_emulator

#define threadIdx (::cuda_emulator::thread_index())
#define blockIdx (::cuda_emulator::block_index())
#define blockDim (::cuda_emulator::block_size())
#define gridDim (::cuda_emulator::grid_size())
inline constexpr int warpSize = 32;

// Built-in functions. A call's line and file are its place. ---------------------------------------

#define CALLED_HERE int line = __builtin_LINE(), const char *file = __builtin_FILE()
#define HERE \
  ::cuda_emulator::Place { file, line }

inline void __syncthreads(CALLED_HERE) { cuda_emulator::block_barrier(HERE); }
inline void __syncwarp(unsigned mask = 0xffffffffu, CALLED_HERE) { cuda_emulator::warp_barrier(mask, HERE); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, CALLED_HERE) {
  return cuda_emulator::shuffled(cuda_emulator::Shuffle::kIndex, mask, value, lane, width, HERE);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CALLED_HERE) {
  return cuda_emulator::shuffled(cuda_emulator::Shuffle::kUp, mask, value, delta, width, HERE);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CALLED_HERE) {
  return cuda_emulator::shuffled(cuda_emulator::Shuffle::kDown, mask, value, delta, width, HERE);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CALLED_HERE) {
  return cuda_emulator::shuffled(cuda_emulator::Shuffle::kXor, mask, value, lane_mask, width, HERE);
}
inline unsigned __ballot_sync(unsigned mask, int vote, CALLED_HERE) {
  return cuda_emulator::ballot("__ballot_sync", mask, vote != 0, HERE);
}
inline int __any_sync(unsigned mask, int vote, CALLED_HERE) {
  return cuda_emulator::ballot("__any_sync", mask, vote != 0, HERE) != 0;
}
inline int __all_sync(unsigned mask, int vote, CALLED_HERE) {
  return cuda_emulator::ballot("__all_sync", mask, vote != 0, HERE) == mask;
}

// Not instrumented: what it accesses, it reports as atomic.
template <class T>
[[gnu::no_sanitize_thread]] T atomicAdd(T* address, std::type_identity_t<T> value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  cuda_emulator::atomic_access(address, sizeof(T));
  const T before = *address;
  *address = before + value;
  return before;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

inline unsigned __float_as_uint(float x) { return cuda_emulator::same_bits<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_emulator::same_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_emulator::same_bits<float>(x); }
inline float __int_as_float(int x) { return cuda_emulator::same_bits<float>(x); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return cuda_emulator::rounded(a + b); }
inline float __fsub_rn(float a, float b) { return cuda_emulator::rounded(a - b); }
inline float __fmul_rn(float a, float b) { return cuda_emulator::rounded(a * b); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dadd_rn(double a, double b) { return cuda_emulator::rounded(a + b); }
inline double __dsub_rn(double a, double b) { return cuda_emulator::rounded(a - b); }
inline double __dmul_rn(double a, double b) { return cuda_emulator::rounded(a * b); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned chosen = 0;
  for (int i = 0; i < 4; ++i) {
    chosen |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return chosen;
}
using std::max;
using std::min;

// csrc/launch.cuh ---------------------------------------------------------------------------------

namespace maskcore {

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(cuda_emulator::dynamic_shared_memory());
}

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   std::type_identity_t<Parameters>... parameters) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  const Call call{kernel, {parameters...}};
  const auto body = [](const void* made) {
    const Call& call = *static_cast<const Call*>(made);
    std::apply(call.kernel, call.parameters);
  };
  return cuda_emulator::run({reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
                             cuda_emulator::__start_cuda_shared, cuda_emulator::__stop_cuda_shared, body,
                             &call, sizeof(call)});
}

// csrc/tensor_core.cuh ----------------------------------------------------------------------------

inline void cp_async_16(void* shared, const void* global, bool valid = true) {
  cuda_emulator::copy_async(shared, global, 16, valid);
}
inline void cp_async_8(void* shared, const void* global, bool valid = true) {
  cuda_emulator::copy_async(shared, global, 8, valid);
}
inline void cp_async_4(void* shared, const void* global, bool valid = true) {
  cuda_emulator::copy_async(shared, global, 4, valid);
}
inline void prefetch_l2(const void* global) { cuda_emulator::prefetch(global); }
inline void cp_async_commit() { cuda_emulator::commit_async(); }
template <int kPending>
void cp_async_wait() {
  cuda_emulator::wait_async(kPending);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, CALLED_HERE) {
  cuda_emulator::load_matrices(r, 4, false, shared_row, HERE);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row, CALLED_HERE) {
  cuda_emulator::load_matrices(r, 4, true, shared_row, HERE);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row, CALLED_HERE) {
  cuda_emulator::load_matrices(r, 2, false, shared_row, HERE);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row, CALLED_HERE) {
  cuda_emulator::load_matrices(r, 2, true, shared_row, HERE);
}
inline void ldmatrix_x1(uint32_t (&r)[1], const void* shared_row, CALLED_HERE) {
  cuda_emulator::load_matrices(r, 1, false, shared_row, HERE);
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CALLED_HERE) {
  cuda_emulator::multiply_tf32(d, a, b, HERE);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CALLED_HERE) {
  cuda_emulator::multiply_bf16(d, a, b, HERE);
}

inline uint32_t shared_address(const void* shared) { return cuda_emulator::shared_window(shared); }
inline void wgmma_operand_fence() { cuda_emulator::fence_operands(); }
inline void wgmma_fence(CALLED_HERE) { cuda_emulator::fence_warpgroup(HERE); }
inline void wgmma_commit(CALLED_HERE) { cuda_emulator::commit_warpgroup(HERE); }
template <int kPending>
void wgmma_wait(CALLED_HERE) {
  cuda_emulator::wait_warpgroup(kPending, HERE);
}
template <int NT>
void wgmma_bf16(float (&d)[NT][4], const uint32_t (&a)[4], uint64_t b, CALLED_HERE) {
  cuda_emulator::multiply_warpgroup("wgmma.k16.bf16", d[0], 8 * NT, a, b, HERE);
}
template <int NT>
void wgmma_bf16_trans(float (&d)[NT][4], const uint32_t (&a)[4], uint64_t b, CALLED_HERE) {
  cuda_emulator::multiply_warpgroup("wgmma.k16.bf16.trans", d[0], 8 * NT, a, b, HERE);
}
template <int NT>
void wgmma_tf32(float (&d)[NT][4], const uint32_t (&a)[4], uint64_t b, CALLED_HERE) {
  cuda_emulator::multiply_warpgroup("wgmma.k8.tf32", d[0], 8 * NT, a, b, HERE);
}

uint32_t to_tf32(float x);
uint32_t pack_bf16(float lo, float hi);
uint32_t pack_relu_bf16(float lo, float hi);
uint32_t max_nan_bf16(uint32_t a, uint32_t b);

template <int kLow, int kHigh>
uint32_t sign_masks(uint32_t x) {
  const auto sign = [x](int byte) { return (x >> (8 * byte + 7) & 1u) != 0; };
  return (sign(kLow) ? 0x0000ffffu : 0u) | (sign(kHigh) ? 0xffff0000u : 0u);
}

}  // namespace maskcore

#undef CALLED_HERE
#undef HERE
