// The vector type of the AVX-512 paths (see vector_kernels.h): F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kvasir {

// One definition per translation unit: each is compiled for another instruction set.
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  static constexpr int kWidth = 16;
  static constexpr int kRegisters = 32;
  static constexpr int kRows = 12;
  static constexpr int kColumns = 2;

  static F zero() { return _mm512_setzero_ps(); }
  static F broadcast(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static F load_int8(const int8_t* p) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
  }
  static void load_pair(const uint16_t* p, F* even, F* odd) {
    const I both = _mm512_loadu_si512(p);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(~0xFFFF)));
  }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // The same of a number in memory, without an instruction of its own for the broadcast.
  static F fma_at(const float* a, F b, F c) {
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
    return c;
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
  static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
  static F divide(F a, F b) { return _mm512_div_ps(a, b); }
  // of the second operand's NaN both give that NaN
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F round(F x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static F power_of_two(F n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
  }
  static F zero_where_less(F value, F x, F limit) {
    return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), zero());
  }

  static I zero_integers() { return _mm512_setzero_si512(); }
  static I broadcast_integer(int32_t x) { return _mm512_set1_epi32(x); }
  static I subtract_integers(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I add_integers(I a, I b) { return _mm512_add_epi32(a, b); }
  static I load_integers(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store_integers(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static void store_halves(int16_t* p, F x) {
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
  }
  static void store_codes(int8_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
  }
  static void pair_codes(const int8_t* a, const int8_t* b, I* words) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
    const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
    words[0] = _mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(x, y));
    words[1] = _mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(x, y));
  }
  static void unpair(I* low, I* high) {
    const I first = _mm512_shuffle_i64x2(*low, *high, 0x44);
    *high = _mm512_shuffle_i64x2(*low, *high, 0xEE);
    *low = first;
  }
  static I dot_pairs(I sums, I words, I inputs) {
    return _mm512_add_epi32(sums, _mm512_madd_epi16(words, inputs));
  }
  static I nibbles(I x) { return _mm512_and_si512(x, _mm512_set1_epi8(0xF)); }
};

}  // namespace

}  // namespace kvasir
