// The paths with vectors, written once: `kBytes` is the width of a vector. Here: int8 and int4; the
// entropy codec's part is in codec_rows.h.
//
// A bfloat16 is the upper half of a float, so a vector of them is two of floats, the even and the
// odd values, without a shuffle. Adding 1.5 * 2^23 leaves a rounded integer in a float's low bits.
// Codes are stored in the order in which that leaves them.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "codec_kernels.h"

namespace kvasir {

template <size_t kBytes>
struct VectorTypes;
template <>
struct VectorTypes<32> {
  using Words [[gnu::vector_size(32)]] = uint16_t;
  using SignedWords [[gnu::vector_size(32)]] = int16_t;
  using Dwords [[gnu::vector_size(32)]] = uint32_t;
  using SignedDwords [[gnu::vector_size(32)]] = int32_t;
  using Floats [[gnu::vector_size(32)]] = float;
  using Raw = __m256i;

  static SignedDwords madd(SignedWords a, SignedWords b) {
    return (SignedDwords)_mm256_madd_epi16((Raw)a, (Raw)b);
  }
  static Raw low16(Raw a, Raw b) { return _mm256_unpacklo_epi16(a, b); }
  static Raw high16(Raw a, Raw b) { return _mm256_unpackhi_epi16(a, b); }
  static Raw low32(Raw a, Raw b) { return _mm256_unpacklo_epi32(a, b); }
  static Raw high32(Raw a, Raw b) { return _mm256_unpackhi_epi32(a, b); }
  static Raw low64(Raw a, Raw b) { return _mm256_unpacklo_epi64(a, b); }
  static Raw high64(Raw a, Raw b) { return _mm256_unpackhi_epi64(a, b); }

  // Lane i of 128 bits: the maxima of the lanes of row i.
  static Words fold(const Words* rows) {
    const Raw a = (Raw)rows[0];
    const Raw b = (Raw)rows[1];
    return (Words)_mm256_max_epu16(_mm256_permute2x128_si256(a, b, 0x20),
                                   _mm256_permute2x128_si256(a, b, 0x31));
  }
};
#ifdef __AVX512BW__
template <>
struct VectorTypes<64> {
  using Words [[gnu::vector_size(64)]] = uint16_t;
  using SignedWords [[gnu::vector_size(64)]] = int16_t;
  using Dwords [[gnu::vector_size(64)]] = uint32_t;
  using SignedDwords [[gnu::vector_size(64)]] = int32_t;
  using Floats [[gnu::vector_size(64)]] = float;
  using Raw = __m512i;

  static SignedDwords madd(SignedWords a, SignedWords b) {
    return (SignedDwords)_mm512_madd_epi16((Raw)a, (Raw)b);
  }
  static Raw low16(Raw a, Raw b) { return _mm512_unpacklo_epi16(a, b); }
  static Raw high16(Raw a, Raw b) { return _mm512_unpackhi_epi16(a, b); }
  static Raw low32(Raw a, Raw b) { return _mm512_unpacklo_epi32(a, b); }
  static Raw high32(Raw a, Raw b) { return _mm512_unpackhi_epi32(a, b); }
  static Raw low64(Raw a, Raw b) { return _mm512_unpacklo_epi64(a, b); }
  static Raw high64(Raw a, Raw b) { return _mm512_unpackhi_epi64(a, b); }

  static Words fold(const Words* rows) {
    const Raw low = fold_two((Raw)rows[0], (Raw)rows[1]);
    const Raw high = fold_two((Raw)rows[2], (Raw)rows[3]);
    return (Words)_mm512_max_epu16(_mm512_shuffle_i64x2(low, high, 0x88),
                                   _mm512_shuffle_i64x2(low, high, 0xdd));
  }
  static Raw fold_two(Raw a, Raw b) {
    return _mm512_max_epu16(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xee));
  }
};
#endif

template <size_t kBytes>
struct VectorCodec {
  using Types = VectorTypes<kBytes>;
  using Words = typename Types::Words;
  using SignedWords = typename Types::SignedWords;
  using Dwords = typename Types::Dwords;
  using SignedDwords = typename Types::SignedDwords;
  using Floats = typename Types::Floats;
  using Raw = typename Types::Raw;

  static constexpr size_t kWords = kBytes / 2;
  static constexpr size_t kParts = kLanes / kWords;  // vectors of one group of 32

  struct Pair {  // of floats: the even and the odd ones of a vector of words
    Floats even;
    Floats odd;
  };

