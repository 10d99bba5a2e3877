// Products on the AVX2 path.
#include "avx2_vector.h"
#include "vector_gemm.h"
#include "vector_integer_gemm.h"

namespace kvasir {

namespace {

struct Avx2Wide : Avx2 {
  // Bytes as two registers of 16-bit numbers, since sums of byte products do not fit 16 bits.
  struct Wide {
    I even, odd;
  };
  using Codes = Wide;
  using Inputs = Wide;
  static constexpr int kIntegerRows = 3;
  static constexpr int kInt4Rows = 2;

  static Codes widen(I x) {
    return {_mm256_and_si256(x, _mm256_set1_epi16(0xFF)), _mm256_srli_epi16(x, 8)};
  }
  static Codes load_codes(const uint8_t* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const I*>(p)));
  }
  static I nibbles(I x) { return _mm256_and_si256(x, _mm256_set1_epi8(0xF)); }
  static Codes low_codes(const uint8_t* p) {
    return widen(nibbles(_mm256_loadu_si256(reinterpret_cast<const I*>(p))));
  }
  static Codes high_codes(const uint8_t* p) {
    return widen(nibbles(_mm256_srli_epi16(_mm256_loadu_si256(reinterpret_cast<const I*>(p)), 4)));
  }
  static Inputs broadcast_inputs(const uint8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    const I x = _mm256_set1_epi32(word);
    return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
  }
  static I dot(I sums, Codes codes, Inputs inputs) {
    const I even = _mm256_madd_epi16(codes.even, inputs.even);
    return _mm256_add_epi32(_mm256_add_epi32(sums, even), _mm256_madd_epi16(codes.odd, inputs.odd));
  }
};

}  // namespace

GemmKernel avx2_gemm(WeightFormat format) { return vec::gemm_of<Avx2Wide>(format); }

}  // namespace kvasir
