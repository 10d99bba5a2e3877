// The table of kernels of one path (instruction set), chosen once at load.
//
// Invariant, on every path: an output element depends only on its own row of inputs, and its sum
// runs over K (or over the context, in blocks of 32 absolute positions) in one fixed order. So a
// token's numbers are bitwise the same whatever shares the step with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "weight_format.h"

namespace kvasir {

inline constexpr int kBlockTokens = 32;   // tokens of a KV block
inline constexpr int kGemmRowsMax = 192;  // rows of one gemm call
inline constexpr int kRowAlign = 16;      // floats of the widest vector; a head fills whole ones
// Attention over the context is summed within segments of so many absolute positions, and the
// segments are joined in order: they may be computed apart.
inline constexpr int kSegmentTokens = 256;

// Rows of activations that lie interleaved: few pointers reach them all, each at a fixed offset.
inline constexpr int kRowGroup = 4;

// Floats of scratch that one gemm call needs: a block of sums.
inline constexpr size_t kGemmScratch = size_t{kPanelColumns} * kPanelColumns;

enum class Store { kPlain, kAdd };

// c[m][n] (=|+=) a[m][k] * panels + bias
struct GemmArgs {
  const uint8_t* a;      // rows as the format's kernel takes them
  size_t a_stride;       // bytes
  const uint8_t* words;  // the same rows interleaved, where the kernel wants them so
  size_t words_stride;   // bytes, from one kRowGroup rows to the next
  int m;                 // <= kGemmRowsMax
  int k;
  const uint8_t* panels;  // see weight_format.h
  int n;
  const float* bias;  // [n] or null
  Store store;
  float* c;
  size_t c_stride;
  float* scratch;  // kGemmScratch floats
};

// Products with weights of one format.
struct GemmKernel {
  // Bytes of one row of activations in the form that `multiply` takes: a multiple of a cache line.
  size_t (*row_bytes)(int k);
  // Brings a row into that form, with padded_depth(k) floats of scratch; null: multiply takes
  // float32 rows as they are.
  void (*prepare)(const float* a, int k, float* scratch, void* row);
  void (*multiply)(const GemmArgs& args);
  // Does nothing but the path's multiply-adds, in registers; returns the operations done.
  double (*exercise)(int rounds);
  // Lays up to kRowGroup rows (prepared, or as they are) side by side: word 0 of each, word 1 of
  // each, ...; null: the kernel does not want that.
  void (*interleave)(const uint8_t* rows, size_t stride, int count, int k,
                     uint8_t* words) = nullptr;
};

// Attention of consecutive tokens of one sequence, for the query heads that share one KV head.
struct AttentionArgs {
  const float* q;  // head g of token t: q + t * q_stride + g * head_dim; already scaled
  size_t q_stride;
  float* out;  // laid out as q
  size_t out_stride;
  int num_tokens;
  int group;  // query heads per KV head
  int head_dim;
  int first_position;          // of token 0; token t sees positions up to first_position + t
  int window;                  // ... and no more than this many of them; 0: all
  float score_cap;             // scores become cap * tanh(score / cap); 0: they stay
  const uint8_t* keys;         // this layer's and head's K in block 0 of the pool, see KvKernels
  const uint8_t* values;       // the same of V
  size_t block_bytes;          // from one block of the pool to the next
  const int32_t* block_table;  // pool block of each 32 positions
  const uint8_t* next_keys;    // first K of the work that follows this, to fetch it; or null
  float* scratch;              // attention_scratch() floats
};

// First position that the token at `position` sees.
inline int first_seen(const AttentionArgs& a, int position) {
  return a.window > 0 && position >= a.window ? position - a.window + 1 : 0;
}

struct Range {
  int from;
  int to;
  int count() const { return to - from; }
};

// Segments of the context that any token of the call sees.
inline Range segments_of(const AttentionArgs& a) {
  const int last = a.first_position + a.num_tokens - 1;
  return {first_seen(a, a.first_position) / kSegmentTokens, last / kSegmentTokens + 1};
}

// The int8 code of a rounded value; NaN, which no code stands for, shows in the scale.
inline int8_t code_of(float rounded) {
  const float low = rounded > -127.0f ? rounded : -127.0f;
  return static_cast<int8_t>(low < 127.0f ? low : 127.0f);
}

// What one segment adds to the rows of a call, row = token * group + head: [rows] maxima of the
// scores, [rows] sums of the weights, [rows][head_dim] weighted sums of V.
inline size_t part_floats(int rows, int head_dim) {
  return static_cast<size_t>(rows) * (static_cast<size_t>(head_dim) + 2);
}

inline constexpr int kAttentionPad = kRowAlign;  // floats that keep rows off one set of the cache

// Columns of V as products of codes take them.
inline int code_columns(int head_dim) {
  return (head_dim + 2 * kRowAlign - 1) / (2 * kRowAlign) * (2 * kRowAlign);
}

inline size_t attention_scratch(int rows, int head_dim) {
  const size_t row = size_t{kSegmentTokens} + head_dim + 2 * kAttentionPad;
  const size_t codes = size_t{2} + code_columns(head_dim);
  const size_t block = static_cast<size_t>(kBlockTokens) * code_columns(head_dim);
  return rows * (row + codes) + 2 * part_floats(rows, head_dim) + block +
         2 * size_t{kSegmentTokens};
}

enum class KvFormat { kPlain, kInt8 };

// Work on KV of one format. In a block, one head's K is [head_dim][32] elements and its V
// [32][head_dim]; where elements are codes, each is followed by 32 float32 scales, one per token.
struct KvKernels {
  int element_bytes;  // 1: int8 codes, 2: bf16, 4: float32
  int scale_bytes;    // per token, of K and of V

