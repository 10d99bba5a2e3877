// Which tensors a model is made of, and how they are stacked: one table for all devices.
#pragma once

#include <string>
#include <vector>

#include "shape.h"

namespace kvasir {

inline constexpr const char* kEmbeddings = "model.embed_tokens.weight";

// Rows of one tensor within a matrix or a vector, in groups that are stretched.
struct TensorRows {
  std::string name;
  int rows;
  Groups groups = {};
};

// What matrices multiply, where a norm or a matrix of the model makes it.
enum class Signal { kOther, kAttentionInput, kFeedForwardInput, kHidden, kHeadInput };

enum class MatrixRole { kQkv, kOutput, kRouter, kGate, kUp, kDown, kHead };

constexpr Signal input_of(MatrixRole role) {
  switch (role) {
    case MatrixRole::kQkv:
      return Signal::kAttentionInput;
    case MatrixRole::kRouter:
    case MatrixRole::kGate:
    case MatrixRole::kUp:
      return Signal::kFeedForwardInput;
    case MatrixRole::kDown:
      return Signal::kHidden;
    case MatrixRole::kHead:
      return Signal::kHeadInput;
    case MatrixRole::kOutput:
      break;
  }
  return Signal::kOther;
}

template <class Matrix>
struct ExpertOf {
  Matrix gate, up, down;
};

// Norms that a model does not have stay as they are made.
template <class Matrix, class Vector>
struct LayerOf {
  Vector attention_norm{}, feed_forward_norm{};
  Vector post_attention_norm{}, post_feed_forward_norm{};
  Vector q_norm{}, k_norm{};
  Matrix qkv, output;
  Matrix router;                          // n == 0: dense
  std::vector<ExpertOf<Matrix>> experts;  // one if dense
};

// Builder: the types Matrix (with a member `bias`, a Vector) and Vector, and
//   Matrix matrix(const std::vector<TensorRows>& sources, int num_columns, Groups columns,
//                 MatrixRole role);  the sources' rows, one below the other
//   Vector norm(const std::string& name, int size, Signal made);
//   Vector biases(const std::vector<TensorRows>& sources);
// It is asked in the same order for every model of a shape.
template <class Builder>
class WeightTable {
 public:
  using Matrix = typename Builder::Matrix;
  using Vector = typename Builder::Vector;
  using Layer = LayerOf<Matrix, Vector>;
  using Expert = ExpertOf<Matrix>;

  WeightTable(const ModelShape& shape, Builder* builder) : shape_(shape), builder_(*builder) {}

  Layer layer(int index) {
    const std::string prefix = "model.layers." + std::to_string(index) + ".";
    Layer layer;
    load_norms(prefix, &layer);
    load_attention(prefix + "self_attn.", &layer);
    if (!shape_.layers[index].is_sparse) {
      layer.experts.push_back(expert(prefix + "mlp.", shape_.intermediate_size));
      return layer;
    }
    const TensorRows router = {prefix + "mlp.gate.weight", shape_.num_experts};
    layer.router = builder_.matrix({router}, shape_.hidden_size, {}, MatrixRole::kRouter);
    for (int i = 0; i < shape_.num_experts; ++i) {
      const std::string name = prefix + "mlp.experts." + std::to_string(i) + ".";
      layer.experts.push_back(expert(name, shape_.expert_size));
    }
    return layer;
  }
  Vector final_norm() {
    return builder_.norm("model.norm.weight", shape_.hidden_size, Signal::kHeadInput);
  }
  Matrix head() {
    const char* name = shape_.has_tied_embeddings ? kEmbeddings : "lm_head.weight";
    return builder_.matrix({{name, shape_.vocab_size}}, shape_.hidden_size, {}, MatrixRole::kHead);
  }

 private:
  Expert expert(const std::string& prefix, int inner) {
    const int hidden = shape_.hidden_size;
    Expert expert;
    const auto projection = [&](const char* name, int rows, int columns, MatrixRole role) {
      return builder_.matrix({{prefix + name, rows}}, columns, {}, role);
    };
    expert.gate = projection("gate_proj.weight", inner, hidden, MatrixRole::kGate);
    expert.up = projection("up_proj.weight", inner, hidden, MatrixRole::kUp);
    expert.down = projection("down_proj.weight", hidden, inner, MatrixRole::kDown);
    return expert;
  }

  void load_norms(const std::string& prefix, Layer* layer) {
    const auto norm = [&](const char* name, Signal made) {
      return builder_.norm(prefix + name + ".weight", shape_.hidden_size, made);
    };
    layer->attention_norm = norm("input_layernorm", Signal::kAttentionInput);
    if (!shape_.has_post_norms) {  // what it comes after is the sum
      layer->feed_forward_norm = norm("post_attention_layernorm", Signal::kFeedForwardInput);
      return;
    }
    layer->post_attention_norm = norm("post_attention_layernorm", Signal::kOther);
    layer->feed_forward_norm = norm("pre_feedforward_layernorm", Signal::kFeedForwardInput);
    layer->post_feed_forward_norm = norm("post_feedforward_layernorm", Signal::kOther);
  }

  void load_attention(const std::string& prefix, Layer* layer) {
    const int hidden = shape_.hidden_size;
    const Groups heads = {shape_.head_dim, shape_.head_width()};
    const int q_rows = shape_.num_heads * shape_.head_dim;
    const int kv_rows = shape_.num_kv_heads * shape_.head_dim;
    const auto sources = [&](const std::string& what) {
      return std::vector<TensorRows>{{prefix + "q_proj." + what, q_rows, heads},
                                     {prefix + "k_proj." + what, kv_rows, heads},
                                     {prefix + "v_proj." + what, kv_rows, heads}};
    };
    if (shape_.has_qk_norm) {
      layer->q_norm = builder_.norm(prefix + "q_norm.weight", shape_.head_dim, Signal::kOther);
      layer->k_norm = builder_.norm(prefix + "k_norm.weight", shape_.head_dim, Signal::kOther);
    }
    layer->qkv = builder_.matrix(sources("weight"), hidden, {}, MatrixRole::kQkv);
    if (shape_.has_qkv_bias) layer->qkv.bias = builder_.biases(sources("bias"));
    layer->output =
        builder_.matrix({{prefix + "o_proj.weight", hidden}}, q_rows, heads, MatrixRole::kOutput);
    if (shape_.has_output_bias) {
      layer->output.bias = builder_.biases({{prefix + "o_proj.bias", hidden}});
    }
  }

  const ModelShape& shape_;
  Builder& builder_;
};

}  // namespace kvasir
