// A model's weights on the device.
#pragma once

#include "device.h"
#include "memory.h"

namespace kvasir::cuda {

struct Matrix {
  Buffer<uint16_t> values;  // [n][k]
  Buffer<float> bias;       // [n], or empty
  int n = 0;
  int k = 0;
};

struct Expert {
  Matrix gate, up, down;
};

struct LayerWeights {
  Buffer<float> attention_norm, feed_forward_norm;
  Buffer<float> post_attention_norm, post_feed_forward_norm, q_norm, k_norm;  // empty: none
  Matrix qkv, output;
  Matrix router;                // n == 0: dense
  std::vector<Expert> experts;  // one if dense
};

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
