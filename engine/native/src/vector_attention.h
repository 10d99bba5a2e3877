// Attention over V (see vector_kernels.h): for each segment of the context the scores of all its
// blocks, then their softmax, then the weighted sums of its values; segments join in order.
#pragma once

#include "vector_code_product.h"
#include "vector_kernels.h"
#include "vector_kv_store.h"

namespace kvasir::vec {

template <class V>
inline float exp_one(float x) {
  float lanes[V::kWidth];
  V::store(lanes, exp<V>(V::broadcast(x)));
  return lanes[0];
}

// K or V of one head in one block. Scales follow codes; bf16 has none.
template <class E>
static inline const E* elements_of(const AttentionArgs& a, const uint8_t* first_block, int index) {
  return reinterpret_cast<const E*>(first_block + a.block_table[index] * a.block_bytes);
}

template <class E>
inline constexpr bool kHasScales = sizeof(E) == 1;
inline constexpr size_t kScalesOfBlock = kBlockTokens * sizeof(float);

// What a segment adds, see part_floats().
struct Part {
  float* maxima;
  float* totals;
  float* sums;  // [rows][head_dim]

  Part(float* data, int rows) : maxima(data), totals(data + rows), sums(data + 2 * rows) {}
};

// Scratch of one call; row = token * group + head.
struct Workspace {
  int q_stride;
  int score_stride;
  float* q;       // [rows][q_stride]
  float* scores;  // [rows][score_stride]
  float* joined;  // a part
  float* part;
  float* expanded;       // one block's K or V as float32, or codes as words of pairs
  float* key_scales;     // [kSegmentTokens]
  float* value_scales;   // the same
  float* query_scales;   // [rows], of codes only, as what follows
  float* weight_scales;  // [rows]
  int sum_stride;
  int32_t* sums;  // [rows][sum_stride]

  Workspace(const AttentionArgs& a, int rows) {
    const size_t count = rows;
    q_stride = a.head_dim + kAttentionPad;
    score_stride = kSegmentTokens + kAttentionPad;
    q = a.scratch;
    scores = q + count * q_stride;
    joined = scores + count * score_stride;
    part = joined + part_floats(rows, a.head_dim);
    expanded = part + part_floats(rows, a.head_dim);
    sum_stride = code_columns(a.head_dim);
    key_scales = expanded + static_cast<size_t>(kBlockTokens) * sum_stride;
    value_scales = key_scales + kSegmentTokens;
    query_scales = value_scales + kSegmentTokens;
    weight_scales = query_scales + rows;
    sums = reinterpret_cast<int32_t*>(weight_scales + rows);
    for (int row = 0; row < rows; ++row) {
      const float* source =
          a.q + row / a.group * a.q_stride + static_cast<size_t>(row % a.group) * a.head_dim;
      __builtin_memcpy(q + static_cast<size_t>(row) * q_stride, source, a.head_dim * sizeof(float));
    }
  }

  float* scores_of(int row) const { return scores + static_cast<size_t>(row) * score_stride; }

