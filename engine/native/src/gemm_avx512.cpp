// Products on the AVX-512 path: F, BW, DQ and VL only.
#include "avx512_vector.h"
#include "vector_gemm.h"
#include "vector_integer_gemm.h"

namespace kvasir {

namespace {

struct Avx512Wide : Avx512 {
  // Bytes as two registers of 16-bit numbers, since sums of byte products do not fit 16 bits.
  struct Wide {
    I even, odd;
  };
  using Codes = Wide;
  using Inputs = Wide;
  static constexpr int kIntegerRows = 4;
  static constexpr int kInt4Rows = 2;

  static Codes widen(I x) {
    return {_mm512_and_si512(x, _mm512_set1_epi16(0xFF)), _mm512_srli_epi16(x, 8)};
  }
  static Codes load_codes(const uint8_t* p) { return widen(_mm512_loadu_si512(p)); }
  static Codes low_codes(const uint8_t* p) { return widen(nibbles(_mm512_loadu_si512(p))); }
  static Codes high_codes(const uint8_t* p) {
    return widen(nibbles(_mm512_srli_epi16(_mm512_loadu_si512(p), 4)));
  }
  static Inputs broadcast_inputs(const uint8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    const I x = _mm512_set1_epi32(word);
    return {_mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), _mm512_srai_epi16(x, 8)};
  }
  static I dot(I sums, Codes codes, Inputs inputs) {
    const I even = _mm512_madd_epi16(codes.even, inputs.even);
    return _mm512_add_epi32(_mm512_add_epi32(sums, even), _mm512_madd_epi16(codes.odd, inputs.odd));
  }
};

}  // namespace

GemmKernel avx512_gemm(WeightFormat format) { return vec::gemm_of<Avx512Wide>(format); }

}  // namespace kvasir
