#include <cfloat>

#include "kernels.h"

namespace kvasir::cuda {

namespace {

constexpr int kLanes = 32;
constexpr int kBlockTokens = 32;

__device__ inline float to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

// To nearest, ties to even; NaN stays NaN.
__device__ inline uint16_t to_bf16(float value) {
  uint32_t wide;
  memcpy(&wide, &value, sizeof wide);
  const bool is_nan = (wide & 0x7FFFFFFFu) > 0x7F800000u;
  const uint32_t rounded = (wide + 0x7FFFu + ((wide >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(is_nan ? (wide >> 16) | 0x40u : rounded);
}

__device__ inline size_t thread_of_grid() {
  return static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline size_t threads_of_grid() { return static_cast<size_t>(gridDim.x) * blockDim.x; }

// The sum over all threads of a block, by a fixed tree.
__device__ inline float block_sum(float value) {
  __shared__ float warps[kThreads / kLanes];
  const float mine = warp_sum(value);
  block_fence();
  if (threadIdx.x % kLanes == 0) warps[threadIdx.x / kLanes] = mine;
  block_fence();
  float total = 0;
  for (unsigned i = 0; i < blockDim.x / kLanes; ++i) total += warps[i];
  return total;
}

__device__ inline float soft_capped(float value, float cap) { return cap * tanhf(value / cap); }

}  // namespace

__global__ void embed(Tokens tokens, const uint16_t* embeddings, float scale, int hidden,
                      float* x) {
  const uint16_t* source = embeddings + static_cast<size_t>(tokens.ids[blockIdx.x]) * hidden;
  float* target = x + static_cast<size_t>(blockIdx.x) * hidden;
  for (int i = threadIdx.x; i < hidden; i += blockDim.x) target[i] = to_float(source[i]) * scale;
}

__global__ void fill_rope(Tokens tokens, const float* frequencies, const float* scales, int pairs,
                          int count, float* cosines, float* sines) {
  const float position = static_cast<float>(tokens.positions[blockIdx.x]);
  const size_t start = static_cast<size_t>(blockIdx.x) * count;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const double angle = position * frequencies[i];  // a float32 product, as in the reference
    cosines[start + i] = static_cast<float>(cos(angle)) * scales[i / pairs];
    sines[start + i] = static_cast<float>(sin(angle)) * scales[i / pairs];
  }
}

__global__ void normalise(const float* x, const int32_t* rows, const float* weight, float eps,
                          int size, uint16_t* bf16, float* plain) {
  const size_t source = rows == nullptr ? blockIdx.x : rows[blockIdx.x];
  const float* from = x + source * size;
  float squares = 0;
  for (int i = threadIdx.x; i < size; i += blockDim.x) squares += from[i] * from[i];
  const float scale = rsqrtf(block_sum(squares) / static_cast<float>(size) + eps);
  const size_t target = static_cast<size_t>(blockIdx.x) * size;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const float value = from[i] * scale * weight[i];
    if (bf16 != nullptr) bf16[target + i] = to_bf16(value);
    if (plain != nullptr) plain[target + i] = value;
  }
}

__global__ void finish_heads(Tokens tokens, Heads h, LayerKv kv, const float* bias,
                             const float* q_norm, const float* k_norm, const float* cos,
                             const float* sin, int angle_stride, float* qkv) {
  __shared__ float values[kHeadWidthMax];
  const int token = blockIdx.x, head = blockIdx.y, lane = threadIdx.x;
  const int width = h.head_width, half = h.pairs;
  const int num_rows = h.num_heads + 2 * h.num_kv_heads;
  float* mine = qkv + (static_cast<size_t>(token) * num_rows + head) * width;
  const bool is_query = head < h.num_heads;
  const bool is_value = head >= h.num_heads + h.num_kv_heads;
  // 1. Bias and norm.
  float squares = 0;
  for (int i = lane; i < width; i += kLanes) {
    const float value = mine[i] + (bias == nullptr ? 0 : bias[head * width + i]);
    values[i] = value;
    squares += i < h.head_dim ? value * value : 0;
  }
  const float* norm = is_query ? q_norm : k_norm;
  const float sum = warp_sum(squares);
  if (norm != nullptr && !is_value) {
    const float scale = rsqrtf(sum / static_cast<float>(h.head_dim) + h.eps);
    for (int i = lane; i < h.head_dim; i += kLanes) values[i] = values[i] * scale * norm[i];
  }
  warp_fence();
  // 2. Rotation of pairs (i, i + half).
  for (int i = lane; i < half && !is_value; i += kLanes) {
    const float c = cos[static_cast<size_t>(token) * angle_stride + i];
    const float s = sin[static_cast<size_t>(token) * angle_stride + i];
    const float x1 = values[i], x2 = values[i + half];
    values[i] = x1 * c - x2 * s;
    values[i + half] = x2 * c + x1 * s;
  }
  warp_fence();
  // 3. To its place.
  if (is_query) {
    for (int i = lane; i < width; i += kLanes) mine[i] = values[i] * h.query_scale;
    return;
  }
  const int position = tokens.positions[token];
  const int slot = position % kBlockTokens;
  const int32_t* table =
      tokens.tables + static_cast<size_t>(tokens.seqs[token]) * tokens.table_width;
  uint8_t* block = kv.data + table[position / kBlockTokens] * kv.block_bytes;
  const int kv_head = (head - h.num_heads) % h.num_kv_heads;
  uint16_t* target = reinterpret_cast<uint16_t*>(block + (is_value ? kv.half_bytes : 0)) +
                     static_cast<size_t>(kv_head) * width * kBlockTokens;
  for (int i = lane; i < width; i += kLanes) {
    target[is_value ? slot * width + i : i * kBlockTokens + slot] = to_bf16(values[i]);
  }
}

namespace {

// Running sums of one row's softmax; lane l holds values l, l + 32, ... of the head.
template <int kDims>
struct Running {
  float max = -FLT_MAX, total = 0;
  float sums[kDims] = {};

  // Takes in what another part of the context gave.
  __device__ void merge(float other_max, float other_total, const float* other_sums) {
    const float now = fmaxf(max, other_max);
    const float keep = expf(max - now), take = expf(other_max - now);
    total = total * keep + other_total * take;
    for (int j = 0; j < kDims; ++j) sums[j] = sums[j] * keep + other_sums[j] * take;
    max = now;
  }
};

// What a warp works on: rows of an item, and one of the KV heads.
struct WarpRows {
  const Attention& a;
  const AttentionItem& item;
  int kv_head, first, group;

  __device__ int position(int r) const {
    return item.first_position + (item.first_row + first + r) / group;
  }
  __device__ bool is_real(int r) const { return first + r < item.num_rows; }
  __device__ size_t column(int r) const {
    const int row = item.first_row + first + r;
    const size_t token = item.first_token + row / group;
    const int head = kv_head * group + row % group;
    const int num_heads = a.heads.num_heads + 2 * a.heads.num_kv_heads;
    return (token * num_heads + head) * a.heads.head_width;
  }
  __device__ size_t out_column(int r) const {
    const int row = item.first_row + first + r;
    const size_t token = item.first_token + row / group;
    return (token * a.heads.num_heads + kv_head * group + row % group) * a.heads.head_width;
  }
};

// Scores of the warp's rows against one block of K (one token per lane) become weights in `p`, and
// the rows' running sums take in the block's V.
template <int kDims>
__device__ void attend_block(const WarpRows& rows, int block_index, int last_position,
                             const float* q, float (*p)[kLanes], Running<kDims>* running) {
  const Attention& a = rows.a;
  const Heads& h = a.heads;
  const int lane = threadIdx.x % kLanes;
  const int32_t* table =
      a.tokens.tables + static_cast<size_t>(rows.item.seq) * a.tokens.table_width;
  const uint8_t* block = a.kv.data + table[block_index] * a.kv.block_bytes;
  const size_t head = static_cast<size_t>(rows.kv_head) * h.head_width * kBlockTokens;
  const uint16_t* keys = reinterpret_cast<const uint16_t*>(block) + head;
  const uint16_t* values = reinterpret_cast<const uint16_t*>(block + a.kv.half_bytes) + head;

  float scores[kRowsPerWarp] = {};
  for (int i = 0; i < h.head_width; ++i) {
    const float key = to_float(keys[i * kBlockTokens + lane]);
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r)
      scores[r] = fmaf(q[r * h.head_width + i], key, scores[r]);
  }
  const int seen = block_index * kBlockTokens + lane;
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const int position = rows.position(r);
    const bool is_seen = seen <= position && (h.window == 0 || seen > position - h.window);
    float score = h.score_cap > 0 ? soft_capped(scores[r], h.score_cap) : scores[r];
    score = is_seen ? score : -FLT_MAX;
    const float now = fmaxf(running[r].max, warp_max(score));
    const float keep = expf(running[r].max - now);
    const float weight = is_seen ? expf(score - now) : 0;
    running[r].total = running[r].total * keep + warp_sum(weight);
    running[r].max = now;
    for (int j = 0; j < kDims; ++j) running[r].sums[j] *= keep;
    p[r][lane] = weight;
  }
  warp_fence();
  for (int t = 0; t < kBlockTokens; ++t) {
    // A slot that nobody has written yet holds anything, NaN too: its weight is 0, not its product.
    const bool is_used = block_index * kBlockTokens + t <= last_position;
#pragma unroll
    for (int j = 0; j < kDims; ++j) {
      const int i = lane + j * kLanes;
      const float value = is_used && i < h.head_width ? to_float(values[t * h.head_width + i]) : 0;
#pragma unroll
      for (int r = 0; r < kRowsPerWarp; ++r) {
        running[r].sums[j] = fmaf(p[r][t], value, running[r].sums[j]);
      }
    }
  }
  warp_fence();
}

// `kDims`: values of a head that a lane holds.
template <int kDims>
__global__ void attend(Attention a) {
  __shared__ float q[kAttentionWarps][kRowsPerWarp * kHeadWidthMax];
  __shared__ float p[kAttentionWarps][kRowsPerWarp][kLanes];
  const AttentionItem item = a.items[blockIdx.x];
  const int kv_head = blockIdx.y, width = a.heads.head_width;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int group = a.heads.num_heads / a.heads.num_kv_heads;
  const WarpRows rows{a, item, kv_head, warp * kRowsPerWarp, group};
  for (int r = 0; r < kRowsPerWarp; ++r) {
    for (int i = lane; i < width; i += kLanes) {
      q[warp][r * width + i] = rows.is_real(r) ? a.qkv[rows.column(r) + i] : 0;
    }
  }
  warp_fence();

  // The blocks of all the item's rows, so that its warps keep step.
  const int last = item.first_position + (item.first_row + item.num_rows - 1) / group;
  const int first_position = item.first_position + item.first_row / group;
  const bool is_bounded = a.heads.window > 0 && first_position >= a.heads.window;
  const int first = is_bounded ? first_position - a.heads.window + 1 : 0;
  const int first_split = a.num_splits > 0 ? blockIdx.z : first / kSplitTokens;
  const int end_split = a.num_splits > 0 ? blockIdx.z + 1 : last / kSplitTokens + 1;
  constexpr int kSplitBlocks = kSplitTokens / kBlockTokens;

  Running<kDims> all[kRowsPerWarp];
  for (int split = first_split; split < end_split; ++split) {
    Running<kDims> part[kRowsPerWarp];
    const int from = max(first / kBlockTokens, split * kSplitBlocks);
    const int to = min(last / kBlockTokens + 1, (split + 1) * kSplitBlocks);
    for (int b = from; b < to; ++b) attend_block<kDims>(rows, b, last, q[warp], p[warp], part);
    for (int r = 0; r < kRowsPerWarp; ++r) {
      if (a.num_splits == 0) {
        all[r].merge(part[r].max, part[r].total, part[r].sums);
        continue;
      }
      const size_t place =
          ((static_cast<size_t>(blockIdx.x) * a.heads.num_kv_heads + kv_head) * a.num_splits +
           split) *
              kRowsPerItem +
          warp * kRowsPerWarp + r;
      if (lane == 0) a.partials[place] = {part[r].max, part[r].total};
      for (int j = 0; j < kDims; ++j) {
        const int i = lane + j * kLanes;
        if (i < width) a.sums[place * width + i] = part[r].sums[j];
      }
    }
  }
  if (a.num_splits > 0) return;
  for (int r = 0; r < kRowsPerWarp; ++r) {
    if (!rows.is_real(r)) continue;
    for (int j = 0; j < kDims; ++j) {
      const int i = lane + j * kLanes;
      if (i < width) a.out[rows.out_column(r) + i] = to_bf16(all[r].sums[j] / all[r].total);
    }
  }
}

}  // namespace

AttentionKernel attention_kernel(int head_width) {
  if (head_width <= kLanes) return attend<1>;
  if (head_width <= 2 * kLanes) return attend<2>;
  if (head_width <= 4 * kLanes) return attend<4>;
  return attend<8>;
}

__global__ void merge_splits(Attention a) {
  const AttentionItem item = a.items[blockIdx.x];
  const int kv_head = blockIdx.y, width = a.heads.head_width;
  const int group = a.heads.num_heads / a.heads.num_kv_heads;
  const int last = item.first_position + (item.first_row + item.num_rows - 1) / group;
  const int first_position = item.first_position + item.first_row / group;
  const bool is_bounded = a.heads.window > 0 && first_position >= a.heads.window;
  const int first = is_bounded ? first_position - a.heads.window + 1 : 0;
  const size_t start = (static_cast<size_t>(blockIdx.x) * a.heads.num_kv_heads + kv_head) *
                       a.num_splits * kRowsPerItem;
  for (int index = threadIdx.x; index < item.num_rows * width; index += blockDim.x) {
    const int row = index / width, i = index % width;
    Running<1> all;
    for (int split = first / kSplitTokens; split <= last / kSplitTokens; ++split) {
      const size_t place = start + static_cast<size_t>(split) * kRowsPerItem + row;
      all.merge(a.partials[place].max, a.partials[place].total, &a.sums[place * width + i]);
    }
    const WarpRows rows{a, item, kv_head, row, group};
    a.out[rows.out_column(0) + i] = to_bf16(all.sums[0] / all.total);
  }
}

__global__ void gate(const float* gated, const float* up, bool is_gelu, size_t count,
                     uint16_t* out) {
  for (size_t i = thread_of_grid(); i < count; i += threads_of_grid()) {
    const float x = gated[i];
    const float slope = is_gelu ? 1.5957691216057308f * (x + 0.044715f * x * x * x) : x;
    out[i] = to_bf16(x / (1.0f + expf(-slope)) * up[i]);
  }
}

__global__ void add_rows(const float* y, const float* bias, int size, float* x) {
  const size_t start = static_cast<size_t>(blockIdx.x) * size;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    x[start + i] += y[start + i] + (bias == nullptr ? 0 : bias[i]);
  }
}

