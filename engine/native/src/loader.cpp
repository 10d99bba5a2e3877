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

size_t matrix_bytes(int n, int k) { return packed_elements(n, k) * sizeof(uint16_t); }

size_t vector_bytes(int n) {
  return round_up(static_cast<size_t>(n) * sizeof(float), kCacheLineBytes);
}

}  // namespace

size_t packed_bytes(const ModelShape& s) {
  const int num_experts = s.num_experts == 0 ? 1 : s.num_experts;
  size_t layer =
      matrix_bytes(s.qkv_size(), s.hidden_size) + matrix_bytes(s.hidden_size, s.q_size());
  layer += num_experts * (2 * matrix_bytes(s.intermediate_size, s.hidden_size) +
                          matrix_bytes(s.hidden_size, s.intermediate_size));
  layer += matrix_bytes(s.num_experts, s.hidden_size);
  layer += 2 * vector_bytes(s.hidden_size) + 2 * vector_bytes(s.head_dim);
  layer += vector_bytes(s.qkv_size()) + vector_bytes(s.hidden_size);
  return s.num_layers * layer + vector_bytes(s.hidden_size) +
         matrix_bytes(s.vocab_size, s.hidden_size);
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

RowBlock Loader::rows(const std::string& name, int count, int columns) const {
  return {find(name, count, columns), count};
}

PackedMatrix Loader::matrix(const std::vector<RowBlock>& sources, int columns) {
  const PackedMatrix packed = pack(sources, columns, arena_, pool_);
  done_bytes_ += packed_elements(packed.n, packed.k) * sizeof(uint16_t);
  if (progress_) progress_(done_bytes_, arena_->bytes());
  return packed;
}

const float* Loader::stacked(const std::vector<std::string>& names, const std::vector<int>& sizes) {
  int total = 0;
  for (const int size : sizes) total += size;
  float* values = arena_->take<float>(total);
  float* next = values;
  for (size_t i = 0; i < names.size(); ++i) {
    const uint16_t* bits = find(names[i], sizes[i], 0);
    for (int j = 0; j < sizes[i]; ++j) *next++ = bf16_to_float(bits[j]);
  }
  return values;
}

Expert Loader::expert(const std::string& gate, const std::string& up, const std::string& down) {
  const int hidden = shape_.hidden_size, inner = shape_.intermediate_size;
  Expert expert;
  expert.gate = matrix({rows(gate + ".weight", inner, hidden)}, hidden);
  expert.up = matrix({rows(up + ".weight", inner, hidden)}, hidden);
  expert.down = matrix({rows(down + ".weight", hidden, inner)}, inner);
  return expert;
}

Layer Loader::layer(int index) {
  const int hidden = shape_.hidden_size;
  const std::string prefix = "model.layers." + std::to_string(index) + ".";
  const std::string q = prefix + "self_attn.q_proj", k = prefix + "self_attn.k_proj";
  const std::string v = prefix + "self_attn.v_proj", o = prefix + "self_attn.o_proj";
  const std::vector<int> sizes = {shape_.q_size(), shape_.kv_size(), shape_.kv_size()};
  Layer layer;
  layer.input_norm = vector(prefix + "input_layernorm.weight", hidden);
  layer.post_norm = vector(prefix + "post_attention_layernorm.weight", hidden);
  if (shape_.has_qk_norm) {
    layer.q_norm = vector(prefix + "self_attn.q_norm.weight", shape_.head_dim);
    layer.k_norm = vector(prefix + "self_attn.k_norm.weight", shape_.head_dim);
  }
  layer.qkv = matrix({rows(q + ".weight", sizes[0], hidden), rows(k + ".weight", sizes[1], hidden),
                      rows(v + ".weight", sizes[2], hidden)},
                     hidden);
  if (shape_.has_qkv_bias) layer.qkv.bias = stacked({q + ".bias", k + ".bias", v + ".bias"}, sizes);
  layer.output = matrix({rows(o + ".weight", hidden, sizes[0])}, sizes[0]);
  if (shape_.has_output_bias) layer.output.bias = vector(o + ".bias", hidden);
  if (shape_.num_experts == 0) {
    layer.experts.push_back(
        expert(prefix + "mlp.gate_proj", prefix + "mlp.up_proj", prefix + "mlp.down_proj"));
    return layer;
  }
  const std::string moe = prefix + "block_sparse_moe.";
  layer.router = matrix({rows(moe + "gate.weight", shape_.num_experts, hidden)}, hidden);
  for (int i = 0; i < shape_.num_experts; ++i) {
    const std::string name = moe + "experts." + std::to_string(i) + ".w";
    layer.experts.push_back(expert(name + "1", name + "3", name + "2"));
  }
  return layer;
}

PackedMatrix Loader::head() {
  const char* name = shape_.has_tied_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
  return matrix({rows(name, shape_.vocab_size, shape_.hidden_size)}, shape_.hidden_size);
}

const uint16_t* Loader::embeddings() {
  if (shape_.has_tied_embeddings) return nullptr;
  return find("model.embed_tokens.weight", shape_.vocab_size, shape_.hidden_size);
}

}  // namespace kvasir
