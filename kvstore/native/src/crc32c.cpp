#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvasir {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;  // reflected
using Table = std::array<uint32_t, 256>;

constexpr std::array<Table, 8> make_slices() {
  std::array<Table, 8> slices{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) ? (crc >> 1) ^ kPolynomial : crc >> 1;
    slices[0][byte] = crc;
  }
  for (size_t k = 1; k < 8; ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t crc = slices[k - 1][byte];
      slices[k][byte] = slices[0][crc & 0xff] ^ (crc >> 8);
    }
  }
  return slices;
}

constexpr std::array<Table, 8> kSlices = make_slices();

uint32_t step_byte(uint32_t crc, uint8_t byte) {
  return kSlices[0][(crc ^ byte) & 0xff] ^ (crc >> 8);
}

uint64_t load64(const uint8_t* data) {
  uint64_t word;
  std::memcpy(&word, data, sizeof word);
  return word;
}

#if defined(__x86_64__)

// Advances a checksum over `kBytes` zero bytes: four table look-ups, one per byte of the checksum.
template <size_t kBytes>
struct ZeroShift {
  std::array<Table, 4> tables{};

  ZeroShift() {
    std::array<uint32_t, 32> images{};  // of the single bits; the operator is linear
    for (size_t bit = 0; bit < 32; ++bit) {
      uint32_t crc = uint32_t{1} << bit;
      for (size_t i = 0; i < kBytes; ++i) crc = step_byte(crc, 0);
      images[bit] = crc;
    }
    for (size_t k = 0; k < 4; ++k) {
      for (size_t byte = 0; byte < 256; ++byte) {
        for (size_t bit = 0; bit < 8; ++bit) {
          if (byte >> bit & 1) tables[k][byte] ^= images[8 * k + bit];
        }
      }
    }
  }

  uint32_t operator()(uint32_t crc) const {
    return tables[0][crc & 0xff] ^ tables[1][crc >> 8 & 0xff] ^ tables[2][crc >> 16 & 0xff] ^
           tables[3][crc >> 24];
  }
};

// Three interleaved streams hide the instruction's latency of three cycles; their checksums are
// joined by shifting over the bytes that follow (M. Adler's method).
template <size_t kBytes>
__attribute__((target("sse4.2"))) uint32_t run_interleaved(uint32_t crc, const uint8_t*& data,
                                                           size_t& size) {
  static const ZeroShift<kBytes> shift;
  while (size >= 3 * kBytes) {
    uint64_t a = crc, b = 0, c = 0;
    for (size_t i = 0; i < kBytes; i += 8) {
      a = _mm_crc32_u64(a, load64(data + i));
      b = _mm_crc32_u64(b, load64(data + kBytes + i));
      c = _mm_crc32_u64(c, load64(data + 2 * kBytes + i));
    }
    crc = shift(static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b);
    crc = shift(crc) ^ static_cast<uint32_t>(c);
    data += 3 * kBytes;
    size -= 3 * kBytes;
  }
  return crc;
}

// The same while copying: the sums take their words from memory once more, which is in the first
// cache by then, and leave the vector units to the copy. The copy's load always comes first: memory
// that is being reused is right until some moment and wrong from then on, so what was copied wrong
// is summed wrong. A stream's length that is no multiple of 4,096 keeps the loads of one stream
// clear of the stores of another in the low address bits that the CPU compares first.
template <size_t kBytes>
__attribute__((target("avx2,sse4.2"))) uint32_t copy_interleaved(uint32_t crc, uint8_t*& target,
                                                                 const uint8_t*& data,
                                                                 size_t& size) {
  static_assert(kBytes % sizeof(__m256i) == 0);
  static const ZeroShift<kBytes> shift;
  while (size >= 3 * kBytes) {
    uint64_t sums[3] = {crc, 0, 0};
    for (size_t i = 0; i < kBytes; i += sizeof(__m256i)) {
      __m256i parts[3];
      for (size_t k = 0; k < 3; ++k) {
        parts[k] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + k * kBytes + i));
      }
      asm volatile("" : "+x"(parts[0]), "+x"(parts[1]), "+x"(parts[2]) : : "memory");
      for (size_t word = i; word < i + sizeof(__m256i); word += 8) {
        for (size_t k = 0; k < 3; ++k) {
          sums[k] = _mm_crc32_u64(sums[k], load64(data + k * kBytes + word));
        }
      }
      for (size_t k = 0; k < 3; ++k) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + k * kBytes + i), parts[k]);
      }
    }
    crc = shift(static_cast<uint32_t>(sums[0])) ^ static_cast<uint32_t>(sums[1]);
    crc = shift(crc) ^ static_cast<uint32_t>(sums[2]);
    target += 3 * kBytes;
    data += 3 * kBytes;
    size -= 3 * kBytes;
  }
  return crc;
}

__attribute__((target("sse4.2"))) uint32_t crc32c_sse42(const void* start, size_t size,
                                                        uint32_t seed) {
  const auto* data = static_cast<const uint8_t*>(start);
  uint32_t crc = ~seed;
  crc = run_interleaved<8192>(crc, data, size);
  crc = run_interleaved<256>(crc, data, size);
  uint64_t wide = crc;
  for (; size >= 8; data += 8, size -= 8) wide = _mm_crc32_u64(wide, load64(data));
  crc = static_cast<uint32_t>(wide);
  for (; size > 0; ++data, --size) crc = _mm_crc32_u8(crc, *data);
  return ~crc;
}

uint32_t crc32c_copy_avx2(uint8_t* target, const uint8_t* source, size_t size) {
  uint32_t crc = ~uint32_t{0};
  crc = copy_interleaved<5440>(crc, target, source, size);
  crc = copy_interleaved<1344>(crc, target, source, size);
  std::memcpy(target, source, size);
  return crc32c_sse42(target, size, ~crc);
}

#endif

using Crc32c = uint32_t (*)(const void*, size_t, uint32_t);

Crc32c pick() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) return crc32c_sse42;
#endif
  return crc32c_reference;
}

}  // namespace

uint32_t crc32c_reference(const void* start, size_t size, uint32_t seed) {
  const auto* data = static_cast<const uint8_t*>(start);
  uint32_t crc = ~seed;
  for (; size >= 8; data += 8, size -= 8) {  // slicing by eight
    const uint64_t word = load64(data) ^ crc;
    crc = 0;
    for (size_t k = 0; k < 8; ++k) crc ^= kSlices[7 - k][word >> (8 * k) & 0xff];
  }
  for (; size > 0; ++data, --size) crc = step_byte(crc, *data);
  return ~crc;
}

uint32_t crc32c(const void* data, size_t size, uint32_t seed) {
  static const Crc32c best = pick();
  return best(data, size, seed);
}

uint32_t crc32c_copy(void* target, const void* source, size_t size) {
#if defined(__x86_64__)
  static const bool is_fast = __builtin_cpu_supports("avx2");
  if (is_fast) {
    return crc32c_copy_avx2(static_cast<uint8_t*>(target), static_cast<const uint8_t*>(source),
                            size);
  }
#endif
  std::memcpy(target, source, size);
  return crc32c(target, size);
}

}  // namespace kvasir