__global__ void soft_cap(float* x, float cap, size_t count) {
  for (size_t i = thread_of_grid(); i < count; i += threads_of_grid()) {
    x[i] = soft_capped(x[i], cap);
  }
}

__global__ void choose_experts(const float* logits, int num_tokens, int num_experts, int stride,
                               int num_choices, bool is_scaled, int32_t* experts, float* weights) {
  const size_t token = thread_of_grid();
  if (token >= static_cast<size_t>(num_tokens)) return;
  const float* row = logits + token * stride;
  float max = row[0];
  for (int e = 1; e < num_experts; ++e) max = fmaxf(max, row[e]);
  float total = 0;
  for (int c = 0; c < num_choices; ++c) {
    int best = -1;
    for (int e = 0; e < num_experts; ++e) {
      bool is_taken = false;
      for (int d = 0; d < c; ++d) is_taken |= experts[token * num_choices + d] == e;
      if (!is_taken && (best < 0 || row[e] > row[best])) best = e;
    }
    experts[token * num_choices + c] = best;
    weights[token * num_choices + c] = expf(row[best] - max);
    total += is_scaled ? weights[token * num_choices + c] : 0;
  }
  for (int e = 0; e < num_experts && !is_scaled; ++e) total += expf(row[e] - max);
  for (int c = 0; c < num_choices; ++c) weights[token * num_choices + c] /= total;
}

