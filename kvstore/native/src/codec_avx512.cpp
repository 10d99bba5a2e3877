#include <immintrin.h>

#include "codec_rans.h"
#include "codec_vector.h"

namespace kvasir {
namespace {

using Lanes = __m512i;  // half of the 32 states

Lanes gather(Lanes places, const uint32_t* table) {
  return _mm512_i32gather_epi32(places, table, sizeof(uint32_t));
}

Lanes widen_bytes(const uint8_t* at) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

// x * factor >> 32, of 32 bits each.
Lanes multiply_high(Lanes x, Lanes factor) {
  const Lanes even = _mm512_srli_epi64(_mm512_mul_epu32(x, factor), 32);
  const Lanes odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), _mm512_srli_epi64(factor, 32));
  return _mm512_mask_blend_epi32(0xaaaa, even, odd);
}

Lanes encode_lanes(const uint8_t* symbols, uint32_t table, Lanes x, uint16_t*& words) {
  const RansTables& all = rans_tables();
  const Lanes places = widen_bytes(symbols);
  const Lanes entries = gather(places, all.encode.data() + table * 256);
  const Lanes reciprocals = gather(places, all.reciprocal.data() + table * 256);
  const Lanes frequencies = _mm512_and_si512(entries, _mm512_set1_epi32(kSlots - 1));
  const __mmask16 spills = _mm512_cmpge_epu32_mask(x, _mm512_slli_epi32(frequencies, 20));
  const auto count = static_cast<uint32_t>(__builtin_popcount(spills));
  words -= count;
  const __m256i spilt = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(spills, x));
  _mm256_mask_storeu_epi16(words, static_cast<__mmask16>((uint32_t{1} << count) - 1), spilt);
  x = _mm512_mask_srli_epi32(x, spills, x, 16);
  const Lanes quotients =
      _mm512_srlv_epi32(multiply_high(x, reciprocals), _mm512_srli_epi32(entries, 23));
  const Lanes rest = _mm512_sub_epi32(_mm512_set1_epi32(kSlots), frequencies);
  const Lanes addends =
      _mm512_and_si512(_mm512_srli_epi32(entries, 11), _mm512_set1_epi32(2 * kSlots - 1));
  return _mm512_add_epi32(x, _mm512_add_epi32(_mm512_mullo_epi32(quotients, rest), addends));
}

void encode_rows(const uint8_t* symbols, const uint8_t* tables, size_t num_rows, uint32_t* states,
                 uint16_t*& words) {
  Lanes low = _mm512_loadu_si512(states);
  Lanes high = _mm512_loadu_si512(states + 16);
  for (size_t row = num_rows; row-- > 0;) {
    const uint8_t* const at = symbols + row * kLanes;
    high = encode_lanes(at + 16, tables[row], high, words);
    low = encode_lanes(at, tables[row], low, words);
  }
  _mm512_storeu_si512(states, low);
  _mm512_storeu_si512(states + 16, high);
}

Lanes decode_lanes(uint8_t* symbols, uint32_t table, Lanes x, const uint16_t*& words) {
  const Lanes slots = _mm512_and_si512(x, _mm512_set1_epi32(kSlots - 1));
  const Lanes entries = gather(slots, rans_tables().decode.data() + table * kSlots);
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
  Lanes low = _mm512_loadu_si512(states);
  Lanes high = _mm512_loadu_si512(states + 16);
  for (size_t row = 0; row < num_rows; ++row) {
    uint8_t* const at = symbols + row * kLanes;
    low = decode_lanes(at, tables[row], low, words);
    high = decode_lanes(at + 16, tables[row], high, words);
    if (words > words_end) return false;
  }
  _mm512_storeu_si512(states, low);
  _mm512_storeu_si512(states + 16, high);
  return true;
}

}  // namespace

const CodecKernels& avx512_codec_kernels() {
  using Codec = VectorCodec<64>;
  static constexpr CodecKernels kernels{
      .int8_encode = Codec::int8_encode,
      .int8_decode = Codec::int8_decode,
      .int4_encode = Codec::int4_encode,
      .int4_decode = Codec::int4_decode,
      .magnitude = Codec::magnitude,
      .to_levels = Codec::to_levels,
      .from_levels = Codec::from_levels,
      .transpose = Codec::transpose,
      .row_sums = Codec::row_sums,
      .to_symbols = Codec::to_symbols,
      .from_symbols = Codec::from_symbols,
      .rans_encode = encode_rows,
      .rans_decode = decode_rows,
  };
  return kernels;
}

}  // namespace kvasir
