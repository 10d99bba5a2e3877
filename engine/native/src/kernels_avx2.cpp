// The AVX2 path apart from products: the same arithmetic as the AVX-512 path in half-width
// registers.
#include "avx2_vector.h"
#include "vector_attention.h"

namespace kvasir {

const Kernels& avx2_kernels() {
  static const Kernels table = vec::table_of<Avx2>("avx2", avx2_gemm);
  return table;
}

}  // namespace kvasir
