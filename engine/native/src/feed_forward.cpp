// The feed-forward half of a layer: a gated product, or a mixture of experts with tokens grouped by
// expert.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "model.h"

namespace kvasir {

namespace {

constexpr int kRowGrain = 8;

struct Choice {
  int expert;
  float weight;
};

// The strongest experts of one token in falling order, lower index first on ties, with their
// softmax weights: among all experts, or scaled to sum to 1.
void choose(const float* logits, int num_experts, int num_choices, bool is_scaled,
            Choice* choices) {
  float max = logits[0];
  for (int e = 1; e < num_experts; ++e) max = std::fmax(max, logits[e]);
  for (int c = 0; c < num_choices; ++c) {
    int best = -1;
    for (int e = 0; e < num_experts; ++e) {
      const bool is_taken = std::any_of(choices, choices + c,
                                        [&](const Choice& choice) { return choice.expert == e; });
      if (!is_taken && (best < 0 || logits[e] > logits[best])) best = e;
    }
    choices[c] = {best, std::exp(logits[best] - max)};
  }
  float total = 0;
  for (int c = 0; c < num_choices && is_scaled; ++c) total += choices[c].weight;
  for (int e = 0; e < num_experts && !is_scaled; ++e) total += std::exp(logits[e] - max);
  for (int c = 0; c < num_choices; ++c) choices[c].weight /= total;
}

}  // namespace

void Model::feed_forward(const Layer& layer, int num_tokens) {
  normalise(act_.x, layer.feed_forward_norm, num_tokens, act_.normed);
  if (layer.router.n > 0) return mixture(layer, num_tokens);
  const Expert& only = layer.experts[0];
  gated_linear(compute_, activation(), only.gate, only.up, act_.normed, num_tokens, act_.hidden);
  project_to_stream(only.down, act_.hidden, layer.post_feed_forward_norm, num_tokens);
}

Gate Model::activation() const {
  return shape_.activation == Activation::kSilu ? kernels_.silu_multiply : kernels_.gelu_multiply;
}

void Model::mixture(const Layer& layer, int num_tokens) {
  const int num_choices = shape_.num_experts_per_token;
  const int num_experts = shape_.num_experts;
  // 1. Each token chooses its experts by itself.
  linear(compute_, layer.router, act_.normed, num_tokens, act_.router, Store::kPlain);
  std::vector<Choice> choices(static_cast<size_t>(num_tokens) * num_choices);
  for_rows(&pool_, num_tokens, kRowGrain, [&](int t) {
    choose(act_.router[t], num_experts, num_choices, shape_.has_scaled_experts,
           &choices[static_cast<size_t>(t) * num_choices]);
  });
  // 2. Choices sorted by expert: slot_of[choice] is its row among the experts' inputs.
  std::vector<int> starts(num_experts + 1, 0);
  for (const Choice& choice : choices) ++starts[choice.expert + 1];
  for (int e = 0; e < num_experts; ++e) starts[e + 1] += starts[e];
  std::vector<int> next(starts.begin(), starts.end() - 1);
  std::vector<int> slot_of(choices.size());
  for (size_t i = 0; i < choices.size(); ++i) slot_of[i] = next[choices[i].expert]++;
  for_rows(&pool_, static_cast<int>(choices.size()), kRowGrain, [&](int i) {
    std::memcpy(act_.expert_in[slot_of[i]], act_.normed[i / num_choices],
                shape_.hidden_size * sizeof(float));
  });
  // 3. Each expert runs once over its rows.
  for (int e = 0; e < num_experts; ++e) {
    const int rows = starts[e + 1] - starts[e];
    if (rows == 0) continue;
    const Expert& expert = layer.experts[e];
    const Rows in = {act_.expert_in[starts[e]], act_.expert_in.stride};
    const Rows hidden = {act_.hidden[starts[e]], act_.hidden.stride};
    const Rows out = {act_.expert_out[starts[e]], act_.expert_out.stride};
    gated_linear(compute_, activation(), expert.gate, expert.up, in, rows, hidden);
    linear(compute_, expert.down, hidden, rows, out, Store::kPlain);
  }
  // 4. Weighted sums in the order of the choice, which is the token's own.
  for_rows(&pool_, num_tokens, kRowGrain, [&](int t) {
    float* x = act_.x[t];
    for (int c = 0; c < num_choices; ++c) {
      const size_t i = static_cast<size_t>(t) * num_choices + c;
      const float* out = act_.expert_out[slot_of[i]];
      for (int j = 0; j < shape_.hidden_size; ++j) x[j] += choices[i].weight * out[j];
    }
  });
}

}  // namespace kvasir
