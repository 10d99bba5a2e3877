// The forward pass of Llama type decoders and their relatives over a paged KV cache.
#pragma once

#include <mutex>
#include <string>
#include <vector>

#include "balance.h"
#include "device.h"
#include "packed_matrix.h"
#include "weight_table.h"

namespace kvasir {

class Loader;

using Expert = ExpertOf<PackedMatrix>;
using Layer = LayerOf<PackedMatrix, const float*>;  // norms null: none

// Activations of one step, grown to the largest step seen. Strides are padded by a cache line so
// that rows do not fall on one set of the cache.
struct Activations {
  Rows x, normed, qkv, attended, hidden, cos, sin;
  Rows router, expert_in, expert_out;  // mixture of experts only
  uint8_t* operand = nullptr;          // see Compute

  void reserve(const ModelShape& shape, const Kernels& kernels, int num_tokens);

 private:
  int capacity_ = 0;
  Mapping mapping_;
};

inline constexpr int kAttentionRows = 96;  // query rows per attention item

// Query tokens of one sequence that attention treats as one item per KV head.
struct AttentionSpan {
  int seq;
  int first_token;
  int num_tokens;
};

// Attention of one span under one KV head.
struct AttentionItem {
  int span;
  int head;
};

struct ModelOptions {
  std::string path;  // of kernels
  KvFormat kv = KvFormat::kPlain;
  WeightFormat weights = WeightFormat::kBf16;
  int num_threads = 1;
  bool is_balanced = false;  // weights, see balance.h; not int4
};

// The processor itself.
class Model final : public Device {
 public:
  // Throws std::invalid_argument for missing tensors and wrong shapes. Embeddings stay where they
  // are, unless the head holds them as they are (tied, bf16): their tensor must outlive the model.
  // kept: what `packed` was when these weights were packed before, or nothing; must outlive it too.
  Model(ModelShape shape, const TensorMap& tensors, const ModelOptions& options,
        const Progress& progress, std::span<const uint8_t> kept);

  void attach_pool(const KvPool& pool) override;
  void forward(const Step& step) override;
  void for_each_row(int count, const std::function<void(int)>& body) override;
  void move_kv(const KvMove& move) override;
  void read_kv(int layer, const KvSpan& span, float* out) override;

  const ModelShape& shape() const override { return shape_; }
  std::string path() const override { return kernels_.name; }
  int num_threads() const override { return pool_.num_threads(); }
  size_t weight_bytes() const override { return weights_.bytes(); }
  size_t layer_bytes() const override;
  std::span<const uint8_t> packed() const override { return {weights_.data(), weights_.bytes()}; }

 private:
  void load_balanced(const TensorMap& tensors, const Progress& progress, Loader* loader);
  Shares load_balanced_layers(const TensorMap& tensors, const Progress& progress, Loader* loader);
  void embed(const Step& step);
  void plan_attention(const Step& step);
  void project_kv(const Step& step, int index);
  void attention(const Step& step, int index);
  void finish_kv(const Step& step, int layer, int token);
  const KvKernels& kv_kernels() const { return kernels_.kv[static_cast<int>(kv_format_)]; }
  AttentionArgs attention_args(const Step& step, int layer, AttentionItem item) const;
  bool splits_context(const Step& step) const;
  void attend(const Step& step, int layer);
  void attend_split(const Step& step, int layer);
  void normalise(Rows from, const float* weights, int num_tokens, Rows to);
  void project_to_stream(const PackedMatrix& weights, Rows from, const float* post_norm,
                         int num_tokens);
  Gate activation() const;
  void feed_forward(const Layer& layer, int num_tokens);
  void mixture(const Layer& layer, int num_tokens);
  void write_logits(const Step& step);

  ModelShape shape_;
  Kernels kernels_;
  KvFormat kv_format_;
  ThreadPool pool_;
  Arena weights_;
  std::vector<Layer> layers_;
  const float* final_norm_ = nullptr;
  PackedMatrix head_;
  const uint16_t* embeddings_ = nullptr;  // null: head_ holds them
  Mapping scratch_;
  Compute compute_{};
  Activations act_;
  std::vector<AttentionSpan> spans_;
  std::vector<int> token_seqs_;
  std::vector<float> parts_;  // of a context that is split
  KvPool kv_;
  std::mutex in_use_;
};

}  // namespace kvasir
