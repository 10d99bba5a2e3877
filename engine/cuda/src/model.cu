#include <algorithm>
#include <stdexcept>

#include "model.h"

namespace kvasir::cuda {

namespace {

constexpr unsigned kCopyParts = 8;          // thread blocks per copied block
constexpr unsigned kElementBlocks = 4'096;  // of an elementwise kernel, at most

void require(bool condition, const char* text) {
  if (!condition) throw std::invalid_argument(text);
}

int in_tiles(int rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

unsigned element_blocks(size_t count) {
  return static_cast<unsigned>(std::min<size_t>(kElementBlocks, (count + kThreads - 1) / kThreads));
}

}  // namespace

CudaModel::CudaModel(const ModelShape& shape, const TensorMap& tensors, const Progress& progress)
    : shape_((shape.check(), shape)), gemm_(compute_.get()) {
  require(shape_.head_width() <= kHeadWidthMax, "a head is wider than the CUDA kernels take");
  require(!shape_.has_output_bias || !shape_.has_post_norms,
          "an output bias before a post norm is not supported by the CUDA kernels");
  check(cudaEventCreateWithFlags(&layer_done_, cudaEventDisableTiming), "making an event");
  weights_ = upload(shape_, tensors, progress, compute_.get());
  std::vector<float> frequencies, scales;
  for (const Rope& rope : shape_.ropes) {
    frequencies.insert(frequencies.end(), rope.inverse_frequencies.begin(),
                       rope.inverse_frequencies.end());
    scales.push_back(rope.scale);
  }
  frequencies_.upload(frequencies, compute_.get());
  rope_scales_.upload(scales, compute_.get());
  compute_.wait();
}

CudaModel::~CudaModel() {
  if (host_.data != nullptr) cudaHostUnregister(host_.data);
  cudaEventDestroy(layer_done_);
}

size_t CudaModel::layer_bytes() const {
  return size_t{2} * shape_.kv_size() * kBlockTokens * sizeof(uint16_t);
}

void CudaModel::attach_pool(const KvPool& pool) {
  require(pool.block_bytes == shape_.num_layers * layer_bytes(),
          "the pool's block size does not fit this model and kernel path");
  const std::lock_guard guard(in_use_);
  if (host_.data != nullptr) cudaHostUnregister(host_.data);
  host_ = {};
  const size_t bytes = pool.block_bytes * pool.num_blocks;
  check(cudaHostRegister(pool.data, bytes, cudaHostRegisterMapped), "mapping the KV pool");
  host_ = pool;
  void* mapped = nullptr;
  check(cudaHostGetDevicePointer(&mapped, pool.data, 0), "mapping the KV pool");
  host_mapped_ = static_cast<uint8_t*>(mapped);
  pool_ = Buffer<uint8_t>(bytes);
}

// A step's arrays, and the blocks that came from elsewhere.
void CudaModel::take_in(const Step& step) {
  const cudaStream_t stream = compute_.get();
  std::vector<int32_t> seqs;
  for (int s = 0; s < step.num_seqs; ++s) seqs.insert(seqs.end(), step.seq_token_counts[s], s);
  act_.ids.upload(step.token_ids, step.num_tokens, stream);
  act_.positions.upload(step.positions, step.num_tokens, stream);
  act_.seqs.upload(seqs, stream);
  act_.tables.upload(step.block_tables, static_cast<size_t>(step.num_seqs) * step.table_width,
                     stream);
  act_.outputs.upload(step.output_rows, step.num_outputs, stream);
  act_.completes.upload(step.completes, step.num_completes, stream);
  act_.arrived.upload(step.arrived, step.num_arrived, stream);
  tokens_ = {act_.ids.get(), act_.positions.get(), act_.seqs.get(), act_.tables.get(),
             step.table_width};
  launch(copy_blocks, dim3(step.num_arrived, kCopyParts), kThreads, stream, act_.arrived.get(),
         static_cast<const uint8_t*>(host_mapped_), pool_.get(), host_.block_bytes, size_t{0},
         host_.block_bytes);
  plan_attention(step);
  compute_.wait();  // the sources on the stack go
}

// Items of attention, and whether parts of the context are worked on by blocks of their own: where
// the items alone would leave most of the device idle. Results are the same either way.
void CudaModel::plan_attention(const Step& step) {
  items_.clear();
  int last_position = 0;
  for (int s = 0, token = 0; s < step.num_seqs; token += step.seq_token_counts[s++]) {
    const int rows = step.seq_token_counts[s] * shape_.group();
    for (int row = 0; row < rows; row += kRowsPerItem) {
      items_.push_back({s, token, step.positions[token], row, std::min(kRowsPerItem, rows - row)});
    }
    last_position = std::max(last_position, step.positions[token] + step.seq_token_counts[s] - 1);
  }
  const int blocks = static_cast<int>(items_.size()) * shape_.num_kv_heads;
  const int splits = last_position / kSplitTokens + 1;
  num_splits_ = splits > 1 && blocks < kBusyBlocks ? splits : 0;
  act_.items.upload(items_, compute_.get());
  const size_t partials = static_cast<size_t>(blocks) * num_splits_ * kRowsPerItem;
  act_.partials.reserve(partials);
  act_.partial_sums.reserve(partials * shape_.head_width());
}

void CudaModel::norm(const float* from, const Buffer<float>& weight, int rows, uint16_t* bf16,
                     float* plain) {
  on_rows(normalise, rows, from, static_cast<const int32_t*>(nullptr), weight.get(),
          shape_.rms_norm_eps, shape_.hidden_size, bf16, plain);
}

void CudaModel::multiply(const Matrix& matrix, const uint16_t* from, int rows, bool adds,
                         float* to) {
  gemm_.multiply(from, matrix.values.get(), rows, matrix.n, matrix.k, adds, to);
}

void CudaModel::project_to_stream(const Matrix& matrix, const uint16_t* from,
                                  const Buffer<float>& post_norm, int rows) {
  if (post_norm.get() == nullptr && matrix.bias.get() == nullptr) {
    return multiply(matrix, from, rows, true, act_.x.get());
  }
  float* projected = act_.projected.get();
  multiply(matrix, from, rows, false, projected);
  if (post_norm.get() != nullptr) norm(projected, post_norm, rows, nullptr, projected);
  on_rows(add_rows, rows, projected, matrix.bias.get(), shape_.hidden_size, act_.x.get());
}

// Copies a layer of the step's completed blocks to the host while the next layers are computed.
void CudaModel::hand_out(const Step& step, int index) {
  if (step.num_completes == 0) return;
  check(cudaEventRecord(layer_done_, compute_.get()), "recording an event");
  check(cudaStreamWaitEvent(copying_.get(), layer_done_, 0), "waiting for an event");
  launch(copy_blocks, dim3(step.num_completes, kCopyParts), kThreads, copying_.get(),
         act_.completes.get(), static_cast<const uint8_t*>(pool_.get()), host_mapped_,
         host_.block_bytes, index * layer_bytes(), layer_bytes());
  const auto announce = [](void* data) {
    const auto* told = static_cast<const Announcement*>(data);
    announce_layer(*told->step, *told->pool, told->layer);
  };
  announcements_[index] = {&step, &host_, index};
  check(cudaLaunchHostFunc(copying_.get(), +announce, &announcements_[index]),
        "announcing a layer");
}

void CudaModel::attention(const Step& step, int index) {
  const LayerWeights& layer = weights_.layers[index];
  const int rows = step.num_tokens;
  const int angles = static_cast<int>(shape_.ropes.size()) * shape_.rope_pairs();
  const int rope = shape_.layers[index].rope * shape_.rope_pairs();
  norm(act_.x.get(), layer.attention_norm, rows, act_.normed.get(), nullptr);
  multiply(layer.qkv, act_.normed.get(), rows, false, act_.qkv.get());
  const Heads heads = {shape_.num_heads,    shape_.num_kv_heads, shape_.head_dim,
                       shape_.head_width(), shape_.rope_pairs(), shape_.rms_norm_eps,
                       shape_.query_scale,  shape_.score_cap,    shape_.layers[index].window};
  const LayerKv kv = {pool_.get() + index * layer_bytes(), host_.block_bytes, layer_bytes() / 2};
  launch(finish_heads, dim3(rows, shape_.num_heads + 2 * shape_.num_kv_heads), 32, compute_.get(),
         tokens_, heads, kv, layer.qkv.bias.get(), layer.q_norm.get(), layer.k_norm.get(),
         act_.cos.get() + rope, act_.sin.get() + rope, angles, act_.qkv.get());
  hand_out(step, index);

  const Attention all = {tokens_,
                         heads,
                         kv,
                         act_.items.get(),
                         act_.qkv.get(),
                         act_.attended.get(),
                         num_splits_,
                         act_.partials.get(),
                         act_.partial_sums.get()};
  const unsigned items = static_cast<unsigned>(items_.size());
  const dim3 grid(items, shape_.num_kv_heads, std::max(1, num_splits_));
  launch(attention_kernel(shape_.head_width()), grid, kAttentionWarps * 32, compute_.get(), all);
  if (num_splits_ > 0) {
    launch(merge_splits, dim3(items, shape_.num_kv_heads), kThreads, compute_.get(), all);
  }
  project_to_stream(layer.output, act_.attended.get(), layer.post_attention_norm, rows);
}

// act_.hidden = activate(in gate) * (in up)
void CudaModel::gated(const Expert& expert, const uint16_t* in, int rows) {
  multiply(expert.gate, in, rows, false, act_.gated.get());
  multiply(expert.up, in, rows, false, act_.up.get());
  const size_t count = static_cast<size_t>(rows) * expert.gate.n;
  launch(gate, dim3(element_blocks(count)), kThreads, compute_.get(),
         static_cast<const float*>(act_.gated.get()), static_cast<const float*>(act_.up.get()),
         shape_.activation == Activation::kGeluTanh, count, act_.hidden.get());
}

void CudaModel::feed_forward(const LayerWeights& layer, int rows) {
  norm(act_.x.get(), layer.feed_forward_norm, rows, act_.normed.get(), nullptr);
  if (layer.router.n > 0) return mixture(layer, rows);
  gated(layer.experts[0], act_.normed.get(), rows);
  project_to_stream(layer.experts[0].down, act_.hidden.get(), layer.post_feed_forward_norm, rows);
}

// Tokens grouped by expert; each expert's rows begin a tile of their own.
void CudaModel::mixture(const LayerWeights& layer, int rows) {
  const int num_choices = shape_.num_experts_per_token, num_experts = shape_.num_experts;
  const int num_chosen = rows * num_choices;
  act_.gated.reserve(static_cast<size_t>(in_tiles(rows)) * num_experts);
  multiply(layer.router, act_.normed.get(), rows, false, act_.gated.get());
  act_.choices.reserve(num_chosen);
  act_.choice_weights.reserve(num_chosen);
  launch(choose_experts, dim3((rows + kThreads - 1) / kThreads), kThreads, compute_.get(),
         static_cast<const float*>(act_.gated.get()), rows, num_experts, num_experts, num_choices,
         shape_.has_scaled_experts, act_.choices.get(), act_.choice_weights.get());
  std::vector<int32_t> choices(num_chosen);
  act_.choices.download(choices.data(), num_chosen, compute_.get());
  compute_.wait();

  std::vector<int> counts(num_experts, 0), starts(num_experts + 1, 0);
  for (const int32_t expert : choices) ++counts[expert];
  for (int e = 0; e < num_experts; ++e) starts[e + 1] = starts[e] + in_tiles(counts[e]);
  const int num_slots = starts[num_experts];
  std::vector<int32_t> slots(num_chosen), sources(num_slots, -1);
  std::vector<int> next(starts.begin(), starts.end() - 1);
  for (int i = 0; i < num_chosen; ++i) {
    slots[i] = next[choices[i]]++;
    sources[slots[i]] = i / num_choices;
  }
  act_.slots.upload(slots, compute_.get());
  act_.sources.upload(sources, compute_.get());
  const size_t size = static_cast<size_t>(num_slots) * shape_.hidden_size;
  act_.expert_in.reserve(size);
  act_.expert_out.reserve(size);
  const size_t inner = static_cast<size_t>(in_tiles(rows)) * shape_.expert_size;
  act_.gated.reserve(inner);
  act_.up.reserve(inner);
  act_.hidden.reserve(inner);
  compute_.wait();  // the sources of the copies go
  on_rows(gather_rows, num_slots, static_cast<const uint16_t*>(act_.normed.get()),
          static_cast<const int32_t*>(act_.sources.get()), shape_.hidden_size,
          act_.expert_in.get());
  for (int e = 0; e < num_experts; ++e) {
    if (counts[e] == 0) continue;
    const size_t first = static_cast<size_t>(starts[e]) * shape_.hidden_size;
    gated(layer.experts[e], act_.expert_in.get() + first, counts[e]);
    multiply(layer.experts[e].down, act_.hidden.get(), counts[e], false,
             act_.expert_out.get() + first);
  }
  on_rows(combine_experts, rows, static_cast<const float*>(act_.expert_out.get()),
          static_cast<const int32_t*>(act_.slots.get()),
          static_cast<const float*>(act_.choice_weights.get()), num_choices, shape_.hidden_size,
          act_.x.get());
}

void CudaModel::write_logits(const Step& step) {
  const int hidden = shape_.hidden_size, vocab = shape_.vocab_size;
  on_rows(normalise, step.num_outputs, static_cast<const float*>(act_.x.get()),
          static_cast<const int32_t*>(act_.outputs.get()),
          static_cast<const float*>(weights_.final_norm.get()), shape_.rms_norm_eps, hidden,
          act_.normed.get(), static_cast<float*>(nullptr));
  act_.logits.reserve(static_cast<size_t>(kTileRows) * vocab);
  for (int row = 0; row < step.num_outputs; row += kTileRows) {
    const size_t count = static_cast<size_t>(std::min(kTileRows, step.num_outputs - row)) * vocab;
    multiply(weights_.head, act_.normed.get() + static_cast<size_t>(row) * hidden, kTileRows, false,
             act_.logits.get());
    if (shape_.logit_cap > 0) {
      launch(soft_cap, dim3(element_blocks(count)), kThreads, compute_.get(), act_.logits.get(),
             shape_.logit_cap, count);
    }
    act_.logits.download(step.logits + static_cast<size_t>(row) * vocab, count, compute_.get());
  }
}

void CudaModel::forward(const Step& step) {
  const std::unique_lock guard(in_use_, std::try_to_lock);
  require(guard.owns_lock(), "the model is already computing a step");
  require(host_.data != nullptr, "no KV pool is attached");
  check_step(step, shape_, host_);
  require(step.num_layers == shape_.num_layers, "this device computes all layers");
  // 1. Room, and what the step works on.
  const size_t rows = in_tiles(std::max(step.num_tokens, step.num_outputs));
  const int angles = static_cast<int>(shape_.ropes.size()) * shape_.rope_pairs();
  act_.x.reserve(rows * shape_.hidden_size);
  act_.projected.reserve(rows * shape_.hidden_size);
  act_.normed.reserve(rows * shape_.hidden_size);
  act_.qkv.reserve(rows * shape_.qkv_size());
  act_.attended.reserve(rows * shape_.q_size());
  act_.gated.reserve(rows * shape_.intermediate_size);
  act_.up.reserve(rows * shape_.intermediate_size);
  act_.hidden.reserve(rows * shape_.intermediate_size);
  act_.cos.reserve(rows * angles);
  act_.sin.reserve(rows * angles);
  announcements_.resize(shape_.num_layers);
  take_in(step);
  // 2. The layers.
  const Matrix& head = weights_.head;
  const uint16_t* embeddings =
      weights_.embeddings.get() != nullptr ? weights_.embeddings.get() : head.values.get();
  on_rows(embed, step.num_tokens, tokens_, embeddings, shape_.embedding_scale, shape_.hidden_size,
          act_.x.get());
  on_rows(fill_rope, step.num_tokens, tokens_, static_cast<const float*>(frequencies_.get()),
          static_cast<const float*>(rope_scales_.get()), shape_.rope_pairs(), angles,
          act_.cos.get(), act_.sin.get());
  for (int i = 0; i < shape_.num_layers; ++i) {
    attention(step, i);
    feed_forward(weights_.layers[i], step.num_tokens);
  }
  // 3. Logits; all that refers to the step has ended when this returns.
  if (step.num_outputs > 0) write_logits(step);
  copying_.wait();
  compute_.wait();
}

}  // namespace kvasir::cuda

// The one entry of the library: a model on the device, or null and why.
extern "C" kvasir::Device* kvasir_cuda_model(const kvasir::ModelShape* shape,
                                             const kvasir::TensorMap* tensors,
                                             const kvasir::Progress* progress, std::string* why) {
  try {
    return new kvasir::cuda::CudaModel(*shape, *tensors, *progress);
  } catch (const std::exception& error) {
    *why = error.what();
    return nullptr;
  }
}
