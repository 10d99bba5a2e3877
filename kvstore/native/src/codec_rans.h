// Interleaved range coding (rANS; J. Duda, arXiv:1311.2540) of small integers, 32 states side by
// side.
//
// A symbol is coded by one of 16 fixed distributions: discrete Gaussians whose width grows by 1.45.
// They are made in integers, so that every machine has the same. States lie in [2^15, 2^31) and
// spill words of 16 bits; the decoder reads the words in the order in which it needs them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "codec_kernels.h"

namespace kvasir {

inline constexpr uint32_t kProbabilityBits = 11;
inline constexpr uint32_t kSlots = 1 << kProbabilityBits;
inline constexpr uint32_t kStateMin = 1 << 15;
inline constexpr size_t kTables = 16;
inline constexpr int kSymbolMax = 127;  // symbols are from -127 to 127, stored with 128 added

struct RansTables {
  // Of slot: symbol | frequency << 8 | offset in the symbol's slots << 19.
  std::array<uint32_t, kTables * kSlots> decode;
  // Of symbol: frequency | addend << 11 | shift << 23, and the reciprocal: x / frequency is
  // (x * reciprocal >> 32) >> shift for x < 2^31.
  std::array<uint32_t, kTables * 256> encode;
  std::array<uint32_t, kTables * 256> reciprocal;
};
const RansTables& rans_tables();

// The narrowest table for 32 symbols of this sum of squares, none of a larger magnitude.
uint8_t table_for(uint32_t squares, int magnitude);

// Codes `num_rows` rows of 32 symbols, the last row first, with a table for each row. Words are
// written backwards from `words`, which then is the first of them: at most one a symbol.
void rans_encode(const uint8_t* symbols, const uint8_t* tables, size_t num_rows, uint32_t* states,
                 uint16_t*& words);
// The reverse, from the first row on. False: the words end too early. kWordsAhead words after the
// end must be readable.
inline constexpr size_t kWordsAhead = 32;
bool rans_decode(uint8_t* symbols, const uint8_t* tables, size_t num_rows, uint32_t* states,
                 const uint16_t*& words, const uint16_t* words_end);

}  // namespace kvasir
