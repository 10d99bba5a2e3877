#include <immintrin.h>

#include "codec_rows.h"

namespace kvasir {
namespace {

using Lanes = __m512i;  // half of the 32 states

// The entries of every other one of 16 symbols. By loads: gathers are slow where microcode mends
// them (CVE-2022-40982).
Lanes entries_of(const uint8_t* symbols, const uint64_t* table) {
  const auto two = [&](size_t i) {
    return _mm_unpacklo_epi64(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(table + symbols[i])),
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(table + symbols[i + 2])));
  };
  const auto four = [&](size_t i) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(two(i)), two(i + 4), 1);
  };
  return _mm512_inserti64x4(_mm512_castsi256_si512(four(0)), four(8), 1);
}

[[gnu::always_inline]] inline Lanes encode_lanes(const uint8_t* symbols, const uint64_t* table,
                                                 Lanes x, uint16_t*& words) {
  const Lanes even = entries_of(symbols, table);
  const Lanes odd = entries_of(symbols + 1, table);
  const Lanes entries = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  const Lanes frequencies = _mm512_and_si512(entries, _mm512_set1_epi32(kSlots - 1));
  const __mmask16 spills = _mm512_cmpge_epu32_mask(x, _mm512_slli_epi32(frequencies, 20));
  const auto count = static_cast<uint32_t>(__builtin_popcount(spills));
  words -= count;
  const __m256i spilt = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(spills, x));
  _mm256_mask_storeu_epi16(words, static_cast<__mmask16>((uint32_t{1} << count) - 1), spilt);
  x = _mm512_mask_srli_epi32(x, spills, x, 16);
  // x * reciprocal >> 32
  const Lanes high =
      _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(_mm512_mul_epu32(x, even), 32),
                              _mm512_mul_epu32(_mm512_srli_epi64(x, 32), odd));
  const Lanes quotients = _mm512_srlv_epi32(high, _mm512_srli_epi32(entries, 23));
  const Lanes rest = _mm512_sub_epi32(_mm512_set1_epi32(kSlots), frequencies);
  const Lanes addends =
      _mm512_and_si512(_mm512_srli_epi32(entries, 11), _mm512_set1_epi32(2 * kSlots - 1));
  return _mm512_add_epi32(x, _mm512_add_epi32(_mm512_mullo_epi32(quotients, rest), addends));
}

void encode_rows(const uint8_t* symbols, const uint8_t* tables, size_t num_rows, uint32_t* states,
                 uint16_t*& words) {
  const uint64_t* const entries = rans_tables().encode.data();
  uint16_t* out = words;
  Lanes low = _mm512_loadu_si512(states);
  Lanes high = _mm512_loadu_si512(states + 16);
  for (size_t row = num_rows; row-- > 0;) {
    const uint8_t* const at = symbols + row * kLanes;
    const uint64_t* const table = entries + tables[row] * size_t{256};
    high = encode_lanes(at + 16, table, high, out);
    low = encode_lanes(at, table, low, out);
  }
  words = out;
  _mm512_storeu_si512(states, low);
  _mm512_storeu_si512(states + 16, high);
}

[[gnu::always_inline]] inline Lanes decode_lanes(uint8_t* symbols, const uint32_t* table, Lanes x,
                                                 const uint16_t*& words) {
  alignas(64) uint32_t slots[16];
  _mm512_store_si512(slots, _mm512_and_si512(x, _mm512_set1_epi32(kSlots - 1)));
  const auto four = [&](size_t i) {
    const auto entry = [&](size_t k) { return static_cast<int>(table[slots[i + k]]); };
    return _mm_setr_epi32(entry(0), entry(1), entry(2), entry(3));
  };
  const auto eight = [&](size_t i) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(four(i)), four(i + 4), 1);
  };
  const Lanes entries = _mm512_inserti64x4(_mm512_castsi256_si512(eight(0)), eight(8), 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(symbols), _mm512_cvtepi32_epi8(entries));
  const Lanes frequencies =
      _mm512_and_si512(_mm512_srli_epi32(entries, 8), _mm512_set1_epi32(kSlots - 1));
  x = _mm512_mullo_epi32(frequencies, _mm512_srli_epi32(x, kProbabilityBits));
  x = _mm512_add_epi32(x, _mm512_srli_epi32(entries, 19));
  const __mmask16 needs = _mm512_cmplt_epu32_mask(x, _mm512_set1_epi32(kStateMin));
  const Lanes next = _mm512_maskz_expand_epi32(
      needs, _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words))));
  words += __builtin_popcount(needs);
  return _mm512_mask_or_epi32(x, needs, _mm512_slli_epi32(x, 16), next);
}

bool decode_rows(uint8_t* symbols, const uint8_t* tables, size_t num_rows, uint32_t* states,
                 const uint16_t*& words, const uint16_t* words_end) {
  const uint32_t* const entries = rans_tables().decode.data();
  const uint16_t* in = words;
  Lanes low = _mm512_loadu_si512(states);
  Lanes high = _mm512_loadu_si512(states + 16);
  for (size_t row = 0; row < num_rows; ++row) {
    uint8_t* const at = symbols + row * kLanes;
    const uint32_t* const table = entries + tables[row] * size_t{kSlots};
    low = decode_lanes(at, table, low, in);
    high = decode_lanes(at + 16, table, high, in);
    if (in > words_end) return false;
  }
  words = in;
  _mm512_storeu_si512(states, low);
  _mm512_storeu_si512(states + 16, high);
  return true;
}

}  // namespace

const CodecKernels& avx512_codec_kernels() {
  static constexpr CodecKernels kernels = vector_kernels<64>(encode_rows, decode_rows);
  return kernels;
}

}  // namespace kvasir