  static Words load(const void* at) {
    Words value;
    std::memcpy(&value, at, kBytes);
    return value;
  }
  static void store(void* at, Words value) { std::memcpy(at, &value, kBytes); }
  // Starts to bring in what is needed a section later, to be read or written: memory is waited for
  // otherwise. Behind the last section that is past the buffer, which a fetch bears.
  template <int kWrite>
  static void fetch(const uint16_t* at) {
    __builtin_prefetch(at, kWrite);
  }
  template <int kWrite>
  static void fetch(const uint16_t* at, size_t stride) {
    fetch<kWrite>(at);
    fetch<kWrite>(at + stride);
  }
  static Floats all_floats(float value) { return Floats{} + value; }
  static Pair both(float value) { return {all_floats(value), all_floats(value)}; }

  static Floats to_floats(SignedDwords integers) {
    return __builtin_convertvector(integers, Floats);
  }
  static Pair widen(Words words) {
    const Dwords bits = (Dwords)words;
    return {(Floats)(bits << 16), (Floats)(bits & 0xffff0000)};
  }
  static Words join(Dwords even, Dwords odd) { return (Words)((even & 0xffff) | odd << 16); }
  static Words narrow(Floats even, Floats odd) {
    const Dwords upper = ((Dwords)odd + 0x8000) & 0xffff0000;
    return (Words)(((Dwords)even + 0x8000) >> 16 | upper);
  }
  static Words max(Words a, Words b) { return a > b ? a : b; }

  static uint16_t most(Words words) {
    __m128i parts[kBytes / 16];
    std::memcpy(parts, &words, kBytes);
    for (size_t n = kBytes / 32; n > 0; n /= 2) {
      for (size_t i = 0; i < n; ++i) parts[i] = _mm_max_epu16(parts[i], parts[i + n]);
    }
    const __m128i inverted = _mm_xor_si128(parts[0], _mm_set1_epi16(-1));
    return static_cast<uint16_t>(~_mm_cvtsi128_si32(_mm_minpos_epu16(inverted)));
  }

  // Word i: the maximum of row(i), for kWords rows: shared out among lanes, then among words.
  template <class Row>
  static Words most_of_rows(const Row& row) {
    constexpr size_t kFew = kWords / 8;
    Words found[8];
    for (size_t k = 0; k < 8; ++k) {
      Words few[kFew];
      for (size_t i = 0; i < kFew; ++i) few[i] = row(8 * i + k);
      found[k] = Types::fold(few);
    }
    for (size_t k = 0; k < 4; ++k) {
      const Raw a = (Raw)found[2 * k];
      const Raw b = (Raw)found[2 * k + 1];
      found[k] = max((Words)Types::low16(a, b), (Words)Types::high16(a, b));
    }
    for (size_t k = 0; k < 2; ++k) {
      const Raw a = (Raw)found[2 * k];
      const Raw b = (Raw)found[2 * k + 1];
      found[k] = max((Words)Types::low32(a, b), (Words)Types::high32(a, b));
    }
    const Raw a = (Raw)found[0];
    const Raw b = (Raw)found[1];
    return max((Words)Types::low64(a, b), (Words)Types::high64(a, b));
  }

  // The upper 16 bits of range / levels, rounded up, and their inverses: step_of(), inverse_of().
  static Dwords steps_of(Floats range, float levels) {
    const Dwords bits = ((Dwords)(range / levels) + 0xffff) >> 16;
    return bits < kSmallestStep ? Dwords{} : bits;
  }
  static Words steps_of(const Pair& range, float levels) {
    return join(steps_of(range.even, levels), steps_of(range.odd, levels));
  }
  static Floats inverses_of(Floats steps) {
    const Floats inverses = 1.0F / steps;
    return steps == 0.0F ? Floats{} : inverses;
  }
  static Pair inverses_of(Words steps) {
    const Pair wide = widen(steps);
    return {inverses_of(wide.even), inverses_of(wide.odd)};
  }

  // Floats of words as pairs, and where that of word i is.
  static void store_pair(float* at, const Pair& pair) {
    std::memcpy(at, &pair.even, kBytes);
    std::memcpy(at + kWords / 2, &pair.odd, kBytes);
  }
  static Pair load_pair(const float* at) {
    Pair pair;
    std::memcpy(&pair.even, at, kBytes);
    std::memcpy(&pair.odd, at + kWords / 2, kBytes);
    return pair;
  }
  static size_t pair_place(size_t i) {
    return i / kWords * kWords + i % 2 * (kWords / 2) + i % kWords / 2;
  }

  static Words magnitudes(const uint16_t* source, size_t count, size_t stride) {
    Words found{};
    for (size_t i = 0; i < count; i += stride) found = max(found, load(source + i) & 0x7fff);
    return found;
  }
  static uint16_t magnitude(const uint16_t* source, size_t count) {
    return most(magnitudes(source, count, kWords));
  }

