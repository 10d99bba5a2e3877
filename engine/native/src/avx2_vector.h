// The vector type of the AVX2 path (see vector_kernels.h), with FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kvasir {

// One definition per translation unit: each is compiled for another instruction set.
namespace {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  static constexpr int kWidth = 8;
  static constexpr int kRegisters = 16;
  static constexpr int kRows = 6;
  static constexpr int kColumns = 2;

  static F zero() { return _mm256_setzero_ps(); }
  static F broadcast(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load_bf16(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static F load_int8(const int8_t* p) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
  }
  static void load_pair(const uint16_t* p, F* even, F* odd) {
    const I both = _mm256_loadu_si256(reinterpret_cast<const I*>(p));
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(~0xFFFF)));
  }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F subtract(F a, F b) { return _mm256_sub_ps(a, b); }
  static F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
  static F divide(F a, F b) { return _mm256_div_ps(a, b); }
  // of the second operand's NaN both give that NaN
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F power_of_two(F n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  }
  static F zero_where_less(F value, F x, F limit) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), value);
  }

  static I zero_integers() { return _mm256_setzero_si256(); }
  static I broadcast_integer(int32_t x) { return _mm256_set1_epi32(x); }
  static I subtract_integers(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I add_integers(I a, I b) { return _mm256_add_epi32(a, b); }
  static I load_integers(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const I*>(p));
  }
  static void store_integers(int32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<I*>(p), x); }
  static F to_float(I x) { return _mm256_cvtepi32_ps(x); }
  static void store_halves(int16_t* p, F x) {
    const I integers = _mm256_cvtps_epi32(x);
    const I halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(integers, integers), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(halves));
  }
  static void store_codes(int8_t* p, F x) {
    const I integers = _mm256_cvtps_epi32(x);
    const I halves = _mm256_permute4x64_epi64(_mm256_packs_epi32(integers, integers), 0x08);
    const __m128i low = _mm256_castsi256_si128(halves);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(low, low));
  }
  static void pair_codes(const int8_t* a, const int8_t* b, I* words) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
    const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
    words[0] = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(x, y));
    words[1] = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(x, y));
  }
  static void unpair(I*, I*) {}  // they are in order
  static I dot_pairs(I sums, I words, I inputs) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(words, inputs));
  }
};

}  // namespace

}  // namespace kvasir
