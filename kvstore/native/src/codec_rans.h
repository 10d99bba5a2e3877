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
inline constexpr uint32_t kStateBits = 15;
inline constexpr uint32_t kStateMin = 1 << kStateBits;
inline constexpr size_t kTables = 16;
inline constexpr int kSymbolMax = 127;  // symbols are from -127 to 127, stored with 128 added

// Symbols of a larger magnitude are not in a table: 5 sigma + 3.
inline constexpr std::array<uint16_t, kTables> kMagnitudes{
    5, 5, 6, 7, 9, 12, 15, 20, 28, 39, 55, 78, 111, 127, 127, 127,
};
// 32 * 1.45 * sigma^2, half-way (in the logarithm) to the next table: rows of a larger sum of
// squares take that.
inline constexpr std::array<uint32_t, kTables> kSquares{
    3, 6, 13, 27, 57, 119, 251, 527, 1107, 2328, 4895, 10292, 21639, 45495, 95654, 201112,
};

struct RansTables {
  // Of slot: symbol | frequency << 8 | offset in the symbol's slots << 19.
  std::array<uint32_t, kTables * kSlots> decode;
  // Of symbol: reciprocal | (frequency | addend << 11 | shift << 23) << 32; x / frequency is
  // (x * reciprocal >> 32) >> shift for x < 2^31.
  std::array<uint64_t, kTables * 256> encode;
};
const RansTables& rans_tables();

// Codes `num_rows` rows of 32 symbols, the last row first, with a table for each row. Words are
// written backwards from `words`, which then is the first of them: at most one a symbol.
// kWordsAhead words before that must be writable.
inline constexpr size_t kWordsAhead = 32;
void rans_encode(const uint8_t* symbols, const uint8_t* tables, size_t num_rows, uint32_t* states,
                 uint16_t*& words);
// The reverse, from the first row on. False: the words end too early. kWordsAhead words after the
// end must be readable.
bool rans_decode(uint8_t* symbols, const uint8_t* tables, size_t num_rows, uint32_t* states,
                 const uint16_t*& words, const uint16_t* words_end);

}  // namespace kvasir
