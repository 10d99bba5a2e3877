// Products of bf16 matrices with float32 sums.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace kvasir::cuda {

class Gemm {
 public:
  explicit Gemm(cudaStream_t stream);  // throws std::runtime_error if cuBLAS cannot be had
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  // c[rows][n] = a[rows][k] w[n][k]^T (+ c), row-major; rows in whole tiles, which a and c have
  // room for.
  void multiply(const uint16_t* a, const uint16_t* w, int rows, int n, int k, bool adds, float* c);

 private:
  struct Library;
  Library* library_;
};

}  // namespace kvasir::cuda
