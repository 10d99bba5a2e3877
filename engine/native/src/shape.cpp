#include "shape.h"

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace kvasir {

namespace {

void require(bool condition, const std::string& text) {
  if (!condition) throw std::invalid_argument("model shape: " + text);
}

void require_multiple(int value, const char* name) {
  require(value > 0 && value % kRowAlign == 0, std::string(name) + " is " + std::to_string(value) +
                                                   "; it must be a positive multiple of " +
                                                   std::to_string(kRowAlign));
}

}  // namespace

void ModelShape::check() const {
  require(num_layers > 0, "num_layers must be positive");
  require(vocab_size > 0, "vocab_size must be positive");
  require_multiple(hidden_size, "hidden_size");
  require_multiple(head_dim, "head_dim");
  require_multiple(intermediate_size, "intermediate_size");
  require(num_kv_heads > 0 && num_heads > 0 && num_heads % num_kv_heads == 0,
          "num_heads must be a positive multiple of num_kv_heads");
  require(group() <= 64, "more than 64 query heads share one KV head");
  require(rms_norm_eps > 0, "rms_norm_eps must be positive");
  require(static_cast<int>(inverse_frequencies.size()) == head_dim / 2,
          "inverse_frequencies must hold head_dim / 2 values");
  require(num_experts >= 0 && num_experts_per_token >= 0, "expert counts must not be negative");
  require(num_experts_per_token <= num_experts, "more experts per token than experts");
  require(num_experts == 0 || num_experts_per_token > 0, "num_experts_per_token must be positive");
}

}  // namespace kvasir
