#include "weights.h"

#include <stdexcept>

#include "bf16.h"

namespace kvasir::cuda {

namespace {

// Heads as they lie on the device: head_dim values, then zeros up to the width.
struct Groups {
  int size = 1;
  int width = 1;

  int stretched(int count) const { return count / size * width; }
  int place(int index) const { return index / size * width + index % size; }
};

struct Source {
  std::string name;
  int rows;
  Groups groups;
};

class Uploader {
 public:
  Uploader(const ModelShape& shape, const TensorMap& tensors, const Progress& progress,
           cudaStream_t stream)
      : shape_(shape), tensors_(tensors), progress_(progress), stream_(stream) {
    for (const auto& [name, tensor] : tensors) {
      size_t count = 1;
      for (const size_t dim : tensor.dims) count *= dim;
      total_bytes_ += count * sizeof(uint16_t);
    }
  }

  Weights all() {
    for (int i = 0; i < shape_.num_layers; ++i) weights_.layers.push_back(layer(i));
    weights_.final_norm = norm("model.norm", shape_.hidden_size);
    const bool is_tied = shape_.has_tied_embeddings;
    const char* head = is_tied ? "model.embed_tokens.weight" : "lm_head.weight";
    weights_.head = matrix({{head, shape_.vocab_size, {}}}, shape_.hidden_size, {});
    if (!is_tied) {
      const size_t count = static_cast<size_t>(shape_.vocab_size) * shape_.hidden_size;
      weights_.embeddings = Buffer<uint16_t>(count);
      weights_.embeddings.upload(
          find("model.embed_tokens.weight", shape_.vocab_size, shape_.hidden_size), count, stream_);
      weights_.bytes += weights_.embeddings.bytes();
    }
    check(cudaStreamSynchronize(stream_), "copying weights to the device");
    return std::move(weights_);
  }

 private:
  const uint16_t* find(const std::string& name, size_t rows, size_t columns) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) throw std::invalid_argument("weights lack the tensor " + name);
    const std::vector<size_t> wanted =
        columns == 0 ? std::vector<size_t>{rows} : std::vector<size_t>{rows, columns};
    if (found->second.dims != wanted) {
      throw std::invalid_argument("tensor " + name + " does not have the shape of the config.json");
    }
    return found->second.data;
  }

  Matrix matrix(const std::vector<Source>& sources, int num_columns, Groups columns) {
    Matrix made;
    made.k = columns.stretched(num_columns);
    for (const Source& source : sources) made.n += source.groups.stretched(source.rows);
    std::vector<uint16_t> host(static_cast<size_t>(made.n) * made.k);
    size_t first = 0;
    for (const Source& source : sources) {
      const uint16_t* data = find(source.name, source.rows, num_columns);
      for (int row = 0; row < source.rows; ++row) {
        uint16_t* target = &host[(first + source.groups.place(row)) * made.k];
        const uint16_t* from = data + static_cast<size_t>(row) * num_columns;
        for (int i = 0; i < num_columns; ++i) target[columns.place(i)] = from[i];
      }
      first += source.groups.stretched(source.rows);
    }
    made.values.upload(host, stream_);
    check(cudaStreamSynchronize(stream_), "copying weights to the device");  // `host` goes
    weights_.bytes += made.values.bytes();
    if (progress_) progress_(weights_.bytes, std::max(total_bytes_, weights_.bytes));
    return made;
  }

  Buffer<float> floats(const std::vector<float>& values) {
    Buffer<float> made(values.size());
    made.upload(values, stream_);
    check(cudaStreamSynchronize(stream_), "copying weights to the device");
    weights_.bytes += made.bytes();
    return made;
  }

  Buffer<float> norm(const std::string& name, int size) {
    const uint16_t* bits = find(name + ".weight", size, 0);
    std::vector<float> values(size);
    for (int i = 0; i < size; ++i) values[i] = shape_.norm_offset + bf16_to_float(bits[i]);
    return floats(values);
  }

