// What a path of the CPU does for the codecs: one section, or one row, at a time.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace kvasir {

// Of the magnitude of a value that may be encoded, as bfloat16: 2^100.
inline constexpr uint16_t kMagnitudeMax = 0x7180;
inline constexpr uint16_t kSmallestStep = 0x0080;   // smaller ones are denormal: taken as 0
inline constexpr float kRoundSigned = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
inline constexpr float kRoundUnsigned = 8388608.0F;

inline float widen(uint16_t value) { return std::bit_cast<float>(uint32_t{value} << 16); }
// To nearest; halves away from zero.
inline uint16_t narrow(float value) {
  return static_cast<uint16_t>((std::bit_cast<uint32_t>(value) + 0x8000) >> 16);
}
// The bfloat16 that is not below `range` / `levels` (0 if that is denormal).
inline uint16_t step_of(float range, float levels) {
  const uint32_t bits = (std::bit_cast<uint32_t>(range / levels) + 0xffff) >> 16;
  return bits < kSmallestStep ? 0 : static_cast<uint16_t>(bits);
}
inline float inverse_of(uint16_t step) {
  const float inverse = 1.0F / widen(step);
  return step == 0 ? 0.0F : inverse;
}

inline constexpr size_t kGroupsMax = 1024;  // of a section: channels of a head
inline constexpr size_t kLanes = 32;  // values of one group, one row of K, or a part of a row of V

// Rows of 32 symbols and what the decoder must know of each: level = (symbol - 128 + centre) <<
// shift.
struct SymbolRows {
  uint8_t* symbols;
  uint8_t* tables;  // of codec_rans.h
  uint8_t* shifts;  // as wanted, then as it had to be
  int16_t* centres;
};

struct CodecKernels {
  // A section of 32 * head_dim values; false: a value is out of bounds.
  bool (*int8_encode)(const uint16_t* source, size_t head_dim, bool is_key, uint8_t* target);
  bool (*int8_decode)(const uint8_t* source, size_t head_dim, bool is_key, uint16_t* target);
  bool (*int4_encode)(const uint16_t* source, size_t num_groups, uint8_t* target);
  bool (*int4_decode)(const uint8_t* source, size_t num_groups, uint16_t* target);
  // Largest magnitude of values, as bfloat16.
  uint16_t (*magnitude)(const uint16_t* source, size_t count);
  // To rounded integers, and back.
  void (*to_levels)(const uint16_t* source, size_t count, float inverse, int16_t* levels);
  void (*from_levels)(const int16_t* levels, size_t count, float step, uint16_t* target);
  void (*transpose)(const int16_t* source, size_t num_rows, size_t num_columns, int16_t* target);
  // Of rows of 32 levels, of magnitudes up to 2047: 1024 times the variance of each.
  void (*spreads)(const int16_t* levels, size_t num_rows, uint32_t* spreads);
  void (*to_symbols)(const int16_t* levels, size_t num_rows, const SymbolRows& rows);
  void (*from_symbols)(const SymbolRows& rows, size_t num_rows, int16_t* levels);
  // See codec_rans.h.
  void (*rans_encode)(const uint8_t* symbols, const uint8_t* tables, size_t num_rows,
                      uint32_t* states, uint16_t*& words);
  bool (*rans_decode)(uint8_t* symbols, const uint8_t* tables, size_t num_rows, uint32_t* states,
                      const uint16_t*& words, const uint16_t* words_end);
};

const CodecKernels& scalar_codec_kernels();
#ifdef KVASIR_X86
const CodecKernels& avx2_codec_kernels();
const CodecKernels& avx512_codec_kernels();
#endif

}  // namespace kvasir
