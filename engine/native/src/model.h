// The forward pass of Llama type decoders and their relatives over a paged KV cache.
#pragma once

#include <functional>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "packed_matrix.h"
#include "shape.h"

namespace kvasir {

// A named weight, bf16 bits, row-major; the memory belongs to the caller.
struct Tensor {
  const uint16_t* data;
  std::vector<size_t> dims;
};
using TensorMap = std::unordered_map<std::string, Tensor>;

struct Expert {
  PackedMatrix gate, up, down;
};

struct Layer {
  const float* attention_norm = nullptr;
  const float* feed_forward_norm = nullptr;
  const float* post_attention_norm = nullptr;  // null: none
  const float* post_feed_forward_norm = nullptr;
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
  PackedMatrix qkv, output;
  PackedMatrix router;          // n == 0: dense
  std::vector<Expert> experts;  // one if dense
};

// KV memory of the process: [num_blocks][num_layers][K|V], see KvLayout.
struct KvPool {
  uint8_t* data = nullptr;
  uint32_t* ready = nullptr;     // [num_blocks]: layers of a block that are final
  uint32_t* progress = nullptr;  // futex word, raised after `ready`
  int num_blocks = 0;
  size_t block_bytes = 0;
};

// One step of a mixed batch; the arrays' owner has checked shapes, not values.
struct Step {
  const int32_t* token_ids;  // [num_tokens]
  const int32_t* positions;  // [num_tokens], consecutive within a sequence
  int num_tokens;
  const int32_t* seq_token_counts;  // [num_seqs]
  int num_seqs;
  const int32_t* block_tables;  // [num_seqs][table_width]
  int table_width;
  const int32_t* output_rows;  // [num_outputs], tokens whose logits are wanted
  int num_outputs;
  float* logits;             // [num_outputs][vocab_size]
  const int32_t* completes;  // [num_completes], blocks whose last token is in this step
  int num_completes;
};

// Activations of one step, grown to the largest step seen. Strides are padded by a cache line so
// that rows do not fall on one set of the cache.
struct Activations {
  Rows x, normed, qkv, attended, hidden, cos, sin;
  Rows router, expert_in, expert_out;  // mixture of experts only

  void reserve(const ModelShape& shape, int num_tokens);

 private:
  int capacity_ = 0;
  Mapping mapping_;
};

inline constexpr int kAttentionRows = 64;  // query rows per attention item

// Query tokens of one sequence that attention treats as one item per KV head.
struct AttentionSpan {
  int seq;
  int first_token;
  int num_tokens;
};

class Model {
 public:
  using Progress = std::function<void(size_t done_bytes, size_t total_bytes)>;

  // Throws std::invalid_argument for missing tensors and wrong shapes. Untied embeddings stay where
  // they are: their tensor must outlive the model.
  Model(ModelShape shape, const TensorMap& tensors, const std::string& path, int num_threads,
        const Progress& progress);

  void attach_pool(const KvPool& pool);
  // Throws std::invalid_argument before anything is written if a value is out of range.
  void forward(const Step& step);

  const ModelShape& shape() const { return shape_; }
  const Kernels& kernels() const { return kernels_; }
  int num_threads() const { return pool_.num_threads(); }
  size_t weight_bytes() const { return weights_.bytes(); }
  size_t layer_bytes() const;

 private:
  void check(const Step& step) const;
  void embed(const Step& step);
  void plan_attention(const Step& step);
  void attention(const Step& step, int index);
  void finish_kv(const Step& step, int layer, int token);
  void attend(const Step& step, int layer);
  void mark_ready(const Step& step, int layer) const;
  void normalise(Rows from, const float* weights, int num_tokens, Rows to);
  void project_to_stream(const PackedMatrix& weights, Rows from, const float* post_norm,
                         int num_tokens);
  Gate activation() const;
  void feed_forward(const Layer& layer, int num_tokens);
  void mixture(const Layer& layer, int num_tokens);
  void write_logits(const Step& step);

  ModelShape shape_;
  const Kernels& kernels_;
  ThreadPool pool_;
  Arena weights_;
  std::vector<Layer> layers_;
  const float* final_norm_ = nullptr;
  PackedMatrix head_;
  const uint16_t* embeddings_ = nullptr;  // null: tied to head_
  Mapping scratch_;
  Compute compute_{};
  Activations act_;
  std::vector<AttentionSpan> spans_;
  std::vector<int> token_seqs_;
  KvPool kv_;
  std::mutex in_use_;
};

}  // namespace kvasir
