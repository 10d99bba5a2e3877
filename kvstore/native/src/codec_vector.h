// The paths with vectors, written once: `kBytes` is the width of a vector. Here: int8 and int4; the
// entropy codec's part is in codec_rows.h.
//
// A bfloat16 is the upper half of a float, so a vector of them is two of floats, the even and the
// odd values, without a shuffle. Adding 1.5 * 2^23 leaves a rounded integer in a float's low bits.
// Codes are stored in the order in which that leaves them.
#pragma once

#include <immintrin.h>

#include <algorithm>
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
};
template <>
struct VectorTypes<64> {
  using Words [[gnu::vector_size(64)]] = uint16_t;
  using SignedWords [[gnu::vector_size(64)]] = int16_t;
  using Dwords [[gnu::vector_size(64)]] = uint32_t;
  using SignedDwords [[gnu::vector_size(64)]] = int32_t;
  using Floats [[gnu::vector_size(64)]] = float;
};

template <size_t kBytes>
struct VectorCodec {
  using Words = typename VectorTypes<kBytes>::Words;
  using SignedWords = typename VectorTypes<kBytes>::SignedWords;
  using Dwords = typename VectorTypes<kBytes>::Dwords;
  using SignedDwords = typename VectorTypes<kBytes>::SignedDwords;
  using Floats = typename VectorTypes<kBytes>::Floats;

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
  static Words all(uint16_t value) { return Words{} + value; }
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
  static Words min(Words a, Words b) { return a < b ? a : b; }

