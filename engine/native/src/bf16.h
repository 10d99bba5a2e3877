// bfloat16 as its 16 bits: the upper half of a float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace kvasir {

// One definition per translation unit: each is compiled for another instruction set.
static inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Rounds to nearest, ties to even; NaN stays NaN.
static inline uint16_t bf16_from_float(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  const uint32_t rounded = (wide + 0x7FFFu + ((wide >> 16) & 1u)) >> 16;
  const bool is_nan = (wide & 0x7FFFFFFFu) > 0x7F800000u;
  return static_cast<uint16_t>(is_nan ? (wide >> 16) | 0x40u : rounded);
}

}  // namespace kvasir
