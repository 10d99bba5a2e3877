// What a model's forward pass depends on besides its weights.
#pragma once

#include <cstddef>
#include <vector>

namespace kvasir {

struct ModelShape {
  int num_layers = 0;
  int hidden_size = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int intermediate_size = 0;
  int vocab_size = 0;
  int num_experts = 0;  // 0: dense
  int num_experts_per_token = 0;
  float rms_norm_eps = 0;
  bool has_tied_embeddings = false;
  bool has_qkv_bias = false;
  bool has_output_bias = false;
  bool has_qk_norm = false;
  std::vector<float> inverse_frequencies;  // [head_dim / 2], radians per position
  float rope_scale = 1;                    // multiplies cos and sin

  int q_size() const { return num_heads * head_dim; }
  int kv_size() const { return num_kv_heads * head_dim; }
  int qkv_size() const { return q_size() + 2 * kv_size(); }
  int group() const { return num_heads / num_kv_heads; }

  // Throws std::invalid_argument that names the offending field.
  void check() const;
};

// Cosines and sines of consecutive table rows, [rows][head_dim / 2] each.
void fill_rope_row(const ModelShape& shape, int position, float* cos, float* sin);

}  // namespace kvasir
