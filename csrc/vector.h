// The vector type of the instruction set being compiled: GCC and Clang vector extensions, so that
// one source serves AVX-512, AVX2, SSE2 and NEON. setup.py compiles every *_cpu.cpp once for each
// instruction set; only this file knows which one it is.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define MASKCORE_INLINE __attribute__((always_inline))

namespace maskcore {

// Register tile of the matrix products: kTileRows x (kTileVectors vectors) accumulators, kTileVectors
// vectors of the right operand and one broadcast of the left must fit the register file:
//   AVX-512  12 * 2 + 2 + 1 = 27 of 32;   AVX2, SSE2, NEON  6 * 2 + 2 + 1 = 15 of 16.
#if defined(MASKCORE_VECTOR_BYTES)  // tests run the wide tile on narrower processors
inline constexpr int kVectorBytes = MASKCORE_VECTOR_BYTES;
#elif defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(float));
inline constexpr int kTileVectors = 2;
inline constexpr int kTileColumns = kTileVectors * kLanes;
inline constexpr int kTileRows = kVectorBytes == 64 ? 12 : 6;

// Unaligned and aliasing, so that *(Vec*)pointer is a plain vector load or store.
typedef float Vec __attribute__((vector_size(kVectorBytes), aligned(alignof(float)), may_alias));
typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));  // of a comparison: lanes 0 or -1
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec broadcast(float x) { return x - Vec{}; }

/// The first `lanes` lanes, the rest zero; nothing past them is touched. Any `lanes` is allowed.
inline Vec load(const float* p, int64_t lanes) {
  if (lanes >= kLanes) return load(p);
  Vec v{};
  if (lanes > 0) std::memcpy(&v, p, static_cast<size_t>(lanes) * sizeof(float));
  return v;
}
inline void store(float* p, Vec v, int64_t lanes) {
  if (lanes >= kLanes) {
    store(p, v);
  } else if (lanes > 0) {
    std::memcpy(p, &v, static_cast<size_t>(lanes) * sizeof(float));
  }
}

/// Tensors of so many floats are streamed: 8 MiB, more than a core's share of the last cache as a rule.
inline constexpr int64_t kStreamedFloats = 2 * 1024 * 1024;
/// Whether the vectors of a tensor [..,channels] of so many floats are better written past the caches: it is
/// too large to stay in them, and every vector is whole and aligned.
inline bool streams(const float* x, int64_t channels, int64_t floats) {
  return floats >= kStreamedFloats && channels % kLanes == 0 &&
         reinterpret_cast<uintptr_t>(x) % kVectorBytes == 0;
}
/// Past the caches, for what is read again only when it would have left them: the line is not fetched first.
/// stream_fence() before another thread reads it.
inline void stream(float* p, Vec v) {
#if defined(__AVX512F__) && !defined(MASKCORE_VECTOR_BYTES)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__) && !defined(MASKCORE_VECTOR_BYTES)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

/// max(v, 0); NaN stays NaN, as torch.relu has it.
inline Vec relu(Vec v) { return v <= 0.0f ? Vec{} : v; }

// GCC 12 takes a __builtin_convertvector of bytes apart, lane by lane: the instructions are called by name
// (with a mask of all lanes, because its headers warn of themselves without one).
inline Mask load_bytes(const uint8_t* p, int64_t lanes) {
  Bytes bytes{};
  std::memcpy(&bytes, p, static_cast<size_t>(lanes < kLanes ? lanes : kLanes));
#if defined(__AVX512F__) && !defined(MASKCORE_VECTOR_BYTES)
  return (Mask)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)bytes);
#elif defined(__AVX2__) && !defined(MASKCORE_VECTOR_BYTES)
  return (Mask)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes));
#else
  return __builtin_convertvector(bytes, Mask);
#endif
}
inline void store_bytes(uint8_t* p, Mask v, int64_t lanes) {
#if defined(__AVX512F__) && !defined(MASKCORE_VECTOR_BYTES)
  const Bytes bytes = (Bytes)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v);
#elif defined(__AVX2__) && !defined(MASKCORE_VECTOR_BYTES)
  const __m128i low = _mm256_castsi256_si128((__m256i)v), high = _mm256_extracti128_si256((__m256i)v, 1);
  const __m128i halves = _mm_packs_epi32(low, high);
  const Bytes bytes = (Bytes)_mm_cvtsi128_si64(_mm_packus_epi16(halves, halves));
#else
  const Bytes bytes = __builtin_convertvector(v, Bytes);
#endif
  std::memcpy(p, &bytes, static_cast<size_t>(lanes < kLanes ? lanes : kLanes));
}

/// f(i, lanes) for i = 0, kLanes, 2 kLanes .. below n; lanes is the constant kLanes but in the tail.
template <class F>
inline void for_each_vector(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, std::integral_constant<int64_t, kLanes>());
  if (i < n) f(i, n - i);
}

}  // namespace maskcore
