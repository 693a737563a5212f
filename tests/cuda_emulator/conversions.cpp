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

uint32_t pack_relu_bf16(float lo, float hi) {
  const auto relu = [](float x) { return x <= 0.0f ? 0.0f : x; };
  return pack_bf16(relu(lo), relu(hi));
}

uint32_t max_nan_bf16(uint32_t a, uint32_t b) {
  const auto larger = [](uint32_t a_bits, uint32_t b_bits) -> uint32_t {
    const auto x = std::bit_cast<float>(a_bits << 16), y = std::bit_cast<float>(b_bits << 16);
    if (std::isnan(x) || std::isnan(y)) return 0x7fff;
    if (x == y) return std::signbit(x) ? b_bits : a_bits;  // +0 is above -0
    return x > y ? a_bits : b_bits;
  };
  return larger(a & 0xffff, b & 0xffff) | larger(a >> 16, b >> 16) << 16;
}

}  // namespace maskcore