  void (*attend)(const AttentionArgs& args);
  // One segment apart from the others; null: this path does not.
  void (*attend_segment)(const AttentionArgs& args, int segment, float* part);
  // The parts of consecutive segments, part_floats() each, to what `attend` writes.
  void (*join_segments)(const AttentionArgs& args, const float* parts, int num_parts);
  // Writes one head of one token into its block.
  void (*store)(const float* k, const float* v, int head_dim, int slot, uint8_t* keys,
                uint8_t* values);

  size_t head_bytes(int head_dim) const {  // of K or V of one head in a block
    return static_cast<size_t>(kBlockTokens) * (head_dim * element_bytes + scale_bytes);
  }
};

struct Kernels {
  const char* name;
  KvKernels kv[2];  // by KvFormat

  GemmKernel gemm[kNumFormats];  // by WeightFormat
  // out = x / rms(x) * weight, n elements
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);
  // rotates one head in place: halves (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)
  void (*rotate)(float* head, const float* cos, const float* sin, int head_dim);
  // out = silu(gate) * up
  void (*silu_multiply)(const float* gate, const float* up, int n, float* out);
  // out = gelu(gate) * up, gelu by its tanh approximation
  void (*gelu_multiply)(const float* gate, const float* up, int n, float* out);
  // x = cap * tanh(x / cap), in place
  void (*soft_cap)(float* x, float cap, int n);
};

// Paths compiled in and runnable on this processor, best last.
std::vector<std::string> runnable_paths();

// Throws std::invalid_argument that says which paths there are.
const Kernels& kernels_of(const std::string& path);

// Paths whose products are computed by slow models of instructions, for tests; the rest is scalar.
std::vector<std::string> model_paths();

const Kernels& scalar_kernels();
GemmKernel amx_model_gemm(WeightFormat format);  // bf16 and int8
GemmKernel avx512bf16_model_gemm();              // bf16
GemmKernel scalar_gemm(WeightFormat format);
#ifdef KVASIR_X86
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
GemmKernel avx2_gemm(WeightFormat format);
GemmKernel avx512_gemm(WeightFormat format);
GemmKernel vnni_gemm(WeightFormat format);  // int8 and int4
KvKernels vnni_int8_kv();
GemmKernel avx512bf16_gemm();              // bf16
GemmKernel amx_gemm(WeightFormat format);  // bf16 and int8
bool may_use_amx();                        // asks the kernel
#endif

}  // namespace kvasir
