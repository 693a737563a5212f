// Conversions as the tensor cores' instructions do them.
#include <bit>
#include <cmath>

#include "cuda_emulator.h"

namespace {

uint32_t to_bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

}  // namespace

namespace maskcore {

// Adding half a unit of the last kept bit to the magnitude rounds to nearest, ties away from zero.
uint32_t to_tf32(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return 0x7fffe000;
  return std::isinf(x) ? bits : (bits + 0x1000) & ~0x1fffu;
}

uint32_t pack_bf16(float lo, float hi) { return to_bf16(lo) | to_bf16(hi) << 16; }

}  // namespace maskcore