  // ---- int8

  static Words levels(Words values, const Pair& inverse) {
    const Pair wide = widen(values);
    return join((Dwords)(wide.even * inverse.even + kRoundSigned),
                (Dwords)(wide.odd * inverse.odd + kRoundSigned));
  }

  // Of tokens kWords * part and on.
  static Words token_magnitudes(const uint16_t* source, size_t head_dim, bool is_key, size_t part) {
    if (!is_key) {
      return most_of_rows([&](size_t i) {
        return magnitudes(source + (part * kWords + i) * head_dim, head_dim, kWords);
      });
    }
    return magnitudes(source + part * kWords, kLanes * head_dim, kLanes);
  }

  static bool int8_encode(const uint16_t* source, size_t head_dim, bool is_key, uint8_t* target) {
    float inverses[kLanes];
    for (size_t p = 0; p < kParts; ++p) {
      const Words largest = token_magnitudes(source, head_dim, is_key, p);
      if (most(largest) > kMagnitudeMax) return false;
      const Words steps = steps_of(widen(largest), 127.0F);
      store(target + p * kBytes, steps);
      store_pair(inverses + p * kWords, inverses_of(steps));
    }
    target += kLanes * sizeof(uint16_t);
    if (is_key) {
      encode_keys(source, head_dim, inverses, target);
    } else {
      encode_values(source, head_dim, inverses, target);
    }
    return true;
  }

  static void encode_keys(const uint16_t* source, size_t head_dim, const float* inverses,
                          uint8_t* target) {
    for (size_t p = 0; p < kParts; ++p) {
      const Pair factor = load_pair(inverses + p * kWords);
      for (size_t c = 0; c < head_dim; c += 2) {
        const uint16_t* const at = source + c * kLanes + p * kWords;
        fetch<0>(at + kLanes * head_dim, kLanes);
        encode_pair(at, at + kLanes, factor, factor, target + c * kLanes + p * kBytes);
      }
    }
  }

  static void encode_values(const uint16_t* source, size_t head_dim, const float* inverses,
                            uint8_t* target) {
    for (size_t t = 0; t < kLanes; t += 2) {
      const Pair first = both(inverses[pair_place(t)]);
      const Pair second = both(inverses[pair_place(t + 1)]);
      for (size_t i = 0; i < head_dim; i += kWords) {
        const uint16_t* const at = source + t * head_dim + i;
        fetch<0>(at + kLanes * head_dim, head_dim);
        encode_pair(at, at + head_dim, first, second, target + t * head_dim + 2 * i);
      }
    }
  }

  static void encode_pair(const uint16_t* first, const uint16_t* second, const Pair& inverse_first,
                          const Pair& inverse_second, uint8_t* target) {
    const Words low = levels(load(first), inverse_first);
    const Words high = levels(load(second), inverse_second);
    store(target, (low & 0xff) | high << 8);
  }

  static bool int8_decode(const uint8_t* source, size_t head_dim, bool is_key, uint16_t* target) {
    float scales[kLanes];
    for (size_t p = 0; p < kParts; ++p) {
      const Words steps = load(source + p * kBytes);
      if (most(steps) > kMagnitudeMax) return false;
      store_pair(scales + p * kWords, widen(steps));
    }
    source += kLanes * sizeof(uint16_t);
    if (is_key) {
      for (size_t c = 0; c < head_dim; c += 2) {
        for (size_t p = 0; p < kParts; ++p) {
          const Pair scale = load_pair(scales + p * kWords);
          uint16_t* const at = target + c * kLanes + p * kWords;
          fetch<1>(at + kLanes * head_dim, kLanes);
          decode_pair(source + c * kLanes + p * kBytes, scale, scale, at, at + kLanes);
        }
      }
      return true;
    }
    for (size_t t = 0; t < kLanes; t += 2) {
      const Pair first = both(scales[pair_place(t)]);
      const Pair second = both(scales[pair_place(t + 1)]);
      for (size_t i = 0; i < head_dim; i += kWords) {
        uint16_t* const at = target + t * head_dim + i;
        fetch<1>(at + kLanes * head_dim, head_dim);
        decode_pair(source + t * head_dim + 2 * i, first, second, at, at + head_dim);
      }
    }
    return true;
  }

  static void decode_pair(const uint8_t* source, const Pair& scale_first, const Pair& scale_second,
                          uint16_t* first, uint16_t* second) {
    const SignedWords codes = (SignedWords)load(source);
    store(first, from_words(codes << 8 >> 8, scale_first));
    store(second, from_words(codes >> 8, scale_second));
  }

