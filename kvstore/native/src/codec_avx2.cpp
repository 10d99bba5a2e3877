#include <array>

#include "codec_rows.h"

namespace kvasir {
namespace {

using Lanes = __m256i;  // a quarter of the 32 states
constexpr size_t kStates = 8;
constexpr size_t kParts = kLanes / kStates;
using Shuffle = std::array<uint8_t, 16>;  // of the bytes of eight words; 0x80 and above: a zero

// Of a mask: its words to the end of the vector; and words from its begin to where the mask is set.
struct Shuffles {
  std::array<Shuffle, 256> compress;
  std::array<Shuffle, 256> expand;
};
constexpr Shuffles kShuffles = [] {
  Shuffles made{};
  for (size_t mask = 0; mask < 256; ++mask) {
    made.compress[mask].fill(0x80);
    made.expand[mask].fill(0x80);
    size_t packed = static_cast<size_t>(8 - std::popcount(mask));
    for (size_t i = 0, next = 0; i < kStates; ++i) {
      if ((mask >> i & 1) == 0) continue;
      for (size_t byte = 0; byte < 2; ++byte) {
        made.compress[mask][2 * packed + byte] = static_cast<uint8_t>(2 * i + byte);
        made.expand[mask][2 * i + byte] = static_cast<uint8_t>(2 * next + byte);
      }
      ++packed;
      ++next;
    }
  }
  return made;
}();

__m128i load(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }
Lanes load_states(const uint32_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const Lanes*>(at));
}
void store_states(uint32_t* at, Lanes x) { _mm256_storeu_si256(reinterpret_cast<Lanes*>(at), x); }
Lanes join(__m128i low, __m128i high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
size_t mask_of(Lanes x) { return static_cast<size_t>(_mm256_movemask_ps(_mm256_castsi256_ps(x))); }

// The entries of every other one of eight symbols.
Lanes entries_of(const uint8_t* symbols, const uint64_t* table) {
  const auto two = [&](size_t i) {
    return _mm_unpacklo_epi64(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(table + symbols[i])),
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(table + symbols[i + 2])));
  };
  return join(two(0), two(4));
}

[[gnu::always_inline]] inline Lanes encode_lanes(const uint8_t* symbols, const uint64_t* table,
                                                 Lanes x, uint16_t*& words) {
  const Lanes even = entries_of(symbols, table);
  const Lanes odd = entries_of(symbols + 1, table);
  const Lanes entries = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  const Lanes frequencies = _mm256_and_si256(entries, _mm256_set1_epi32(kSlots - 1));
  const Lanes stays = _mm256_cmpgt_epi32(_mm256_slli_epi32(frequencies, 20), x);
  const size_t spills = mask_of(stays) ^ 0xff;
  const Lanes lower = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(lower), _mm256_extracti128_si256(lower, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(words - kStates),
                   _mm_shuffle_epi8(packed, load(&kShuffles.compress[spills])));
  words -= std::popcount(spills);
  x = _mm256_blendv_epi8(_mm256_srli_epi32(x, 16), x, stays);
  // x * reciprocal >> 32
  const Lanes high = _mm256_blend_epi32(_mm256_srli_epi64(_mm256_mul_epu32(x, even), 32),
                                        _mm256_mul_epu32(_mm256_srli_epi64(x, 32), odd), 0xaa);
  const Lanes quotients = _mm256_srlv_epi32(high, _mm256_srli_epi32(entries, 23));
  const Lanes rest = _mm256_sub_epi32(_mm256_set1_epi32(kSlots), frequencies);
  const Lanes addends =
      _mm256_and_si256(_mm256_srli_epi32(entries, 11), _mm256_set1_epi32(2 * kSlots - 1));
  return _mm256_add_epi32(x, _mm256_add_epi32(_mm256_mullo_epi32(quotients, rest), addends));
}

void encode_rows(const uint8_t* symbols, const uint8_t* tables, size_t num_rows, uint32_t* states,
                 uint16_t*& words) {
  const uint64_t* const entries = rans_tables().encode.data();
  uint16_t* out = words;
  Lanes x[kParts];
  for (size_t i = 0; i < kParts; ++i) x[i] = load_states(states + kStates * i);
  for (size_t row = num_rows; row-- > 0;) {
    const uint64_t* const table = entries + tables[row] * size_t{256};
    for (size_t i = kParts; i-- > 0;) {
      x[i] = encode_lanes(symbols + row * kLanes + kStates * i, table, x[i], out);
    }
  }
  words = out;
  for (size_t i = 0; i < kParts; ++i) store_states(states + kStates * i, x[i]);
}

[[gnu::always_inline]] inline Lanes decode_lanes(uint8_t* symbols, const uint32_t* table, Lanes x,
                                                 const uint16_t*& words) {
  alignas(32) uint32_t slots[kStates];
  store_states(slots, _mm256_and_si256(x, _mm256_set1_epi32(kSlots - 1)));
  const auto entry = [&](size_t i) { return static_cast<int>(table[slots[i]]); };
  const Lanes entries = join(_mm_setr_epi32(entry(0), entry(1), entry(2), entry(3)),
                             _mm_setr_epi32(entry(4), entry(5), entry(6), entry(7)));
  const Lanes bytes = _mm256_and_si256(entries, _mm256_set1_epi32(0xff));
  const __m128i twice =
      _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(symbols), _mm_packus_epi16(twice, twice));
  const Lanes frequencies =
      _mm256_and_si256(_mm256_srli_epi32(entries, 8), _mm256_set1_epi32(kSlots - 1));
  x = _mm256_mullo_epi32(frequencies, _mm256_srli_epi32(x, kProbabilityBits));
  x = _mm256_add_epi32(x, _mm256_srli_epi32(entries, 19));
  // Below kStateMin; unsigned, as states of a damaged stream may pass 2^31.
  const Lanes needs = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, kStateBits), _mm256_setzero_si256());
  const size_t mask = mask_of(needs);
  const __m128i next = _mm_shuffle_epi8(load(words), load(&kShuffles.expand[mask]));
  words += std::popcount(mask);
  const Lanes raised = _mm256_blendv_epi8(x, _mm256_slli_epi32(x, 16), needs);
  return _mm256_or_si256(raised, _mm256_cvtepu16_epi32(next));
}

bool decode_rows(uint8_t* symbols, const uint8_t* tables, size_t num_rows, uint32_t* states,
                 const uint16_t*& words, const uint16_t* words_end) {
  const uint32_t* const entries = rans_tables().decode.data();
  const uint16_t* in = words;
  Lanes x[kParts];
  for (size_t i = 0; i < kParts; ++i) x[i] = load_states(states + kStates * i);
  for (size_t row = 0; row < num_rows; ++row) {
    const uint32_t* const table = entries + tables[row] * size_t{kSlots};
    for (size_t i = 0; i < kParts; ++i) {
      x[i] = decode_lanes(symbols + row * kLanes + kStates * i, table, x[i], in);
    }
    if (in > words_end) return false;
  }
  words = in;
  for (size_t i = 0; i < kParts; ++i) store_states(states + kStates * i, x[i]);
  return true;
}

}  // namespace

const CodecKernels& avx2_codec_kernels() {
  static constexpr CodecKernels kernels = vector_kernels<32>(encode_rows, decode_rows);
  return kernels;
}

}  // namespace kvasir
