// Products on the processor, for the emulation.
#include "bf16.h"
#include "gemm.h"

namespace kvasir::cuda {

struct Gemm::Library {};

Gemm::Gemm(cudaStream_t) : library_(nullptr) {}
Gemm::~Gemm() = default;

void Gemm::multiply(const uint16_t* a, const uint16_t* w, int rows, int n, int k, bool adds,
                    float* c) {
  const int padded = (rows + kTileRows - 1) / kTileRows * kTileRows;
  std::vector<float> wide(static_cast<size_t>(padded) * k);
  for (size_t i = 0; i < wide.size(); ++i) wide[i] = bf16_to_float(a[i]);
  std::vector<float> column(k);
  for (int j = 0; j < n; ++j) {
    for (int i = 0; i < k; ++i) column[i] = bf16_to_float(w[static_cast<size_t>(j) * k + i]);
    for (int row = 0; row < padded; ++row) {
      float sum = 0;
      for (int i = 0; i < k; ++i) sum += wide[static_cast<size_t>(row) * k + i] * column[i];
      float* target = c + static_cast<size_t>(row) * n + j;
      *target = adds ? *target + sum : sum;
    }
  }
}

}  // namespace kvasir::cuda