  // Brings queries to 16 bits in place, as codes want them.
  template <class V>
  void halve_queries(const AttentionArgs& a, int rows) const {
    for (int row = 0; row < rows; ++row) {
      float* place = q + static_cast<size_t>(row) * q_stride;
      query_scales[row] = to_halves<V>(place, a.head_dim, reinterpret_cast<int16_t*>(place));
    }
  }
};

// Tokens of the call that see any of the positions.
static inline Range tokens_that_see(const AttentionArgs& a, Range positions) {
  Range tokens = {positions.from - a.first_position, a.num_tokens};
  if (tokens.from < 0) tokens.from = 0;
  const int leaving = positions.to + a.window - 1 - a.first_position;
  if (a.window > 0 && leaving < tokens.to) tokens.to = leaving;
  return tokens;
}

// Of `positions`, those that any of the tokens sees: what lies outside may hold anything.
static inline Range seen_by(const AttentionArgs& a, Range tokens, Range positions) {
  const int first = first_seen(a, a.first_position + tokens.from);
  const int last = a.first_position + tokens.to;
  return {first > positions.from ? first : positions.from,
          last < positions.to ? last : positions.to};
}

// Scores of one row against positions [from, to) of a segment become weights, zero around them up
// to whole blocks; of codes as 16-bit integers. Fetches meanwhile, lest memory idle.
template <class V, bool kScaled>
void soften_row(const AttentionArgs& a, const Workspace& work, int row, Range seen, Fetches ahead,
                float* maximum, float* total) {
  float* scores = work.scores_of(row);
  constexpr int kParts = kRowAlign / V::kWidth;
  const int first = seen.from / kBlockTokens * kBlockTokens;
  const int end = (seen.to + kBlockTokens - 1) / kBlockTokens * kBlockTokens;
  if constexpr (kScaled) {
    const typename V::F scale = V::broadcast(work.query_scales[row]);
    for (int t = first; t < end; t += V::kWidth) {
      const typename V::F both = V::multiply(scale, V::load(work.key_scales + t));
      V::store(scores + t, V::multiply(V::load(scores + t), both));
    }
  }
  if (a.score_cap > 0) soft_cap<V>(scores + first, a.score_cap, end - first);
  for (int t = first; t < seen.from; ++t) scores[t] = -__builtin_inff();
  for (int t = seen.to; t < end; ++t) scores[t] = -__builtin_inff();
  typename V::F highest = V::load(scores + first);
  for (int t = first + V::kWidth; t < end; t += V::kWidth) {
    highest = V::max(V::load(scores + t), highest);
  }
  float lanes[kRowAlign];
  V::store(lanes, highest);
  float max = lanes[0];
  for (int i = 1; i < V::kWidth; ++i) max = lanes[i] > max ? lanes[i] : max;
  const typename V::F shift = V::broadcast(max);
  typename V::F totals[kParts];
  for (int i = 0; i < kParts; ++i) totals[i] = V::zero();
  for (int t = first; t < end; t += kRowAlign) {
    __builtin_prefetch(ahead.first);
    __builtin_prefetch(ahead.second);
    ahead.first += ahead.step;
    ahead.second += ahead.step;
#pragma GCC unroll 2
    for (int i = 0; i < kParts; ++i) {
      float* place = scores + t + i * V::kWidth;
      typename V::F weight = exp<V>(V::subtract(V::load(place), shift));
      totals[i] = V::add(totals[i], weight);
      if constexpr (kScaled) {
        weight = V::multiply(weight, V::load(work.value_scales + t + i * V::kWidth));
      }
      V::store(place, weight);
    }
  }
  for (int i = 0; i < kParts; ++i) V::store(lanes + i * V::kWidth, totals[i]);
  *maximum = max;
  *total = sum_lanes(lanes);
  if constexpr (kScaled) {
    int16_t* halves = reinterpret_cast<int16_t*>(scores) + first;
    work.weight_scales[row] = to_halves<V>(scores + first, end - first, halves);
  }
}

// One segment being attended.
template <class V, class E>
struct Segment {
  const AttentionArgs& a;
  const Workspace& work;
  Part part;
  int start;   // its first position
  Range seen;  // positions that any token sees
  Range blocks;

  Segment(const AttentionArgs& args, const Workspace& workspace, int index, float* data)
      : a(args),
        work(workspace),
        part(data, args.num_tokens * args.group),
        start(index * kSegmentTokens) {
    seen = seen_by(a, {0, a.num_tokens}, {start, start + kSegmentTokens});
    blocks = {seen.from / kBlockTokens, (seen.to + kBlockTokens - 1) / kBlockTokens};
  }

  // Few rows convert K and V in registers, each time they use them; many expand them once.
  bool expands() const { return a.num_tokens * a.group > V::kRows; }
  Range positions(int block) const { return {block * kBlockTokens, (block + 1) * kBlockTokens}; }

  // What is read `i`-th of this segment, K of each block and then V, then what follows it: K of the
  // next segment, or of the caller's next work; may be null.
  const E* nth_read(int i) const {
    const int count = blocks.count();
    if (i < count) return elements_of<E>(a, a.keys, blocks.from + i);
    if (i < 2 * count) return elements_of<E>(a, a.values, blocks.from + i - count);
    const int next = blocks.to + i - 2 * count;
    const int last = (a.first_position + a.num_tokens - 1) / kBlockTokens;
    if (next <= last) return elements_of<E>(a, a.keys, next);
    return reinterpret_cast<const E*>(a.next_keys);
  }

  size_t head_bytes() const {
    const size_t scales = kHasScales<E> ? kBlockTokens * sizeof(float) : 0;
    return static_cast<size_t>(kBlockTokens) * a.head_dim * sizeof(E) + scales;
  }

  // Two reads further on than the i-th, each at half the length.
  Ahead fetch(int i) const {
    const char* next = reinterpret_cast<const char*>(nth_read(i + 2));
    if (next == nullptr) return {};
    const int half = static_cast<int>(head_bytes() / 2);
    return {next, next + half, half};
  }

