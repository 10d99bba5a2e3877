// The entropy codec's part of the paths with vectors: levels and symbols in rows of 32.
#pragma once

#include "codec_rans.h"
#include "codec_vector.h"

namespace kvasir {

template <size_t kBytes>
struct RowCodec {
  using V = VectorCodec<kBytes>;
  using Words = typename V::Words;
  using SignedWords = typename V::SignedWords;
  using SignedDwords = typename V::SignedDwords;
  using Bytes [[gnu::vector_size(kBytes / 2)]] = uint8_t;  // as many as there are words

  static constexpr size_t kWords = V::kWords;
  static constexpr size_t kParts = V::kParts;

  static SignedWords load(const int16_t* at) { return (SignedWords)V::load(at); }

  static void to_levels(const uint16_t* source, size_t count, float inverse, int16_t* levels) {
    const auto factor = V::both(inverse);
    for (size_t i = 0; i < count; i += kWords) {
      V::template fetch<0>(source + i + count);
      V::store(levels + i, V::levels(V::load(source + i), factor));
    }
  }

  static void from_levels(const int16_t* levels, size_t count, float step, uint16_t* target) {
    const auto factor = V::both(step);
    for (size_t i = 0; i < count; i += kWords) {
      V::template fetch<1>(target + i + count);
      V::store(target + i, V::from_words(load(levels + i), factor));
    }
  }

  static int32_t total(SignedDwords dwords) {
    __m128i parts[kBytes / 16];
    std::memcpy(parts, &dwords, kBytes);
    for (size_t n = kBytes / 32; n > 0; n /= 2) {
      for (size_t i = 0; i < n; ++i) parts[i] = _mm_add_epi32(parts[i], parts[i + n]);
    }
    const __m128i two = _mm_add_epi32(parts[0], _mm_unpackhi_epi64(parts[0], parts[0]));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
  }

  static void spreads(const int16_t* levels, size_t num_rows, uint32_t* found) {
    for (size_t r = 0; r < num_rows; ++r, levels += kLanes) {
      SignedDwords sums{};
      SignedDwords squares{};
      for (size_t p = 0; p < kParts; ++p) {
        const SignedWords words = load(levels + p * kWords);
        sums += V::Types::madd(words, SignedWords{} + 1);
        squares += V::Types::madd(words, words);
      }
      const auto sum = static_cast<uint32_t>(total(sums));
      found[r] = static_cast<uint32_t>(kLanes) * static_cast<uint32_t>(total(squares)) - sum * sum;
    }
  }

  // 1. The symbols of 32 rows. 2. Their tables, side by side.
  static void to_symbols(const int16_t* levels, size_t num_rows, const SymbolRows& rows) {
    for (size_t first = 0; first < num_rows; first += kLanes) {
      int32_t squares[kLanes];
      int32_t magnitudes[kLanes];
      for (size_t i = 0; i < kLanes; ++i) {
        const size_t row = first + i;
        const int16_t* const at = levels + row * kLanes;
        while (!row_to_symbols(at, row, rows, squares[i], magnitudes[i])) ++rows.shifts[row];
      }
      for (size_t i = 0; i < kLanes; ++i) {
        int32_t above = 0;  // both limits rise from table to table
        for (size_t t = 0; t + 1 < kTables; ++t) {
          above += squares[i] > static_cast<int32_t>(kSquares[t]) || magnitudes[i] > kMagnitudes[t];
        }
        rows.tables[first + i] = static_cast<uint8_t>(above);
      }
    }
  }

