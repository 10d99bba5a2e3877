// Products of bf16 with bf16 by AVX-512 BF16.
#include "avx512_vector.h"
#include "bf16_pairs_gemm.h"
#include "vector_exercise.h"

namespace kvasir {

namespace {

struct Avx512Bf16 : Avx512 {
  using Codes = I;
  using Inputs = I;

  static Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Inputs broadcast_inputs(const uint8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return _mm512_set1_epi32(word);
  }
  static F dot(F sums, Codes codes, Inputs inputs) {
    // Not the intrinsic: with it gcc 12 keeps the sums of a tile in memory.
    asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(inputs));
    return sums;
  }
};

}  // namespace

GemmKernel avx512bf16_gemm() {
  return {bf16_row_bytes, prepare_bf16_row, vec::multiply_pairs<Avx512Bf16>,
          vec::exercise_pairs<Avx512Bf16>};
}

}  // namespace kvasir
