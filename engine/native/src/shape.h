// What a model's forward pass depends on besides its weights.
#pragma once

#include <cstddef>
#include <vector>

#include "arena.h"
#include "kernels.h"

namespace kvasir {

// Groups of `size` source elements, each to be followed by zeros up to `width`: heads as they lie
// in whole vectors.
struct Groups {
  int size = 1;
  int width = 1;

  int stretched(int count) const { return count / size * width; }
  int place(int index) const { return index / size * width + index % size; }
};

enum class Activation { kSilu, kGeluTanh };

// A rotary embedding: the angle of pair i at position p is p * inverse_frequencies[i].
struct Rope {
  std::vector<float> inverse_frequencies;  // radians per position; pairs beyond stay unrotated
  float scale = 1;                         // multiplies cos and sin
};

// What may differ from layer to layer.
struct LayerShape {
  int window = 0;          // a token sees itself and window - 1 before it; 0: all before it
  int rope = 0;            // which of the model's rotary embeddings
  bool is_sparse = false;  // a mixture of experts
};

struct ModelShape {
  int num_layers = 0;
  int hidden_size = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int intermediate_size = 0;
  int vocab_size = 0;
  int num_experts = 0;
  int num_experts_per_token = 0;
  int expert_size = 0;  // feed-forward size of one expert
  float rms_norm_eps = 0;
  float norm_offset = 0;      // added to every norm's weights
  float embedding_scale = 1;  // multiplies embeddings
  float query_scale = 0;      // multiplies scores
  float score_cap = 0;        // scores become cap * tanh(score / cap); 0: they stay
  float logit_cap = 0;        // the same of logits
  Activation activation = Activation::kSilu;
  bool has_tied_embeddings = false;
  bool has_qkv_bias = false;
  bool has_output_bias = false;
  bool has_qk_norm = false;
  bool has_post_norms = false;      // norms of what attention and feed-forward add to the stream
  bool has_scaled_experts = false;  // the chosen experts' weights sum to 1
  std::vector<Rope> ropes;          // all of the same number of pairs
  std::vector<LayerShape> layers;   // [num_layers]

  // A head fills whole vector registers; what lies beyond head_dim is zero.
  int head_width() const { return static_cast<int>(round_up(head_dim, kRowAlign)); }
  int q_size() const { return num_heads * head_width(); }
  int kv_size() const { return num_kv_heads * head_width(); }
  int qkv_size() const { return q_size() + 2 * kv_size(); }
  int group() const { return num_heads / num_kv_heads; }
  int rope_pairs() const { return static_cast<int>(ropes[0].inverse_frequencies.size()); }

  // Throws std::invalid_argument that names the offending field.
  void check() const;
};

// Cosines and sines of one position, [ropes][rope_pairs] each.
void fill_rope_row(const ModelShape& shape, int position, float* cos, float* sin);

}  // namespace kvasir