  // While one of `rows` rows is softened: its share of V's third block, whose first two were
  // fetched with the last scores.
  Fetches fetch_softening(int row, int rows) const {
    const char* values = reinterpret_cast<const char*>(nth_read(blocks.count() + 2));
    const char* here = reinterpret_cast<const char*>(work.q);
    if (values == nullptr || expands()) return {here, here, 0};
    const int half = static_cast<int>(head_bytes() / (2 * rows));
    const char* first = values + static_cast<size_t>(row) * 2 * half;
    return {first, first + half, half / (kSegmentTokens / kRowAlign)};
  }

  // The same of the i-th and the one after it.
  Ahead fetch_pair(int i) const {
    const E* first = nth_read(i + 2);
    const E* second = nth_read(i + 3);
    if (first == nullptr || second == nullptr) return {};
    return {first, second, static_cast<int>(head_bytes())};
  }

  // Scales of what is seen, zero elsewhere: codes are finite whatever they are, scales need not be.
  void read_scales() const {
    const int num_codes = kBlockTokens * a.head_dim;
    for (int block = blocks.from; block < blocks.to; ++block) {
      const float* keys =
          reinterpret_cast<const float*>(elements_of<E>(a, a.keys, block) + num_codes);
      const float* values =
          reinterpret_cast<const float*>(elements_of<E>(a, a.values, block) + num_codes);
      const Range whole = positions(block);
      if (whole.from >= seen.from && whole.to <= seen.to) {
        __builtin_memcpy(work.key_scales + whole.from - start, keys, kScalesOfBlock);
        __builtin_memcpy(work.value_scales + whole.from - start, values, kScalesOfBlock);
        continue;
      }
      for (int slot = 0; slot < kBlockTokens; ++slot) {
        const int position = whole.from + slot;
        const bool is_seen = position >= seen.from && position < seen.to;
        work.key_scales[position - start] = is_seen ? keys[slot] : 0;
        work.value_scales[position - start] = is_seen ? values[slot] : 0;
      }
    }
  }

  // V's scales are wanted before V.
  void fetch_value_scales(int block) const {
    const E* codes = elements_of<E>(a, a.values, block);
    const char* scales = reinterpret_cast<const char*>(codes + kBlockTokens * a.head_dim);
    for (size_t i = 0; i < kScalesOfBlock; i += kCacheLineBytes) __builtin_prefetch(scales + i);
  }

  int32_t* words() const { return reinterpret_cast<int32_t*>(work.expanded); }

  // Rows times `count` columns, to scores from the segment's position `first` on.
  template <class B>
  void score_rows(Range rows, Columns<B> columns, int count, int first, Ahead ahead) const {
    const float* q = work.q + static_cast<size_t>(rows.from) * work.q_stride;
    float* scores = work.scores_of(rows.from) + first;
    const size_t stride = work.score_stride;
    if constexpr (kHasScales<E>) {
      const HalfRows halves = {reinterpret_cast<const int32_t*>(q),
                               static_cast<size_t>(work.q_stride)};
      pair_product<V>(PairProduct<B, float>{halves, a.head_dim / 2, columns, count, scores, stride},
                      rows.count(), ahead);
    } else {
      product<V>(Product<B>{q, static_cast<size_t>(work.q_stride), a.head_dim, columns, count,
                            scores, stride, true},
                 rows.count(), ahead);
    }
  }

  // Scores of one block, or of two side by side where few rows leave registers for it.
  void score() const {
    for (int block = blocks.from; block < blocks.to;) {
      const Range tokens = tokens_that_see(a, positions(block));
      const Range next_tokens = tokens_that_see(a, positions(block + 1));
      const bool is_pair = !expands() && block + 1 < blocks.to && next_tokens.from == tokens.from &&
                           next_tokens.to == tokens.to;
      const int count = is_pair ? 2 : 1;
      const int read = block - blocks.from;
      const E* keys = elements_of<E>(a, a.keys, block);
      const E* more = is_pair ? elements_of<E>(a, a.keys, block + 1) : nullptr;
      const Ahead ahead = is_pair ? fetch_pair(read) : fetch(read);
      const Range rows = {tokens.from * a.group, tokens.to * a.group};
      const int first = block * kBlockTokens - start;
      const int num_columns = count * kBlockTokens;
      if constexpr (kHasScales<E>) {
        for (int i = 0; i < count; ++i) fetch_value_scales(block + i);
      }
      if (!expands()) {
        score_rows(rows, Columns{keys, size_t{kBlockTokens}, more, kBlockTokens}, num_columns,
                   first, ahead);
      } else if constexpr (kHasScales<E>) {
        expand_pairs<V>(keys, kBlockTokens, a.head_dim / 2, kBlockTokens, words(),
                        nth_read(read + 1));
        score_rows(rows, Columns<int32_t>{words(), kBlockTokens}, num_columns, first, {});
      } else {
        expand<V>(keys, static_cast<size_t>(kBlockTokens) * a.head_dim, work.expanded,
                  nth_read(read + 1));
        score_rows(rows, Columns<float>{work.expanded, kBlockTokens}, num_columns, first, {});
      }
      block += count;
    }
  }