  Buffer<float> biases(const std::vector<Source>& sources) {
    std::vector<float> values;
    for (const Source& source : sources) {
      const size_t first = values.size();
      values.resize(first + source.groups.stretched(source.rows));
      const uint16_t* bits = find(source.name, source.rows, 0);
      for (int i = 0; i < source.rows; ++i) {
        values[first + source.groups.place(i)] = bf16_to_float(bits[i]);
      }
    }
    return floats(values);
  }

  Expert expert(const std::string& prefix, int inner) {
    const int hidden = shape_.hidden_size;
    return {matrix({{prefix + "gate_proj.weight", inner, {}}}, hidden, {}),
            matrix({{prefix + "up_proj.weight", inner, {}}}, hidden, {}),
            matrix({{prefix + "down_proj.weight", hidden, {}}}, inner, {})};
  }

  void norms(const std::string& prefix, LayerWeights* layer) {
    const int hidden = shape_.hidden_size;
    layer->attention_norm = norm(prefix + "input_layernorm", hidden);
    if (!shape_.has_post_norms) {
      layer->feed_forward_norm = norm(prefix + "post_attention_layernorm", hidden);
      return;
    }
    layer->post_attention_norm = norm(prefix + "post_attention_layernorm", hidden);
    layer->feed_forward_norm = norm(prefix + "pre_feedforward_layernorm", hidden);
    layer->post_feed_forward_norm = norm(prefix + "post_feedforward_layernorm", hidden);
  }

  void attention(const std::string& prefix, LayerWeights* layer) {
    const int hidden = shape_.hidden_size;
    const Groups heads{shape_.head_dim, shape_.head_width()};
    const int q_rows = shape_.num_heads * shape_.head_dim;
    const int kv_rows = shape_.num_kv_heads * shape_.head_dim;
    const auto sources = [&](const char* what) {
      return std::vector<Source>{{prefix + "q_proj." + what, q_rows, heads},
                                 {prefix + "k_proj." + what, kv_rows, heads},
                                 {prefix + "v_proj." + what, kv_rows, heads}};
    };
    if (shape_.has_qk_norm) {
      layer->q_norm = norm(prefix + "q_norm", shape_.head_dim);
      layer->k_norm = norm(prefix + "k_norm", shape_.head_dim);
    }
    layer->qkv = matrix(sources("weight"), hidden, {});
    if (shape_.has_qkv_bias) layer->qkv.bias = biases(sources("bias"));
    layer->output = matrix({{prefix + "o_proj.weight", hidden, {}}}, q_rows, heads);
    if (shape_.has_output_bias) {
      layer->output.bias = biases({{prefix + "o_proj.bias", hidden, {}}});
    }
  }

  LayerWeights layer(int index) {
    const std::string prefix = "model.layers." + std::to_string(index) + ".";
    LayerWeights layer;
    norms(prefix, &layer);
    attention(prefix + "self_attn.", &layer);
    if (!shape_.layers[index].is_sparse) {
      layer.experts.push_back(expert(prefix + "mlp.", shape_.intermediate_size));
      return layer;
    }
    const std::string router = prefix + "mlp.gate.weight";
    layer.router = matrix({{router, shape_.num_experts, {}}}, shape_.hidden_size, {});
    for (int i = 0; i < shape_.num_experts; ++i) {
      const std::string name = prefix + "mlp.experts." + std::to_string(i) + ".";
      layer.experts.push_back(expert(name, shape_.expert_size));
    }
    return layer;
  }

  const ModelShape& shape_;
  const TensorMap& tensors_;
  const Progress& progress_;
  cudaStream_t stream_;
  size_t total_bytes_ = 0;
  Weights weights_;
};

}  // namespace

Weights upload(const ModelShape& shape, const TensorMap& tensors, const Progress& progress,
               cudaStream_t stream) {
  return Uploader(shape, tensors, progress, stream).all();
}

}  // namespace kvasir::cuda
