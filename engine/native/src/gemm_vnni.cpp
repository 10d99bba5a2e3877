// Products with integers by AVX-512 VNNI: of int8 activations with int8 and int4 weights, and of
// int8 KV.
#include "avx512_vector.h"
#include "vector_attention.h"
#include "vector_integer_gemm.h"

namespace kvasir {

namespace {

struct Avx512Vnni : Avx512 {
  using Codes = I;
  using Inputs = I;
  static constexpr int kIntegerRows = 12;
  static constexpr int kInt4Rows = 6;

  static Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Codes low_codes(const uint8_t* p) { return nibbles(_mm512_loadu_si512(p)); }
  static Codes high_codes(const uint8_t* p) {
    return nibbles(_mm512_srli_epi16(_mm512_loadu_si512(p), 4));
  }
  static Inputs broadcast_inputs(const uint8_t* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return _mm512_set1_epi32(word);
  }
  static I dot(I sums, Codes codes, Inputs inputs) {
    // Not the intrinsic: with it gcc 12 keeps the sums of a tile in memory.
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(inputs));
    return sums;
  }
  // The same of 4 activations in memory.
  static I dot_at(I sums, Codes codes, const uint8_t* p) {
    using Word = int32_t __attribute__((may_alias));
    asm("vpdpbusd %2%{1to16%}, %1, %0"
        : "+v"(sums)
        : "v"(codes), "m"(*reinterpret_cast<const Word*>(p)));
    return sums;
  }
  static I dot_pairs(I sums, I words, I inputs) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(words), "v"(inputs));
    return sums;
  }
};

}  // namespace

KvKernels vnni_int8_kv() { return vec::int8_kv<Avx512Vnni>(); }

GemmKernel vnni_gemm(WeightFormat format) {
  GemmKernel kernel = vec::integer_gemm_of<Avx512Vnni>(format);
  if (format == WeightFormat::kInt8) kernel.interleave = vec::interleave_words<4>;
  return kernel;
}

}  // namespace kvasir