  void soften() const {
    if constexpr (kHasScales<E>) read_scales();
    const Range tokens = tokens_that_see(a, {start, start + kSegmentTokens});
    const int num_rows = a.num_tokens * a.group;
    for (int row = 0; row < num_rows; ++row) {
      const int token = row / a.group;
      if (token < tokens.from || token >= tokens.to) {
        part.maxima[row] = -__builtin_inff();
        part.totals[row] = 0;
        work.weight_scales[row] = 0;
        continue;
      }
      const Range mine = seen_by(a, {token, token + 1}, seen);
      soften_row<V, kHasScales<E>>(a, work, row, {mine.from - start, mine.to - start},
                                   fetch_softening(row, num_rows), &part.maxima[row],
                                   &part.totals[row]);
    }
  }

  // Rows of weights from the segment's position `first` on times as many rows of columns, added.
  template <class B>
  void weigh_rows(Range rows, int first, int depth, Columns<B> columns, Ahead ahead) const {
    const float* weights = work.scores_of(rows.from);
    if constexpr (kHasScales<E>) {
      const HalfRows halves = {reinterpret_cast<const int32_t*>(weights) + first / 2,
                               static_cast<size_t>(work.score_stride)};
      const size_t stride = work.sum_stride;
      int32_t* sums = work.sums + rows.from * stride;
      const int count = (a.head_dim + kPairColumns<V> - 1) / kPairColumns<V> * kPairColumns<V>;
      pair_product<V>(PairProduct<B, int32_t>{halves, depth / 2, columns, count, sums, stride},
                      rows.count(), ahead);
    } else {
      const size_t width = a.head_dim;
      product<V>(Product<B>{weights + first, static_cast<size_t>(work.score_stride), depth, columns,
                            a.head_dim, part.sums + rows.from * width, width, false},
                 rows.count(), ahead);
    }
  }

  // What is summed of codes, as numbers.
  void scale_sums() const {
    for (int row = 0; row < a.num_tokens * a.group; ++row) {
      const typename V::F scale = V::broadcast(work.weight_scales[row]);
      const int32_t* sums = work.sums + static_cast<size_t>(row) * work.sum_stride;
      float* out = part.sums + static_cast<size_t>(row) * a.head_dim;
      for (int i = 0; i < a.head_dim; i += V::kWidth) {
        V::store(out + i, V::multiply(V::to_float(V::load_integers(sums + i)), scale));
      }
    }
  }

  void weigh_values() const {
    const size_t width = a.head_dim, num_rows = static_cast<size_t>(a.num_tokens) * a.group;
    if constexpr (kHasScales<E>) {
      __builtin_memset(work.sums, 0, num_rows * work.sum_stride * sizeof(int32_t));
    } else {
      __builtin_memset(part.sums, 0, num_rows * width * sizeof(float));
    }
    for (int block = blocks.from; block < blocks.to; ++block) {
      const Range tokens = tokens_that_see(a, positions(block));
      const Range rows = {tokens.from * a.group, tokens.to * a.group};
      Range slots = seen_by(a, tokens, positions(block));
      if constexpr (kHasScales<E>) slots = {slots.from & ~1, (slots.to + 1) & ~1};  // whole pairs
      const int first = slots.from - start;
      const E* values = elements_of<E>(a, a.values, block) + slots.from % kBlockTokens * width;
      const int read = blocks.count() + block - blocks.from;
      if (!expands()) {
        weigh_rows(rows, first, slots.count(), Columns<E>{values, width}, fetch(read));
      } else if constexpr (kHasScales<E>) {
        expand_pairs<V>(values, width, slots.count() / 2, work.sum_stride, words(),
                        nth_read(read + 1));
        weigh_rows(rows, first, slots.count(),
                   Columns<int32_t>{words(), static_cast<size_t>(work.sum_stride)}, {});
      } else {
        expand<V>(values, slots.count() * width, work.expanded, nth_read(read + 1));
        weigh_rows(rows, first, slots.count(), Columns<float>{work.expanded, width}, {});
      }
    }
    if constexpr (kHasScales<E>) scale_sums();
  }

