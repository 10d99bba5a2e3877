#include "model.h"

#include <algorithm>
#include <stdexcept>

#include "bf16.h"
#include "kv_move.h"
#include "loader.h"
#include "topology.h"

namespace kvasir {

namespace {

constexpr int kRowGrain = 8;  // rows per item of cheap row-wise work
constexpr size_t kStridePad = 16;

void require(bool condition, const char* text) {
  if (!condition) throw std::invalid_argument(text);
}

// Helpers stay where the memory of their share of the weights is likely to be.
std::function<void(int)> binding(int num_threads) {
  return [cpus = thread_cpus(num_threads)](int thread) {
    if (!cpus.empty()) keep_to(cpus[thread]);
  };
}

int widest_input(const ModelShape& shape) {
  return std::max({shape.hidden_size, shape.q_size(), shape.intermediate_size, shape.expert_size});
}

size_t thread_scratch(const ModelShape& shape) {
  const int rows = std::max(kAttentionRows, shape.group());
  const size_t most =
      std::max(linear_scratch(widest_input(shape)), attention_scratch(rows, shape.head_width()));
  return round_up(most, kCacheLineBytes / sizeof(float)) + kStridePad;
}

}  // namespace

void Activations::reserve(const ModelShape& shape, const Kernels& kernels, int num_tokens) {
  if (num_tokens <= capacity_) return;
  const size_t tokens = num_tokens;
  const size_t choices = tokens * shape.num_experts_per_token;
  size_t total = 0;
  const auto place = [&](Rows* rows, size_t count, int width) {
    rows->stride = round_up(width, kStridePad) + kStridePad;
    rows->data = reinterpret_cast<float*>(total * sizeof(float));  // an offset until mapped
    total += count * rows->stride;
  };
  place(&x, tokens, shape.hidden_size);
  place(&normed, tokens, shape.hidden_size);
  place(&qkv, tokens, shape.qkv_size());
  place(&attended, tokens, shape.q_size());
  place(&hidden, std::max(tokens, choices), std::max(shape.intermediate_size, shape.expert_size));
  const int num_angles = static_cast<int>(shape.ropes.size()) * shape.rope_pairs();
  place(&cos, tokens, num_angles);
  place(&sin, tokens, num_angles);
  place(&router, shape.num_experts == 0 ? 0 : tokens, shape.num_experts);
  place(&expert_in, choices, shape.hidden_size);
  place(&expert_out, choices, shape.hidden_size);
  const int rows = static_cast<int>(std::max(tokens, choices));
  mapping_ = Mapping(total * sizeof(float) + operand_bytes(kernels, rows, widest_input(shape)));
  for (Rows* rows :
       {&x, &normed, &qkv, &attended, &hidden, &cos, &sin, &router, &expert_in, &expert_out}) {
    rows->data = reinterpret_cast<float*>(static_cast<char*>(mapping_.data()) +
                                          reinterpret_cast<size_t>(rows->data));
  }
  operand = static_cast<uint8_t*>(mapping_.data()) + total * sizeof(float);
  capacity_ = num_tokens;
}

Model::Model(ModelShape shape, const TensorMap& tensors, const ModelOptions& options,
             const Progress& progress, std::span<const uint8_t> kept)
    : shape_((shape.check(), std::move(shape))),
      kernels_(kernels_of(options.path)),
      kv_format_(options.kv),
      pool_(options.num_threads, binding(options.num_threads)),
      weights_(kept.empty() ? Arena(packed_bytes(shape_, options.weights)) : Arena(kept)) {
  require(weights_.bytes() == packed_bytes(shape_, options.weights),
          "the packed weights that were kept have another size");
  require(!options.is_balanced || options.weights != WeightFormat::kInt4,
          "int4 weights are not balanced");
  const size_t stride = thread_scratch(shape_);
  scratch_ = Mapping(stride * options.num_threads * sizeof(float));
  compute_ = {&kernels_, &pool_, static_cast<float*>(scratch_.data()), stride, nullptr};
  Loader loader(shape_, tensors, options.weights, &weights_, &pool_, progress);
  if (options.is_balanced && kept.empty()) {
    load_balanced(tensors, progress, &loader);
  } else {
    WeightTable table(shape_, &loader);
    for (int i = 0; i < shape_.num_layers; ++i) layers_.push_back(table.layer(i));
    final_norm_ = table.final_norm();
    head_ = table.head();
  }
  embeddings_ = loader.embeddings();
}

size_t Model::layer_bytes() const {
  return size_t{2} * shape_.num_kv_heads * kv_kernels().head_bytes(shape_.head_width());
}

void Model::attach_pool(const KvPool& pool) {
  require(pool.block_bytes == shape_.num_layers * layer_bytes(),
          "the pool's block size does not fit this model and kernel path");
  const std::lock_guard guard(in_use_);
  kv_ = pool;
}

void Model::embed(const Step& step) {
  for_rows(&pool_, step.num_tokens, kRowGrain, [&](int row) {
    const int id = step.token_ids[row];
    if (embeddings_ == nullptr) {
      head_.read_row(id, act_.x[row]);
    } else {
      const uint16_t* source = embeddings_ + static_cast<size_t>(id) * shape_.hidden_size;
      for (int i = 0; i < shape_.hidden_size; ++i) act_.x[row][i] = bf16_to_float(source[i]);
    }
    for (int i = 0; i < shape_.hidden_size; ++i) act_.x[row][i] *= shape_.embedding_scale;
    fill_rope_row(shape_, step.positions[row], act_.cos[row], act_.sin[row]);
  });
}

// to = RMSNorm(from), row by row; the two may be one.
void Model::normalise(Rows from, const float* weights, int num_tokens, Rows to) {
  for_rows(&pool_, num_tokens, kRowGrain, [&](int row) {
    kernels_.rms_norm(from[row], weights, shape_.rms_norm_eps, shape_.hidden_size, to[row]);
  });
}

// Adds a projection of `from`, normalised first where the layer says so, to the residual stream.
void Model::project_to_stream(const PackedMatrix& weights, Rows from, const float* post_norm,
                              int num_tokens) {
  if (post_norm == nullptr) {
    return linear(compute_, weights, from, num_tokens, act_.x, Store::kAdd);
  }
  linear(compute_, weights, from, num_tokens, act_.normed, Store::kPlain);
  normalise(act_.normed, post_norm, num_tokens, act_.normed);
  for_rows(&pool_, num_tokens, kRowGrain, [&](int row) {
    for (int i = 0; i < shape_.hidden_size; ++i) act_.x[row][i] += act_.normed[row][i];
  });
}

void Model::write_logits(const Step& step) {
  for_rows(&pool_, step.num_outputs, kRowGrain, [&](int i) {
    kernels_.rms_norm(act_.x[step.output_rows[i]], final_norm_, shape_.rms_norm_eps,
                      shape_.hidden_size, act_.normed[i]);
  });
  const Rows logits = {step.logits, static_cast<size_t>(shape_.vocab_size)};
  linear(compute_, head_, act_.normed, step.num_outputs, logits, Store::kPlain);
  if (shape_.logit_cap == 0) return;
  for_rows(&pool_, step.num_outputs, 1,
           [&](int row) { kernels_.soft_cap(logits[row], shape_.logit_cap, shape_.vocab_size); });
}

void Model::forward(const Step& step) {
  const std::unique_lock guard(in_use_, std::try_to_lock);
  require(guard.owns_lock(), "the model is already computing a step");
  check_step(step, shape_, kv_);
  act_.reserve(shape_, kernels_, std::max(step.num_tokens, step.num_outputs));
  compute_.operand = act_.operand;
  // 1. Embeddings, rotary angles and the cut of attention into items.
  embed(step);
  plan_attention(step);
  // 2. Layers; KV of a layer is announced as soon as all tokens of the step have written it.
  for (int i = 0; i < step.num_layers; ++i) {
    attention(step, i);
    feed_forward(layers_[i], step.num_tokens);
  }
  if (step.num_layers < shape_.num_layers) project_kv(step, step.num_layers);
  // 3. Logits of the requested rows.
  if (step.num_outputs > 0) write_logits(step);
}

void Model::for_each_row(int count, const std::function<void(int)>& body) {
  const std::unique_lock guard(in_use_, std::try_to_lock);
  require(guard.owns_lock(), "the model is already computing a step");
  pool_.run(count, [&](int row, int) { body(row); });
}

void Model::move_kv(const KvMove& move) {
  const std::unique_lock guard(in_use_, std::try_to_lock);
  require(guard.owns_lock(), "the model is already computing a step");
  check_span(move.source, kv_);
  check_span(move.target, kv_);
  pool_.run(shape_.num_layers,
            [&](int layer, int) { move_layer(kv_, shape_, kernels_, kv_kernels(), layer, move); });
}

void Model::read_kv(int layer, const KvSpan& span, float* out) {
  const std::unique_lock guard(in_use_, std::try_to_lock);
  require(guard.owns_lock(), "the model is already computing a step");
  check_span(span, kv_);
  read_layer(kv_, shape_, kv_kernels(), layer, span, out);
}

}  // namespace kvasir
