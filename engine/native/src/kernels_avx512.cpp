// The AVX-512 path apart from products: F, BW, DQ and VL only.
#include "avx512_vector.h"
#include "vector_attention.h"

namespace kvasir {

const Kernels& avx512_kernels() {
  static const Kernels table = vec::table_of<Avx512>("avx512", avx512_gemm);
  return table;
}

}  // namespace kvasir