  void attend() const {
    score();
    soften();
    weigh_values();
  }
};

// Adds the part of the next segment to what the ones before it came to.
template <class V>
void join(const AttentionArgs& a, const Part& next, Part* joined) {
  for (int row = 0; row < a.num_tokens * a.group; ++row) {
    if (next.totals[row] == 0) continue;  // sees nothing of it
    const float before = joined->maxima[row];
    const float max = next.maxima[row] > before ? next.maxima[row] : before;
    const float keep = exp_one<V>(before - max), add = exp_one<V>(next.maxima[row] - max);
    joined->maxima[row] = max;
    joined->totals[row] = joined->totals[row] * keep + next.totals[row] * add;
    float* sums = joined->sums + static_cast<size_t>(row) * a.head_dim;
    const float* added = next.sums + static_cast<size_t>(row) * a.head_dim;
    for (int i = 0; i < a.head_dim; i += V::kWidth) {
      const typename V::F kept = V::multiply(V::load(sums + i), V::broadcast(keep));
      V::store(sums + i, V::fma(V::load(added + i), V::broadcast(add), kept));
    }
  }
}

template <class V>
void write_out(const AttentionArgs& a, const Part& joined) {
  for (int row = 0; row < a.num_tokens * a.group; ++row) {
    const size_t column = static_cast<size_t>(row % a.group) * a.head_dim;
    float* out = a.out + (row / a.group) * a.out_stride + column;
    const float* sums = joined.sums + static_cast<size_t>(row) * a.head_dim;
    const typename V::F total = V::broadcast(joined.totals[row]);
    for (int i = 0; i < a.head_dim; i += V::kWidth) {
      V::store(out + i, V::divide(V::load(sums + i), total));
    }
  }
}

// A part to which nothing has been added.
static inline Part empty_part(const AttentionArgs& a, float* data) {
  const int rows = a.num_tokens * a.group;
  Part part(data, rows);
  for (int row = 0; row < rows; ++row) part.maxima[row] = -__builtin_inff();
  __builtin_memset(part.totals, 0, rows * sizeof(float));
  __builtin_memset(part.sums, 0, static_cast<size_t>(rows) * a.head_dim * sizeof(float));
  return part;
}

template <class V, class E>
void attend(const AttentionArgs& a) {
  const Workspace work(a, a.num_tokens * a.group);
  if constexpr (kHasScales<E>) work.halve_queries<V>(a, a.num_tokens * a.group);
  Part joined = empty_part(a, work.joined);
  const Range segments = segments_of(a);
  for (int index = segments.from; index < segments.to; ++index) {
    const Segment<V, E> segment(a, work, index, work.part);
    segment.attend();
    join<V>(a, segment.part, &joined);
  }
  write_out<V>(a, joined);
}

template <class V, class E>
void attend_segment(const AttentionArgs& a, int index, float* part) {
  const Workspace work(a, a.num_tokens * a.group);
  if constexpr (kHasScales<E>) work.halve_queries<V>(a, a.num_tokens * a.group);
  Segment<V, E>(a, work, index, part).attend();
}

template <class V>
void join_segments(const AttentionArgs& a, const float* parts, int num_parts) {
  const int rows = a.num_tokens * a.group;
  Part joined = empty_part(a, a.scratch);
  for (int i = 0; i < num_parts; ++i) {
    float* data = const_cast<float*>(parts) + i * part_floats(rows, a.head_dim);
    join<V>(a, Part(data, rows), &joined);
  }
  write_out<V>(a, joined);
}

template <class V>
KvKernels int8_kv() {
  return {1,
          sizeof(float),
          attend<V, int8_t>,
          attend_segment<V, int8_t>,
          join_segments<V>,
          store_int8<V>};
}

template <class V>
Kernels table_of(const char* name, GemmKernel (*gemm_of)(WeightFormat)) {
  const KvKernels plain = {
      2, 0, attend<V, uint16_t>, attend_segment<V, uint16_t>, join_segments<V>, store_bf16};
  return {
      name,
      {plain, int8_kv<V>()},
      {gemm_of(WeightFormat::kBf16), gemm_of(WeightFormat::kInt8), gemm_of(WeightFormat::kInt4)},
      rms_norm<V>,
      rotate<V>,
      silu_multiply<V>,
      gelu_multiply<V>,
      soft_cap<V>};
}

}  // namespace kvasir::vec
