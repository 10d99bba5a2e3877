// The attention half of a layer: project, rotate, store KV, announce it, attend, project back.
#include <algorithm>

#include "model.h"

namespace kvasir {

namespace {

constexpr int kTokenGrain = 4;
constexpr int kItemsPerThread = 4;  // enough that threads finish together

// The first block that a call reads.
const uint8_t* first_keys(const AttentionArgs& args) {
  const int block = first_seen(args, args.first_position) / kBlockTokens;
  return args.keys + args.block_table[block] * args.block_bytes;
}

}  // namespace

// Normalises and rotates one token's heads in place and writes its K and V to their block.
void Model::finish_kv(const Step& step, int index, int token) {
  const Layer& layer = layers_[index];
  const int head_width = shape_.head_width();
  const size_t rope = static_cast<size_t>(shape_.layers[index].rope) * shape_.rope_pairs();
  float* q = act_.qkv[token];
  float* k = q + shape_.q_size();
  const float* v = k + shape_.kv_size();
  for (int head = 0; head < shape_.num_heads + shape_.num_kv_heads; ++head) {
    float* values = q + head * head_width;  // K heads follow the Q heads
    const float* norm = head < shape_.num_heads ? layer.q_norm : layer.k_norm;
    if (norm != nullptr) {
      kernels_.rms_norm(values, norm, shape_.rms_norm_eps, shape_.head_dim, values);
    }
    kernels_.rotate(values, act_.cos[token] + rope, act_.sin[token] + rope,
                    2 * shape_.rope_pairs());
  }
  for (int i = 0; i < shape_.q_size(); ++i) q[i] *= shape_.query_scale;

  const int position = step.positions[token];
  const int32_t* table =
      step.block_tables + static_cast<size_t>(token_seqs_[token]) * step.table_width;
  const size_t half = layer_bytes() / 2;
  const size_t head_bytes = half / shape_.num_kv_heads;
  uint8_t* keys = kv_.data + table[position / kBlockTokens] * kv_.block_bytes + index * 2 * half;
  for (int head = 0; head < shape_.num_kv_heads; ++head) {
    kv_kernels().store(k + head * head_width, v + head * head_width, head_width,
                       position % kBlockTokens, keys + head * head_bytes,
                       keys + half + head * head_bytes);
  }
}

AttentionArgs Model::attention_args(const Step& step, int index, AttentionItem item) const {
  const AttentionSpan& span = spans_[item.span];
  const size_t half = layer_bytes() / 2;
  const size_t head_bytes = half / shape_.num_kv_heads;
  const uint8_t* layer_data = kv_.data + index * 2 * half;
  const size_t column = static_cast<size_t>(item.head) * shape_.group() * shape_.head_width();
  AttentionArgs args{};
  args.q = act_.qkv[span.first_token] + column;
  args.q_stride = act_.qkv.stride;
  args.out = act_.attended[span.first_token] + column;
  args.out_stride = act_.attended.stride;
  args.num_tokens = span.num_tokens;
  args.group = shape_.group();
  args.head_dim = shape_.head_width();
  args.first_position = step.positions[span.first_token];
  args.window = shape_.layers[index].window;
  args.score_cap = shape_.score_cap;
  args.keys = layer_data + item.head * head_bytes;
  args.values = layer_data + half + item.head * head_bytes;
  args.block_bytes = kv_.block_bytes;
  args.block_table = step.block_tables + static_cast<size_t>(span.seq) * step.table_width;
  return args;
}

// A few tokens decoded with few KV heads leave threads idle unless the context is cut as well. The
// cut does not show in the result: segments are summed apart and joined in order everywhere.
bool Model::splits_context(const Step& step) const {
  const int num_items = static_cast<int>(spans_.size()) * shape_.num_kv_heads;
  return kv_kernels().attend_segment != nullptr && pool_.num_threads() > 1 &&
         num_items < kItemsPerThread * pool_.num_threads() &&
         step.num_tokens == static_cast<int>(spans_.size());  // one token each
}

void Model::attend(const Step& step, int index) {
  if (splits_context(step)) return attend_split(step, index);
  const int num_items = static_cast<int>(spans_.size()) * shape_.num_kv_heads;
  pool_.run(num_items, [&](int item, int thread) {
    // Later spans of a prompt see more of it: they go first.
    const auto nth = [&](int i) {
      const int left = num_items - 1 - i;
      return attention_args(step, index, {left / shape_.num_kv_heads, left % shape_.num_kv_heads});
    };
    AttentionArgs args = nth(item);
    if (item + 1 < num_items) args.next_keys = first_keys(nth(item + 1));
    args.scratch = compute_.scratch_of(thread);
    kv_kernels().attend(args);
  });
}

void Model::attend_split(const Step& step, int index) {
  struct Piece {
    AttentionItem item;
    int segment;
  };
  std::vector<Piece> pieces;
  std::vector<int> starts;  // of each item's pieces, and the end
  for (int span = 0; span < static_cast<int>(spans_.size()); ++span) {
    for (int head = 0; head < shape_.num_kv_heads; ++head) {
      const Range segments = segments_of(attention_args(step, index, {span, head}));
      starts.push_back(static_cast<int>(pieces.size()));
      for (int i = segments.from; i < segments.to; ++i) pieces.push_back({{span, head}, i});
    }
  }
  starts.push_back(static_cast<int>(pieces.size()));
  const size_t part = part_floats(shape_.group(), shape_.head_width());
  if (parts_.size() < pieces.size() * part) parts_.resize(pieces.size() * part);
  pool_.run(static_cast<int>(pieces.size()), [&](int i, int thread) {
    AttentionArgs args = attention_args(step, index, pieces[i].item);
    args.scratch = compute_.scratch_of(thread);
    kv_kernels().attend_segment(args, pieces[i].segment, parts_.data() + i * part);
  });
  pool_.run(static_cast<int>(starts.size()) - 1, [&](int i, int thread) {
    AttentionArgs args = attention_args(step, index, pieces[starts[i]].item);
    args.scratch = compute_.scratch_of(thread);
    kv_kernels().join_segments(args, parts_.data() + starts[i] * part, starts[i + 1] - starts[i]);
  });
}

void Model::plan_attention(const Step& step) {
  const int span_tokens = std::max(1, kAttentionRows / shape_.group());
  spans_.clear();
  token_seqs_.resize(step.num_tokens);
  for (int seq = 0, token = 0; seq < step.num_seqs; ++seq) {
    const int end = token + step.seq_token_counts[seq];
    std::fill(token_seqs_.begin() + token, token_seqs_.begin() + end, seq);
    for (; token < end; token += span_tokens) {
      spans_.push_back({seq, token, std::min(span_tokens, end - token)});
    }
    token = end;
  }
}

// Q, K and V of all tokens of the step; K and V are in their blocks.
void Model::project_kv(const Step& step, int index) {
  const Layer& layer = layers_[index];
  const int num_tokens = step.num_tokens;
  normalise(act_.x, layer.attention_norm, num_tokens, act_.normed);
  linear(compute_, layer.qkv, act_.normed, num_tokens, act_.qkv, Store::kPlain);
  for_rows(&pool_, num_tokens, kTokenGrain, [&](int token) { finish_kv(step, index, token); });
}

void Model::attention(const Step& step, int index) {
  const Layer& layer = layers_[index];
  project_kv(step, index);
  announce_layer(step, kv_, index);
  attend(step, index);
  project_to_stream(layer.output, act_.attended, layer.post_attention_norm, step.num_tokens);
}

}  // namespace kvasir
