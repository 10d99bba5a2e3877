// Attention over V (see vector_kernels.h): for each segment of the context the scores of all its
// blocks, then their softmax, then the weighted sums of its values; segments join in order.
#pragma once

#include "vector_kernels.h"

namespace kvasir::vec {

template <class V>
inline float exp_one(float x) {
  float lanes[V::kWidth];
  V::store(lanes, exp<V>(V::broadcast(x)));
  return lanes[0];
}

// K or V of one head in one block. Scales follow codes; bf16 has none.
template <class E>
inline const E* elements_of(const AttentionArgs& a, const uint8_t* first_block, int index) {
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
  float* expanded;      // one block's K or V as float32
  float* key_scales;    // [kSegmentTokens]
  float* value_scales;  // the same

  Workspace(const AttentionArgs& a, int rows) {
    const size_t count = rows;
    q_stride = a.head_dim + kAttentionPad;
    score_stride = kSegmentTokens + kAttentionPad;
    q = a.scratch;
    scores = q + count * q_stride;
    joined = scores + count * score_stride;
    part = joined + part_floats(rows, a.head_dim);
    expanded = part + part_floats(rows, a.head_dim);
    key_scales = expanded + static_cast<size_t>(kBlockTokens) * a.head_dim;
    value_scales = key_scales + kSegmentTokens;
    for (int row = 0; row < rows; ++row) {
      const float* source =
          a.q + row / a.group * a.q_stride + static_cast<size_t>(row % a.group) * a.head_dim;
      __builtin_memcpy(q + static_cast<size_t>(row) * q_stride, source, a.head_dim * sizeof(float));
    }
  }
};

// Tokens of the call that see any of the positions.
inline Range tokens_that_see(const AttentionArgs& a, Range positions) {
  Range tokens = {positions.from - a.first_position, a.num_tokens};
  if (tokens.from < 0) tokens.from = 0;
  const int leaving = positions.to + a.window - 1 - a.first_position;
  if (a.window > 0 && leaving < tokens.to) tokens.to = leaving;
  return tokens;
}

// Of `positions`, those that any of the tokens sees: what lies outside may hold anything.
inline Range seen_by(const AttentionArgs& a, Range tokens, Range positions) {
  const int first = first_seen(a, a.first_position + tokens.from);
  const int last = a.first_position + tokens.to;
  return {first > positions.from ? first : positions.from,
          last < positions.to ? last : positions.to};
}

// Scores of one row against positions [from, to) of a segment become weights, zero around them up
// to whole blocks. Fetches meanwhile, lest memory idle.
template <class V, bool kScaled>
void soften_row(const AttentionArgs& a, const Workspace& work, float* scores, Range seen,
                Fetches ahead, float* maximum, float* total) {
  constexpr int kParts = kRowAlign / V::kWidth;
  const int first = seen.from / kBlockTokens * kBlockTokens;
  const int end = (seen.to + kBlockTokens - 1) / kBlockTokens * kBlockTokens;
  if constexpr (kScaled) {
    for (int t = first; t < end; t += V::kWidth) {
      V::store(scores + t, V::multiply(V::load(scores + t), V::load(work.key_scales + t)));
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

  // Scores of one block, or of two side by side where few rows leave registers for it.
  void score() const {
    for (int block = blocks.from; block < blocks.to;) {
      const Range tokens = tokens_that_see(a, positions(block));
      const Range next_tokens = tokens_that_see(a, positions(block + 1));
      const bool is_pair = !expands() && block + 1 < blocks.to && next_tokens.from == tokens.from &&
                           next_tokens.to == tokens.to;
      const int count = is_pair ? 2 : 1;
      const int read = block - blocks.from;
      const size_t row = static_cast<size_t>(tokens.from) * a.group;
      const E* keys = elements_of<E>(a, a.keys, block);
      const E* more = is_pair ? elements_of<E>(a, a.keys, block + 1) : nullptr;
      const auto multiply = [&](const auto* k, const auto* k2) {
        product<V>(
            Product{work.q + row * work.q_stride, static_cast<size_t>(work.q_stride), a.head_dim,
                    Columns{k, size_t{kBlockTokens}, k2, kBlockTokens}, count * kBlockTokens,
                    work.scores + row * work.score_stride + (block * kBlockTokens - start),
                    static_cast<size_t>(work.score_stride), true},
            tokens.count() * a.group, is_pair ? fetch_pair(read) : fetch(read));
      };
      if constexpr (kHasScales<E>) {
        for (int i = 0; i < count; ++i) fetch_value_scales(block + i);
      }
      if (expands()) {
        expand<V>(keys, static_cast<size_t>(kBlockTokens) * a.head_dim, work.expanded,
                  nth_read(read + 1));
        multiply(static_cast<const float*>(work.expanded), static_cast<const float*>(nullptr));
      } else {
        multiply(keys, more);
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
        continue;
      }
      const Range mine = seen_by(a, {token, token + 1}, seen);
      soften_row<V, kHasScales<E>>(
          a, work, work.scores + static_cast<size_t>(row) * work.score_stride,
          {mine.from - start, mine.to - start}, fetch_softening(row, num_rows), &part.maxima[row],
          &part.totals[row]);
    }
  }

  void weigh_values() const {
    const size_t width = a.head_dim;
    __builtin_memset(part.sums, 0, a.num_tokens * a.group * width * sizeof(float));
    for (int block = blocks.from; block < blocks.to; ++block) {
      const Range tokens = tokens_that_see(a, positions(block));
      const Range slots = seen_by(a, tokens, positions(block));
      const size_t row = static_cast<size_t>(tokens.from) * a.group;
      const E* values = elements_of<E>(a, a.values, block) +
                        static_cast<size_t>(slots.from % kBlockTokens) * width;
      const auto multiply = [&](const auto* v) {
        product<V>(Product{work.scores + row * work.score_stride + (slots.from - start),
                           static_cast<size_t>(work.score_stride), slots.count(), Columns{v, width},
                           a.head_dim, part.sums + row * width, width, false},
                   tokens.count() * a.group, fetch(blocks.count() + block - blocks.from));
      };
      if (!expands()) {
        multiply(values);
        continue;
      }
      expand<V>(values, slots.count() * width, work.expanded,
                nth_read(blocks.count() + block - blocks.from + 1));
      multiply(static_cast<const float*>(work.expanded));
    }
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
inline Part empty_part(const AttentionArgs& a, float* data) {
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

// ---- writing ------------------------------------------------------------------------------------

inline void store_bf16(const float* k, const float* v, int head_dim, int slot, uint8_t* keys,
                       uint8_t* values) {
  uint16_t* key_column = reinterpret_cast<uint16_t*>(keys) + slot;
  uint16_t* value_row = reinterpret_cast<uint16_t*>(values) + static_cast<size_t>(slot) * head_dim;
  for (int i = 0; i < head_dim; ++i) key_column[i * kBlockTokens] = bf16_from_float(k[i]);
  for (int i = 0; i < head_dim; ++i) value_row[i] = bf16_from_float(v[i]);
}

// One head of one token as codes, `stride` apart, and its scale: the largest is 127.
template <class V>
void quantise(const float* x, int head_dim, int8_t* codes, size_t stride, float* scale) {
  typename V::F highest = V::zero();
  for (int i = 0; i < head_dim; i += V::kWidth) {
    const typename V::F value = V::load(x + i);
    highest = V::max(V::max(value, V::subtract(V::zero(), value)), highest);
  }
  float lanes[V::kWidth];
  V::store(lanes, highest);
  float most = lanes[0];
  for (int i = 1; i < V::kWidth; ++i) most = lanes[i] > most ? lanes[i] : most;
  *scale = most * (1.0f / 127.0f);
  const typename V::F inverse = V::broadcast(most > 0 ? 127.0f / most : 0);
  const typename V::F low = V::broadcast(-127.0f), high = V::broadcast(127.0f);
  for (int i = 0; i < head_dim; i += V::kWidth) {
    const typename V::F rounded = V::round(V::multiply(V::load(x + i), inverse));
    V::store(lanes, V::min(V::max(rounded, low), high));  // as code_of() does, NaN included
    for (int j = 0; j < V::kWidth; ++j) codes[(i + j) * stride] = static_cast<int8_t>(lanes[j]);
  }
}

template <class V>
void store_int8(const float* k, const float* v, int head_dim, int slot, uint8_t* keys,
                uint8_t* values) {
  const size_t num_codes = static_cast<size_t>(kBlockTokens) * head_dim;
  quantise<V>(k, head_dim, reinterpret_cast<int8_t*>(keys) + slot, kBlockTokens,
              reinterpret_cast<float*>(keys + num_codes) + slot);
  quantise<V>(v, head_dim, reinterpret_cast<int8_t*>(values) + slot * head_dim, 1,
              reinterpret_cast<float*>(values + num_codes) + slot);
}

template <class V>
Kernels table_of(const char* name, GemmKernel (*gemm_of)(WeightFormat)) {
  const KvKernels plain = {
      2, 0, attend<V, uint16_t>, attend_segment<V, uint16_t>, join_segments<V>, store_bf16};
  const KvKernels int8 = {1,
                          sizeof(float),
                          attend<V, int8_t>,
                          attend_segment<V, int8_t>,
                          join_segments<V>,
                          store_int8<V>};
  return {
      name,
      {plain, int8},
      {gemm_of(WeightFormat::kBf16), gemm_of(WeightFormat::kInt8), gemm_of(WeightFormat::kInt4)},
      rms_norm<V>,
      rotate<V>,
      silu_multiply<V>,
      gelu_multiply<V>,
      soft_cap<V>};
}

}  // namespace kvasir::vec