  static uint16_t least(Words words) {
    __m128i parts[kBytes / 16];
    std::memcpy(parts, &words, kBytes);
    for (size_t n = kBytes / 32; n > 0; n /= 2) {
      for (size_t i = 0; i < n; ++i) parts[i] = _mm_min_epu16(parts[i], parts[i + n]);
    }
    return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(parts[0])));
  }
  static uint16_t most(Words words) { return static_cast<uint16_t>(~least(~words)); }

  static uint16_t magnitude(const uint16_t* source, size_t count) {
    Words found{};
    for (size_t i = 0; i < count; i += kWords) found = max(found, load(source + i) & 0x7fff);
    return most(found);
  }

  // ---- int8

  static Words levels(Words values, const Pair& inverse) {
    const Pair wide = widen(values);
    return join((Dwords)(wide.even * inverse.even + kRoundSigned),
                (Dwords)(wide.odd * inverse.odd + kRoundSigned));
  }

  static void token_magnitudes(const uint16_t* source, size_t head_dim, bool is_key,
                               uint16_t* found) {
    if (!is_key) {
      for (size_t t = 0; t < kLanes; ++t) found[t] = magnitude(source + t * head_dim, head_dim);
      return;
    }
    for (size_t p = 0; p < kParts; ++p) {
      Words largest{};
      for (size_t c = 0; c < head_dim; ++c) {
        largest = max(largest, load(source + c * kLanes + p * kWords) & 0x7fff);
      }
      store(found + p * kWords, largest);
    }
  }

  static bool int8_encode(const uint16_t* source, size_t head_dim, bool is_key, uint8_t* target) {
    uint16_t scales[kLanes];
    float inverse[kLanes];
    token_magnitudes(source, head_dim, is_key, scales);
    if (*std::max_element(scales, scales + kLanes) > kMagnitudeMax) return false;
    for (size_t t = 0; t < kLanes; ++t) {
      scales[t] = step_of(kvasir::widen(scales[t]), 127.0F);
      inverse[t] = inverse_of(scales[t]);
    }
    std::memcpy(target, scales, sizeof scales);
    target += sizeof scales;
    if (is_key) {
      encode_keys(source, head_dim, inverse, target);
    } else {
      encode_values(source, head_dim, inverse, target);
    }
    return true;
  }

  static void encode_keys(const uint16_t* source, size_t head_dim, const float* inverse,
                          uint8_t* target) {
    for (size_t p = 0; p < kParts; ++p) {
      const Pair factor = split(inverse + p * kWords);
      for (size_t c = 0; c < head_dim; c += 2) {
        const uint16_t* const at = source + c * kLanes + p * kWords;
        encode_pair(at, at + kLanes, factor, factor, target + c * kLanes + p * kBytes);
      }
    }
  }

  static void encode_values(const uint16_t* source, size_t head_dim, const float* inverse,
                            uint8_t* target) {
    for (size_t t = 0; t < kLanes; t += 2) {
      const Pair first = both(inverse[t]);
      const Pair second = both(inverse[t + 1]);
      for (size_t i = 0; i < head_dim; i += kWords) {
        const uint16_t* const at = source + t * head_dim + i;
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

  // The even and the odd of kWords floats.
  static Pair split(const float* values) {
    float even[kWords / 2];
    float odd[kWords / 2];
    for (size_t i = 0; i < kWords / 2; ++i) {
      even[i] = values[2 * i];
      odd[i] = values[2 * i + 1];
    }
    Pair pair;
    std::memcpy(&pair.even, even, kBytes);
    std::memcpy(&pair.odd, odd, kBytes);
    return pair;
  }

  static bool int8_decode(const uint8_t* source, size_t head_dim, bool is_key, uint16_t* target) {
    uint16_t steps[kLanes];
    std::memcpy(steps, source, sizeof steps);
    source += sizeof steps;
    float scales[kLanes];
    for (size_t t = 0; t < kLanes; ++t) {
      if (steps[t] > kMagnitudeMax) return false;
      scales[t] = kvasir::widen(steps[t]);
    }
    if (is_key) {
      for (size_t c = 0; c < head_dim; c += 2) {
        for (size_t p = 0; p < kParts; ++p) {
          const Pair scale = split(scales + p * kWords);
          uint16_t* const at = target + c * kLanes + p * kWords;
          decode_pair(source + c * kLanes + p * kBytes, scale, scale, at, at + kLanes);
        }
      }
      return true;
    }
    for (size_t t = 0; t < kLanes; t += 2) {
      const Pair first = both(scales[t]);
      const Pair second = both(scales[t + 1]);
      for (size_t i = 0; i < head_dim; i += kWords) {
        uint16_t* const at = target + t * head_dim + i;
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

  // 1. The bounds of all groups. 2. Their steps, side by side. 3. The codes, four groups at a time.
  static bool int4_encode(const uint16_t* source, size_t num_groups, uint8_t* target) {
    uint16_t lows[kGroupsMax];
    uint16_t highs[kGroupsMax];
    for (size_t g = 0; g < num_groups; ++g) {
      bounds(source + g * kLanes, lows[g], highs[g]);
    }
    float bases[kGroupsMax];
    float inverses[kGroupsMax];
    Words largest{};
    for (size_t g = 0; g < num_groups; g += kWords) {
      const Words low = from_keys(load(lows + g));
      const Words high = from_keys(load(highs + g));
      largest = max(largest, max(low & 0x7fff, high & 0x7fff));
      const Pair base = widen(low);
      const Pair top = widen(high);
      const Words step = join(steps_of(top.even - base.even), steps_of(top.odd - base.odd));
      store(target + 2 * g, low);
      store(target + 2 * (num_groups + g), step);
      store_pair(bases + g, base);
      const Pair wide_step = widen(step);
      store_pair(inverses + g, {inverses_of(wide_step.even), inverses_of(wide_step.odd)});
    }
    if (most(largest) > kMagnitudeMax) return false;
    uint8_t* codes = target + 4 * num_groups;
    for (size_t g = 0; g < num_groups; g += 4, codes += 2 * kLanes) {
      for (size_t p = 0; p < kParts; ++p) {
        Words packed{};
        for (size_t k = 0; k < 4; ++k) {
          const Pair wide = widen(load(source + (g + k) * kLanes + p * kWords));
          const float base = bases[pair_place(g + k)];
          const float inverse = inverses[pair_place(g + k)];
          const Floats even = (wide.even - base) * inverse + kRoundUnsigned;
          const Floats odd = (wide.odd - base) * inverse + kRoundUnsigned;
          packed |= join((Dwords)even, (Dwords)odd) << 4 * k;
        }
        store(codes + p * kBytes, packed);
      }
    }
    return true;
  }

  // Value i of words that were stored as pairs.
  static size_t pair_place(size_t i) {
    return i / kWords * kWords + i % 2 * (kWords / 2) + i % kWords / 2;
  }
  static void store_pair(float* at, const Pair& pair) {
    std::memcpy(at, &pair.even, kBytes);
    std::memcpy(at + kWords / 2, &pair.odd, kBytes);
  }
  static Dwords steps_of(Floats range) {
    const Dwords bits = ((Dwords)(range / 15.0F) + 0xffff) >> 16;
    return bits < kSmallestStep ? Dwords{} : bits;
  }
  static Floats inverses_of(Floats steps) {
    const Floats inverses = 1.0F / steps;
    return steps == 0.0F ? Floats{} : inverses;
  }
  static Words from_keys(Words keys) {
    const Words is_positive = (Words)((SignedWords)keys >> 15);
    return (is_positive & keys & 0x7fff) | (~is_positive & ~keys);
  }

  // Found among integers that sort like the values.
  static void bounds(const uint16_t* group, uint16_t& least_key, uint16_t& most_key) {
    Words low = all(0xffff);
    Words high{};
    for (size_t p = 0; p < kParts; ++p) {
      const Words words = load(group + p * kWords);
      const Words keys = words ^ ((Words)((SignedWords)words >> 15) | 0x8000);
      low = min(low, keys);
      high = max(high, keys);
    }
    least_key = least(low);
    most_key = most(high);
  }

  static bool int4_decode(const uint8_t* source, size_t num_groups, uint16_t* target) {
    const uint8_t* const lows = source;
    const uint8_t* const steps = lows + 2 * num_groups;
    const uint8_t* codes = source + 4 * num_groups;
    for (size_t g = 0; g < num_groups; g += 4, codes += 2 * kLanes) {
      for (size_t k = 0; k < 4; ++k) {
        uint16_t low;
        uint16_t step;
        std::memcpy(&low, lows + 2 * (g + k), sizeof low);
        std::memcpy(&step, steps + 2 * (g + k), sizeof step);
        if ((low & 0x7fff) > kMagnitudeMax || step > kMagnitudeMax) return false;
        const Floats base = all_floats(kvasir::widen(low));
        const Floats scale = all_floats(kvasir::widen(step));
        for (size_t p = 0; p < kParts; ++p) {
          const SignedDwords wide = (SignedDwords)(load(codes + p * kBytes) >> 4 * k & 0xf);
          const SignedDwords low_codes = wide & 0xffff;
          const SignedDwords high_codes = wide >> 16;
          const Floats even = to_floats(low_codes) * scale + base;
          const Floats odd = to_floats(high_codes) * scale + base;
          store(target + (g + k) * kLanes + p * kWords, narrow(even, odd));
        }
      }
    }
    return true;
  }
};

}  // namespace kvasir
