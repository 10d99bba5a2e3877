#include "shape.h"

#include <stdexcept>
#include <string>

namespace kvasir {

namespace {

void require(bool condition, const std::string& text) {
  if (!condition) throw std::invalid_argument("model shape: " + text);
}

void check_layers(const ModelShape& shape) {
  require(static_cast<int>(shape.layers.size()) == shape.num_layers,
          "layers must hold one entry per layer");
  for (const LayerShape& layer : shape.layers) {
    require(layer.window >= 0, "a window must not be negative");
    require(layer.rope >= 0 && layer.rope < static_cast<int>(shape.ropes.size()),
            "a layer names a rotary embedding that does not exist");
    require(!layer.is_sparse || (shape.num_experts > 0 && shape.expert_size > 0),
            "a sparse layer needs experts");
    require(!layer.is_sparse || !shape.has_post_norms, "a sparse layer has no post norms");
  }
}

void check_ropes(const ModelShape& shape) {
  require(!shape.ropes.empty(), "ropes must not be empty");
  for (const Rope& rope : shape.ropes) {
    require(static_cast<int>(rope.inverse_frequencies.size()) == shape.rope_pairs(),
            "ropes must have equally many pairs");
  }
  require(shape.rope_pairs() > 0 && shape.rope_pairs() <= shape.head_dim / 2,
          "ropes must rotate 1 to head_dim / 2 pairs");
}

}  // namespace

void ModelShape::check() const {
  require(num_layers > 0, "num_layers must be positive");
  require(vocab_size > 0, "vocab_size must be positive");
  require(hidden_size > 0, "hidden_size must be positive");
  require(head_dim > 0, "head_dim must be positive");
  require(intermediate_size > 0, "intermediate_size must be positive");
  require(num_kv_heads > 0 && num_heads > 0 && num_heads % num_kv_heads == 0,
          "num_heads must be a positive multiple of num_kv_heads");
  require(group() <= 64, "more than 64 query heads share one KV head");
  require(rms_norm_eps > 0, "rms_norm_eps must be positive");
  require(query_scale > 0, "query_scale must be positive");
  require(score_cap >= 0 && logit_cap >= 0, "caps must not be negative");
  require(num_experts >= 0 && num_experts_per_token >= 0, "expert counts must not be negative");
  require(num_experts_per_token <= num_experts, "more experts per token than experts");
  require(num_experts == 0 || num_experts_per_token > 0, "num_experts_per_token must be positive");
  check_ropes(*this);
  check_layers(*this);
}

}  // namespace kvasir
