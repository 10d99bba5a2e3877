// Kernels of a step on the device. All matrices are row-major; bf16 values are their 16 bits.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace kvasir::cuda {

inline constexpr unsigned kThreads = 256;       // of a block that works on one row
inline constexpr unsigned kAttentionWarps = 4;  // of an attention block
inline constexpr int kRowsPerWarp = 4;          // query rows that share a load of K and V
inline constexpr int kRowsPerItem = kAttentionWarps * kRowsPerWarp;
inline constexpr int kHeadWidthMax = 256;

// A step's tokens, on the device.
struct Tokens {
  const int32_t* ids;
  const int32_t* positions;
  const int32_t* seqs;    // sequence of each token
  const int32_t* tables;  // [num_seqs][table_width]
  int table_width;
};

// x[row] = embeddings[ids[row]] * scale
__global__ void embed(Tokens tokens, const uint16_t* embeddings, float scale, int hidden, float* x);

// Cosines and sines of every token, [num_tokens][count]; count is over all rotary embeddings.
__global__ void fill_rope(Tokens tokens, const float* frequencies, const float* scales, int pairs,
                          int count, float* cos, float* sin);

// RMSNorm of x[rows ? rows[row] : row], to bf16 or to float32.
__global__ void normalise(const float* x, const int32_t* rows, const float* weight, float eps,
                          int size, uint16_t* to_bf16, float* to_float);

// Where a layer's K and V lie: block b at data + b * block_bytes, K [head][head_width][32 tokens],
// then V [head][32 tokens][head_width].
struct LayerKv {
  uint8_t* data;
  size_t block_bytes;
  size_t half_bytes;
};

struct Heads {
  int num_heads, num_kv_heads, head_dim, head_width, pairs;
  float eps, query_scale, score_cap;
  int window;
};

// Bias, norm and rotation of one head of one token (grid: tokens, heads); K and V to their block.
__global__ void finish_heads(Tokens tokens, Heads heads, LayerKv kv, const float* bias,
                             const float* q_norm, const float* k_norm, const float* cos,
                             const float* sin, int angle_stride, float* qkv);

// Query rows of one sequence that one block works on; row = token * group + head of the group.
struct AttentionItem {
  int32_t seq, first_token, first_position, first_row, num_rows;
};

struct Partial {
  float max, total;
};

struct Attention {
  Tokens tokens;
  Heads heads;
  LayerKv kv;
  const AttentionItem* items;
  const float* qkv;
  uint16_t* out;      // [tokens][num_heads * head_width]
  int num_splits;     // 0: a block works on all splits of its rows; else grid.z is this
  Partial* partials;  // [items][kv heads][splits][kRowsPerItem]
  float* sums;        // [... the same][head_width]
};

// The attention kernel for heads of a width (grid: items, KV heads, splits).
using AttentionKernel = void (*)(Attention);
AttentionKernel attention_kernel(int head_width);

// Merges the partial results of an item (grid: items, KV heads).
__global__ void merge_splits(Attention a);

// out = act(gated) * up as bf16; gelu by its tanh approximation
__global__ void gate(const float* gated, const float* up, bool is_gelu, size_t count,
                     uint16_t* out);

// x[row] += y[row] + bias
__global__ void add_rows(const float* y, const float* bias, int size, float* x);

__global__ void soft_cap(float* x, float cap, size_t count);

// The strongest experts of each token in falling order and their weights, [num_tokens][choices].
__global__ void choose_experts(const float* logits, int num_tokens, int num_experts, int stride,
                               int num_choices, bool is_scaled, int32_t* experts, float* weights);

// to[row] = from[source[row]]; rows without a source are zero.
__global__ void gather_rows(const uint16_t* from, const int32_t* source, int size, uint16_t* to);

// x[token] += sum over choices of weight * rows[slot], in the order of the choice.
__global__ void combine_experts(const float* rows, const int32_t* slots, const float* weights,
                                int num_choices, int size, float* x);

// Layers [first, first + count) of blocks between the device's pool and the one in host memory.
__global__ void copy_blocks(const int32_t* blocks, const uint8_t* from, uint8_t* to,
                            size_t block_bytes, size_t offset, size_t bytes);

}  // namespace kvasir::cuda