  static Words from_words(SignedWords codes, const Pair& scale) {
    const SignedDwords wide = (SignedDwords)codes;
    const SignedDwords low = wide << 16 >> 16;
    const SignedDwords high = wide >> 16;
    const Floats even = to_floats(low) * scale.even;
    const Floats odd = to_floats(high) * scale.odd;
    return narrow(even, odd);
  }

  // ---- int4

  // 1. The bounds and steps of groups, side by side. 2. The codes, four groups at a time.
  static bool int4_encode(const uint16_t* source, size_t num_groups, uint8_t* target) {
    float bases[kGroupsMax];
    float inverses[kGroupsMax];
    Words largest{};
    for (size_t g = 0; g < num_groups; g += kWords) {
      const Words low = from_keys(~most_keys(source + g * kLanes, 0xffff));
      const Words high = from_keys(most_keys(source + g * kLanes, 0));
      largest = max(largest, max(low & 0x7fff, high & 0x7fff));
      const Pair base = widen(low);
      const Pair top = widen(high);
      const Words steps = steps_of({top.even - base.even, top.odd - base.odd}, 15.0F);
      store(target + 2 * g, low);
      store(target + 2 * (num_groups + g), steps);
      store_pair(bases + g, base);
      store_pair(inverses + g, inverses_of(steps));
    }
    if (most(largest) > kMagnitudeMax) return false;
    uint8_t* codes = target + 4 * num_groups;
    for (size_t g = 0; g < num_groups; g += 4, codes += 2 * kLanes) {
      for (size_t p = 0; p < kParts; ++p) {
        Dwords even{};
        Dwords odd{};
        for (size_t k = 0; k < 4; ++k) {
          const uint16_t* const at = source + (g + k) * kLanes + p * kWords;
          fetch<0>(at + num_groups * kLanes);
          const Pair wide = widen(load(at));
          const float base = bases[pair_place(g) + pair_place(k)];
          const float inverse = inverses[pair_place(g) + pair_place(k)];
          even |= (Dwords)((wide.even - base) * inverse + kRoundUnsigned) << 4 * k;
          odd |= (Dwords)((wide.odd - base) * inverse + kRoundUnsigned) << 4 * k;
        }
        store(codes + p * kBytes, join(even, odd));
      }
    }
    return true;
  }

  // Keys are integers that sort like the values; `flips` inverts them.
  static Words from_keys(Words found) {
    const Words is_positive = (Words)((SignedWords)found >> 15);
    return (is_positive & found & 0x7fff) | (~is_positive & ~found);
  }

  static Words most_keys(const uint16_t* groups, uint16_t flips) {
    return most_of_rows([&](size_t i) {
      const uint16_t* const group = groups + i * kLanes;
      Words found = keys(load(group)) ^ flips;
      for (size_t p = 1; p < kParts; ++p) {
        found = max(found, keys(load(group + p * kWords)) ^ flips);
      }
      return found;
    });
  }
  static Words keys(Words words) { return words ^ ((Words)((SignedWords)words >> 15) | 0x8000); }

  static bool int4_decode(const uint8_t* source, size_t num_groups, uint16_t* target) {
    float bases[kGroupsMax];
    float scales[kGroupsMax];
    for (size_t g = 0; g < num_groups; g += kWords) {
      const Words low = load(source + 2 * g);
      const Words steps = load(source + 2 * (num_groups + g));
      if (most(max(low & 0x7fff, steps)) > kMagnitudeMax) return false;
      store_pair(bases + g, widen(low));
      store_pair(scales + g, widen(steps));
    }
    const uint8_t* codes = source + 4 * num_groups;
    for (size_t g = 0; g < num_groups; g += 4, codes += 2 * kLanes) {
      for (size_t k = 0; k < 4; ++k) {
        const float base = bases[pair_place(g) + pair_place(k)];
        const float scale = scales[pair_place(g) + pair_place(k)];
        for (size_t p = 0; p < kParts; ++p) {
          const SignedDwords wide = (SignedDwords)(load(codes + p * kBytes) >> 4 * k & 0xf);
          const SignedDwords low_codes = wide & 0xffff;
          const SignedDwords high_codes = wide >> 16;
          const Floats even = to_floats(low_codes) * scale + base;
          const Floats odd = to_floats(high_codes) * scale + base;
          uint16_t* const at = target + (g + k) * kLanes + p * kWords;
          fetch<1>(at + num_groups * kLanes);
          store(at, narrow(even, odd));
        }
      }
    }
    return true;
  }
};

}  // namespace kvasir
