// Attention over V (see vector_kernels.h): online softmax over blocks of 32 absolute positions.
#pragma once

#include "vector_kernels.h"

namespace kvasir::vec {

// State of the query rows of one call; row = token * group + head.
struct Rows {
  float* q;       // [rows][head_dim]
  float* sums;    // [rows][head_dim]
  float* scores;  // [rows][32]
  float* maxima;  // [rows]
  float* totals;  // [rows]
};

template <class V>
inline float exp_one(float x) {
  float lanes[V::kWidth];
  V::store(lanes, exp<V>(V::broadcast(x)));
  return lanes[0];
}

// Slots of a block that a token sees: [from, to).
struct Visible {
  int from;
  int to;
};

// Scores of one row against one block become weights; the row's sums shrink to the new maximum.
template <class V>
void soften_row(const Rows& rows, int row, Visible visible, const AttentionArgs& a) {
  float* scores = rows.scores + static_cast<size_t>(row) * kBlockTokens;
  const int head_dim = a.head_dim;
  float max = rows.maxima[row];
  if (a.score_cap > 0) soft_cap<V>(scores, a.score_cap, kBlockTokens);
  for (int t = 0; t < visible.from; ++t) scores[t] = -__builtin_inff();
  for (int t = visible.to; t < kBlockTokens; ++t) scores[t] = -__builtin_inff();
  float maxima[kRowAlign];
  for (int t = 0; t < kRowAlign; ++t) {
    const float low = scores[t], high = scores[t + kRowAlign];
    maxima[t] = low > high ? low : high;
  }
  for (int t = 0; t < kRowAlign; ++t) max = maxima[t] > max ? maxima[t] : max;
  const typename V::F shift = V::broadcast(max);
  float lanes[kRowAlign];
  for (int t = 0; t < kRowAlign; t += V::kWidth) {
    const typename V::F low = exp<V>(V::subtract(V::load(scores + t), shift));
    const typename V::F high = exp<V>(V::subtract(V::load(scores + t + kRowAlign), shift));
    V::store(scores + t, low);
    V::store(scores + t + kRowAlign, high);
    V::store(lanes + t, V::add(low, high));
  }
  const float keep = exp_one<V>(rows.maxima[row] - max);
  rows.totals[row] = rows.totals[row] * keep + sum_lanes(lanes);
  rows.maxima[row] = max;
  float* sums = rows.sums + static_cast<size_t>(row) * head_dim;
  const typename V::F scale = V::broadcast(keep);
  for (int i = 0; i < head_dim; i += V::kWidth) {
    V::store(sums + i, V::multiply(V::load(sums + i), scale));
  }
}

// K and V of one head in one block, and what to fetch while they are worked on.
template <class B>
struct Block {
  const B* keys;
  const B* values;
  Ahead during_keys;
  Ahead during_values;
};

// Rows [first, first + count) against one block, K and V as bf16 or expanded to float32.
template <class V, class B>
void attend_block(const AttentionArgs& a, const Rows& rows, int first, int count, Visible visible,
                  const Block<B>& block) {
  const int head_dim = a.head_dim;
  const size_t start = static_cast<size_t>(first);
  float* scores = rows.scores + start * kBlockTokens;
  product<V>(rows.q + start * head_dim, head_dim, count, head_dim, block.keys, kBlockTokens,
             kBlockTokens, scores, kBlockTokens, true, block.during_keys);
  for (int row = first; row < first + count; ++row) {
    soften_row<V>(rows, row, visible, a);
  }
  product<V>(scores + visible.from, kBlockTokens, count, visible.to - visible.from,
             block.values + static_cast<size_t>(visible.from) * head_dim, head_dim, head_dim,
             rows.sums + start * head_dim, head_dim, false, block.during_values);
}

// All rows that see the block which starts at `start`. Tokens whose own position or whose window's
// edge lies in the block see a part of it and go one by one; the others see it whole and go
// together.
template <class V, class B>
void attend_rows(const AttentionArgs& a, const Rows& rows, int start, const Block<B>& block) {
  const int end = start + kBlockTokens;
  // Tokens before this one see the first slot of the block.
  const int leaving = a.window == 0 ? a.num_tokens : start + a.window - a.first_position;
  for (int token = 0; token < a.num_tokens;) {
    const int position = a.first_position + token;
    const int seen = first_seen(a, position);
    if (seen >= end) return;
    int count = 1;
    if (position >= end - 1 && seen <= start) {
      count = (leaving < a.num_tokens ? leaving : a.num_tokens) - token;
      attend_block<V>(a, rows, token * a.group, count * a.group, {0, kBlockTokens}, block);
    } else if (position >= start) {
      const Visible visible = {seen > start ? seen - start : 0,
                               position < end ? position - start + 1 : kBlockTokens};
      attend_block<V>(a, rows, token * a.group, a.group, visible, block);
    }
    token += count;
  }
}

template <class V>
Rows place_rows(const AttentionArgs& a) {
  const size_t count = static_cast<size_t>(a.num_tokens) * a.group;
  Rows rows;
  rows.q = a.scratch;
  rows.sums = rows.q + count * a.head_dim;
  rows.scores = rows.sums + count * a.head_dim;
  rows.maxima = rows.scores + count * kBlockTokens;
  rows.totals = rows.maxima + count;
  for (int token = 0; token < a.num_tokens; ++token) {
    const size_t length = static_cast<size_t>(a.group) * a.head_dim;
    __builtin_memcpy(rows.q + token * length, a.q + token * a.q_stride, length * sizeof(float));
  }
  for (size_t i = 0; i < count * a.head_dim; ++i) rows.sums[i] = 0;
  for (size_t i = 0; i < count; ++i) rows.maxima[i] = -__builtin_inff();
  for (size_t i = 0; i < count; ++i) rows.totals[i] = 0;
  return rows;
}

template <class V>
void attend(const AttentionArgs& a) {
  const int count = a.num_tokens * a.group;
  const size_t elements = static_cast<size_t>(kBlockTokens) * a.head_dim;
  const Rows rows = place_rows<V>(a);
  float* expanded = rows.totals + count;
  const int last = (a.first_position + a.num_tokens - 1) / kBlockTokens;
  for (int index = first_seen(a, a.first_position) / kBlockTokens; index <= last; ++index) {
    const size_t offset = a.block_table[index] * a.block_bytes;
    const size_t next = a.block_table[index < last ? index + 1 : index] * a.block_bytes;
    const uint16_t* keys = reinterpret_cast<const uint16_t*>(a.keys + offset);
    const uint16_t* values = reinterpret_cast<const uint16_t*>(a.values + offset);
    const Ahead its_values = {values, a.head_dim};
    const Ahead next_keys = {a.keys + next, index < last ? a.head_dim : 0};
    if (count <= V::kRows) {
      attend_rows<V, uint16_t>(a, rows, index * kBlockTokens,
                               {keys, values, its_values, next_keys});
    } else {
      expand<V>(keys, elements, expanded);
      expand<V>(values, elements, expanded + elements);
      attend_rows<V, float>(a, rows, index * kBlockTokens,
                            {expanded, expanded + elements, next_keys, {}});
    }
  }
  for (int row = 0; row < count; ++row) {
    const size_t column = static_cast<size_t>(row % a.group) * a.head_dim;
    float* out = a.out + (row / a.group) * a.out_stride + column;
    const float* sums = rows.sums + static_cast<size_t>(row) * a.head_dim;
    for (int i = 0; i < a.head_dim; ++i) out[i] = sums[i] / rows.totals[row];
  }
}

template <class V>
Kernels table_of(const char* name) {
  return {name,        2,          gemm<V>,          attend<V>,
          rms_norm<V>, rotate<V>,  silu_multiply<V>, gelu_multiply<V>,
          soft_cap<V>, store_kv<V>};
}

}  // namespace kvasir::vec
