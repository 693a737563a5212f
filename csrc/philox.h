// Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): ten rounds of two 64 x
// 64 bit products make four random words of a counter and a key. The stream is that of numpy.random.Philox,
// hence of maskcore/philox.py, whose first words come from the counter 1.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MASKCORE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MASKCORE_HOST_DEVICE inline
#endif

namespace maskcore {

struct PhiloxWords {
  uint64_t v[4];
};

MASKCORE_HOST_DEVICE PhiloxWords philox(PhiloxWords counter, uint64_t key0, uint64_t key1) {
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const unsigned __int128 product0 = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * counter.v[0];
    const unsigned __int128 product1 = static_cast<unsigned __int128>(0xCA5A826395121157u) * counter.v[2];
    counter = {{static_cast<uint64_t>(product1 >> 64) ^ counter.v[1] ^ key0, static_cast<uint64_t>(product1),
                static_cast<uint64_t>(product0 >> 64) ^ counter.v[3] ^ key1,
                static_cast<uint64_t>(product0)}};
    key0 += 0x9E3779B97F4A7C15u;  // the golden ratio
    key1 += 0xBB67AE8584CAA73Bu;  // sqrt(3) - 1
  }
  return counter;
}

/// Which of the elements 8 i .. 8 i + 7 dropout keeps: two decisions a word, the low half first.
struct DropoutMask {
  static constexpr uint64_t kPurpose = 4;  // DROPOUT of maskcore/philox.py
  static constexpr int kElements = 8;
  PhiloxWords words;

  static MASKCORE_HOST_DEVICE DropoutMask of(int64_t seed, int64_t i) {
    return {philox({{static_cast<uint64_t>(i) + 1, 0, 0, 0}}, static_cast<uint64_t>(seed), kPurpose)};
  }
  /// threshold = p 2^32, rounded: a half below it is dropped.
  MASKCORE_HOST_DEVICE bool keeps(int element, uint64_t threshold) const {
    return (words.v[element / 2] >> (element % 2 * 32) & 0xffffffffu) >= threshold;
  }
};

}  // namespace maskcore
