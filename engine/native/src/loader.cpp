#include "loader.h"

#include <stdexcept>

#include "bf16.h"

namespace kvasir {

namespace {

std::string dims_text(const std::vector<size_t>& dims) {
  std::string text = "[";
  for (const size_t dim : dims) text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
  return text + "]";
}

// The head decides about every token: with int4 weights it stays at int8. Routers are small.
WeightFormat head_format(WeightFormat format) {
  return format == WeightFormat::kInt4 ? WeightFormat::kInt8 : format;
}
constexpr WeightFormat kRouterFormat = WeightFormat::kBf16;

size_t vector_bytes(int n) {
  return round_up(static_cast<size_t>(n) * sizeof(float), kCacheLineBytes);
}

}  // namespace

size_t packed_bytes(const ModelShape& s, WeightFormat format) {
  const auto gated = [&](int inner) {
    return 2 * matrix_bytes(format, inner, s.hidden_size) +
           matrix_bytes(format, s.hidden_size, inner);
  };
  const size_t router = matrix_bytes(kRouterFormat, s.num_experts, s.hidden_size);
  size_t total = vector_bytes(s.hidden_size);
  total += matrix_bytes(head_format(format), s.vocab_size, s.hidden_size);
  for (const LayerShape& layer : s.layers) {
    total += matrix_bytes(format, s.qkv_size(), s.hidden_size);
    total += matrix_bytes(format, s.hidden_size, s.q_size());
    total += layer.is_sparse ? router + s.num_experts * gated(s.expert_size)
                             : gated(s.intermediate_size);
    total += 4 * vector_bytes(s.hidden_size) + 2 * vector_bytes(s.head_dim);
    total += vector_bytes(s.qkv_size()) + vector_bytes(s.hidden_size);
  }
  return total;
}

const uint16_t* Loader::find(const std::string& name, size_t rows, size_t columns) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw std::invalid_argument("weights lack the tensor " + name);
  const std::vector<size_t> wanted =
      columns == 0 ? std::vector<size_t>{rows} : std::vector<size_t>{rows, columns};
  if (found->second.dims != wanted) {
    throw std::invalid_argument("tensor " + name + " has shape " + dims_text(found->second.dims) +
                                " where config.json implies " + dims_text(wanted));
  }
  return found->second.data;
}

RowBlock Loader::rows(const std::string& name, int count, int columns, Groups groups) const {
  return {find(name, count, columns), count, groups};
}

PackedMatrix Loader::matrix(const std::vector<RowBlock>& sources, int num_columns,
                            WeightFormat format, Groups columns) {
  const PackedMatrix packed = place(sources, num_columns, columns, format, arena_);
  if (is_filled_) return packed;
  pack(sources, num_columns, columns, packed, pool_);
  done_bytes_ += matrix_bytes(format, packed.n, packed.k);
  if (progress_) progress_(done_bytes_, arena_->bytes());
  return packed;
}

const float* Loader::norm(const std::string& name, int size) {
  const uint16_t* bits = find(name + ".weight", size, 0);
  float* values = arena_->take<float>(size);
  if (is_filled_) return values;
  for (int i = 0; i < size; ++i) values[i] = shape_.norm_offset + bf16_to_float(bits[i]);
  return values;
}

const float* Loader::biases(const std::vector<std::string>& names, const std::vector<int>& sizes,
                            Groups groups) {
  int total = 0;
  for (const int size : sizes) total += groups.stretched(size);
  float* values = arena_->take<float>(total);  // zeros
  if (is_filled_) return values;
  float* next = values;
  for (size_t i = 0; i < names.size(); ++i) {
    const uint16_t* bits = find(names[i] + ".bias", sizes[i], 0);
    for (int j = 0; j < sizes[i]; ++j) {
      next[j / groups.size * groups.width + j % groups.size] = bf16_to_float(bits[j]);
    }
    next += groups.stretched(sizes[i]);
  }
  return values;
}

Expert Loader::expert(const std::string& prefix, int inner) {
  const int hidden = shape_.hidden_size;
  Expert expert;
  expert.gate = matrix({rows(prefix + "gate_proj.weight", inner, hidden)}, hidden, format_);
  expert.up = matrix({rows(prefix + "up_proj.weight", inner, hidden)}, hidden, format_);
  expert.down = matrix({rows(prefix + "down_proj.weight", hidden, inner)}, inner, format_);
  return expert;
}

void Loader::load_norms(const std::string& prefix, Layer* layer) {
  const int hidden = shape_.hidden_size;
  layer->attention_norm = norm(prefix + "input_layernorm", hidden);
  const float* after = norm(prefix + "post_attention_layernorm", hidden);
  if (!shape_.has_post_norms) {  // what it comes after is the sum
    layer->feed_forward_norm = after;
    return;
  }
  layer->post_attention_norm = after;
  layer->feed_forward_norm = norm(prefix + "pre_feedforward_layernorm", hidden);
  layer->post_feed_forward_norm = norm(prefix + "post_feedforward_layernorm", hidden);
}

void Loader::load_attention(const std::string& prefix, Layer* layer) {
  const int hidden = shape_.hidden_size;
  const int q_rows = shape_.num_heads * shape_.head_dim;
  const int kv_rows = shape_.num_kv_heads * shape_.head_dim;
  const std::string q = prefix + "q_proj", k = prefix + "k_proj";
  const std::string v = prefix + "v_proj", o = prefix + "o_proj";
  if (shape_.has_qk_norm) {
    layer->q_norm = norm(prefix + "q_norm", shape_.head_dim);
    layer->k_norm = norm(prefix + "k_norm", shape_.head_dim);
  }
  layer->qkv = matrix(
      {rows(q + ".weight", q_rows, hidden, heads()), rows(k + ".weight", kv_rows, hidden, heads()),
       rows(v + ".weight", kv_rows, hidden, heads())},
      hidden, format_);
  if (shape_.has_qkv_bias) {
    layer->qkv.bias = biases({q, k, v}, {q_rows, kv_rows, kv_rows}, heads());
  }
  layer->output = matrix({rows(o + ".weight", hidden, q_rows)}, q_rows, format_, heads());
  if (shape_.has_output_bias) layer->output.bias = biases({o}, {hidden}, {});
}

Layer Loader::layer(int index) {
  const int hidden = shape_.hidden_size;
  const std::string prefix = "model.layers." + std::to_string(index) + ".";
  Layer layer;
  load_norms(prefix, &layer);
  load_attention(prefix + "self_attn.", &layer);
  if (!shape_.layers[index].is_sparse) {
    layer.experts.push_back(expert(prefix + "mlp.", shape_.intermediate_size));
    return layer;
  }
  layer.router =
      matrix({rows(prefix + "mlp.gate.weight", shape_.num_experts, hidden)}, hidden, kRouterFormat);
  for (int i = 0; i < shape_.num_experts; ++i) {
    const std::string name = prefix + "mlp.experts." + std::to_string(i) + ".";
    layer.experts.push_back(expert(name, shape_.expert_size));
  }
  return layer;
}

PackedMatrix Loader::head() {
  const char* name = shape_.has_tied_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
  return matrix({rows(name, shape_.vocab_size, shape_.hidden_size)}, shape_.hidden_size,
                head_format(format_));
}

const uint16_t* Loader::embeddings() {
  if (shape_.has_tied_embeddings && format_ == WeightFormat::kBf16) return nullptr;
  return find("model.embed_tokens.weight", shape_.vocab_size, shape_.hidden_size);
}

}  // namespace kvasir
