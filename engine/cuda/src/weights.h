// A model's weights on the device.
#pragma once

#include "device.h"
#include "memory.h"
#include "weight_table.h"

namespace kvasir::cuda {

struct Matrix {
  Buffer<uint16_t> values;  // [n][k]
  Buffer<float> bias;       // [n], or empty
  int n = 0;
  int k = 0;
};

using Expert = ExpertOf<Matrix>;
using LayerWeights = LayerOf<Matrix, Buffer<float>>;  // norms empty: none

struct Weights {
  std::vector<LayerWeights> layers;
  Buffer<float> final_norm;
  Matrix head;
  Buffer<uint16_t> embeddings;  // empty: tied to head
  size_t bytes = 0;
};

// Throws std::invalid_argument for missing tensors and wrong shapes.
Weights upload(const ModelShape& shape, const TensorMap& tensors, const Progress& progress,
               cudaStream_t stream);

}  // namespace kvasir::cuda