  static bool row_to_symbols(const int16_t* levels, size_t row, const SymbolRows& rows,
                             int32_t& squares, int32_t& magnitude) {
    const int shift = rows.shifts[row];
    const auto half = static_cast<int16_t>(1 << shift >> 1);
    SignedWords coarse[kParts];
    SignedDwords sums{};
    for (size_t p = 0; p < kParts; ++p) {
      coarse[p] = (load(levels + p * kWords) + half) >> shift;
      sums += V::Types::madd(coarse[p], SignedWords{} + 1);
    }
    const auto centre = static_cast<int16_t>((total(sums) + static_cast<int>(kLanes / 2)) >> 5);
    SignedDwords found{};
    Words largest{};
    for (size_t p = 0; p < kParts; ++p) {
      const SignedWords around = coarse[p] - centre;
      found += V::Types::madd(around, around);
      largest = V::max(largest, (Words)(around > -around ? around : -around));
      const Bytes bytes = __builtin_convertvector((Words)(around + 128), Bytes);
      std::memcpy(rows.symbols + row * kLanes + p * kWords, &bytes, sizeof bytes);
    }
    rows.centres[row] = centre;
    squares = total(found);
    magnitude = V::most(largest);
    return magnitude <= kSymbolMax;
  }

  static void from_symbols(const SymbolRows& rows, size_t num_rows, int16_t* levels) {
    for (size_t r = 0; r < num_rows; ++r) {
      const auto offset = static_cast<uint16_t>(rows.centres[r] - 128);
      for (size_t p = 0; p < kParts; ++p) {
        const size_t place = r * kLanes + p * kWords;
        Bytes bytes;
        std::memcpy(&bytes, rows.symbols + place, sizeof bytes);
        const Words words = __builtin_convertvector(bytes, Words);
        V::store(levels + place, (words + offset) << int{rows.shifts[r]});
      }
    }
  }

  // [num_rows][num_columns] to [num_columns][num_rows], in tiles of 8 by 8.
  static void transpose(const int16_t* source, size_t num_rows, size_t num_columns,
                        int16_t* target) {
    for (size_t r = 0; r < num_rows; r += 8) {
      for (size_t c = 0; c < num_columns; c += 8) {
        transpose_tile(source + r * num_columns + c, num_columns, target + c * num_rows + r,
                       num_rows);
      }
    }
  }

  static void transpose_tile(const int16_t* source, size_t source_stride, int16_t* target,
                             size_t target_stride) {
    __m128i rows[8];
    __m128i next[8];
    for (size_t i = 0; i < 8; ++i) std::memcpy(&rows[i], source + i * source_stride, 16);
    for (size_t i = 0; i < 4; ++i) {
      next[2 * i] = _mm_unpacklo_epi16(rows[i], rows[i + 4]);
      next[2 * i + 1] = _mm_unpackhi_epi16(rows[i], rows[i + 4]);
    }
    for (size_t i = 0; i < 4; ++i) {
      rows[2 * i] = _mm_unpacklo_epi16(next[i], next[i + 4]);
      rows[2 * i + 1] = _mm_unpackhi_epi16(next[i], next[i + 4]);
    }
    for (size_t i = 0; i < 4; ++i) {
      next[2 * i] = _mm_unpacklo_epi16(rows[i], rows[i + 4]);
      next[2 * i + 1] = _mm_unpackhi_epi16(rows[i], rows[i + 4]);
    }
    for (size_t i = 0; i < 8; ++i) std::memcpy(target + i * target_stride, &next[i], 16);
  }
};

// A path with vectors of `kBytes`, with its own range coder.
template <size_t kBytes>
constexpr CodecKernels vector_kernels(decltype(CodecKernels::rans_encode) rans_encode,
                                      decltype(CodecKernels::rans_decode) rans_decode) {
  return {
      .int8_encode = VectorCodec<kBytes>::int8_encode,
      .int8_decode = VectorCodec<kBytes>::int8_decode,
      .int4_encode = VectorCodec<kBytes>::int4_encode,
      .int4_decode = VectorCodec<kBytes>::int4_decode,
      .magnitude = VectorCodec<kBytes>::magnitude,
      .to_levels = RowCodec<kBytes>::to_levels,
      .from_levels = RowCodec<kBytes>::from_levels,
      .transpose = RowCodec<kBytes>::transpose,
      .spreads = RowCodec<kBytes>::spreads,
      .to_symbols = RowCodec<kBytes>::to_symbols,
      .from_symbols = RowCodec<kBytes>::from_symbols,
      .rans_encode = rans_encode,
      .rans_decode = rans_decode,
  };
}

}  // namespace kvasir