__global__ void gather_rows(const uint16_t* from, const int32_t* source, int size, uint16_t* to) {
  const int row = source[blockIdx.x];
  uint16_t* target = to + static_cast<size_t>(blockIdx.x) * size;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    target[i] = row < 0 ? 0 : from[static_cast<size_t>(row) * size + i];
  }
}

__global__ void combine_experts(const float* rows, const int32_t* slots, const float* weights,
                                int num_choices, int size, float* x) {
  const size_t token = blockIdx.x;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    float sum = x[token * size + i];
    for (int c = 0; c < num_choices; ++c) {
      const size_t choice = token * num_choices + c;
      sum += weights[choice] * rows[static_cast<size_t>(slots[choice]) * size + i];
    }
    x[token * size + i] = sum;
  }
}

__global__ void copy_blocks(const int32_t* blocks, const uint8_t* from, uint8_t* to,
                            size_t block_bytes, size_t offset, size_t bytes) {
  const size_t start = blocks[blockIdx.x] * block_bytes + offset;
  const uint4* source = reinterpret_cast<const uint4*>(from + start);
  uint4* target = reinterpret_cast<uint4*>(to + start);
  const size_t stride = static_cast<size_t>(gridDim.y) * blockDim.x;
  for (size_t i = static_cast<size_t>(blockIdx.y) * blockDim.x + threadIdx.x;
       i < bytes / sizeof(uint4); i += stride) {
    target[i] = source[i];
  }
}

}  // namespace kvasir::cuda
