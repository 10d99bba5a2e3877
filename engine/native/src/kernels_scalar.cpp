// The reference path: plain loops, float32 activations and float32 KV. The fast paths are tested
// against it, so it shares no arithmetic with them.
#include <cmath>
#include <limits>

#include "bf16.h"
#include "kernels.h"

namespace kvasir {

namespace {

void soft_cap(float* x, float cap, int n) {
  for (int i = 0; i < n; ++i) x[i] = cap * std::tanh(x[i] / cap);
}

// Elements of K or V of one head in one block.
struct Plain {
  const float* values;

  Plain(const uint8_t* data, int) : values(reinterpret_cast<const float*>(data)) {}
  float at(int index, int) const { return values[index]; }
};

struct Codes {
  const int8_t* codes;
  const float* scales;

  Codes(const uint8_t* data, int head_dim)
      : codes(reinterpret_cast<const int8_t*>(data)),
        scales(reinterpret_cast<const float*>(data + kBlockTokens * head_dim)) {}
  float at(int index, int slot) const { return codes[index] * scales[slot]; }
};

// One query row: a numerically safe softmax over the context, in order.
template <class Elements>
void attend_row(const AttentionArgs& a, const float* q, int position, float* out) {
  float max = -std::numeric_limits<float>::infinity();
  float total = 0;
  for (int i = 0; i < a.head_dim; ++i) out[i] = 0;
  const int seen = first_seen(a, position);
  for (int first = seen / kBlockTokens * kBlockTokens; first <= position; first += kBlockTokens) {
    const size_t offset = a.block_table[first / kBlockTokens] * a.block_bytes;
    const Elements keys(a.keys + offset, a.head_dim), values(a.values + offset, a.head_dim);
    for (int slot = 0; slot < kBlockTokens && first + slot <= position; ++slot) {
      if (first + slot < seen) continue;
      float score = 0;
      for (int i = 0; i < a.head_dim; ++i) score += q[i] * keys.at(i * kBlockTokens + slot, slot);
      if (a.score_cap > 0) soft_cap(&score, a.score_cap, 1);
      const float max_now = std::fmax(max, score);
      const float keep = std::exp(max - max_now);
      const float weight = std::exp(score - max_now);
      total = total * keep + weight;
      for (int i = 0; i < a.head_dim; ++i) {
        out[i] = out[i] * keep + weight * values.at(slot * a.head_dim + i, slot);
      }
      max = max_now;
    }
  }
  for (int i = 0; i < a.head_dim; ++i) out[i] /= total;
}

template <class Elements>
void attend(const AttentionArgs& a) {
  for (int token = 0; token < a.num_tokens; ++token) {
    for (int head = 0; head < a.group; ++head) {
      const size_t column = static_cast<size_t>(head) * a.head_dim;
      attend_row<Elements>(a, a.q + token * a.q_stride + column, a.first_position + token,
                           a.out + token * a.out_stride + column);
    }
  }
}

void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
  double squares = 0;
  for (int i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * x[i];
  const float scale = static_cast<float>(1.0 / std::sqrt(squares / n + eps));
  for (int i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

void rotate(float* head, const float* cos, const float* sin, int head_dim) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; ++i) {
    const float x1 = head[i], x2 = head[i + half];
    head[i] = x1 * cos[i] - x2 * sin[i];
    head[i + half] = x2 * cos[i] + x1 * sin[i];
  }
}

void silu_multiply(const float* gate, const float* up, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

void gelu_multiply(const float* gate, const float* up, int n, float* out) {
  constexpr float kSlope = 0.7978845608028654f;  // sqrt(2 / pi)
  for (int i = 0; i < n; ++i) {
    const float x = gate[i];
    out[i] = 0.5f * x * (1.0f + std::tanh(kSlope * (x + 0.044715f * x * x * x))) * up[i];
  }
}

void store_plain(const float* k, const float* v, int head_dim, int slot, uint8_t* keys,
                 uint8_t* values) {
  float* key_column = reinterpret_cast<float*>(keys) + slot;
  float* value_row = reinterpret_cast<float*>(values) + static_cast<size_t>(slot) * head_dim;
  for (int i = 0; i < head_dim; ++i) {
    key_column[i * kBlockTokens] = k[i];
    value_row[i] = v[i];
  }
}

// The largest of a head is 127.
void store_codes(const float* x, int head_dim, int slot, int8_t* codes, int stride,
                 uint8_t* block) {
  float most = 0;
  for (int i = 0; i < head_dim; ++i) most = std::fabs(x[i]) <= most ? most : std::fabs(x[i]);
  const float inverse = most > 0 ? 127.0f / most : 0;
  for (int i = 0; i < head_dim; ++i) codes[i * stride] = code_of(std::nearbyint(x[i] * inverse));
  reinterpret_cast<float*>(block + kBlockTokens * head_dim)[slot] = most * (1.0f / 127.0f);
}

void store_int8(const float* k, const float* v, int head_dim, int slot, uint8_t* keys,
                uint8_t* values) {
  store_codes(k, head_dim, slot, reinterpret_cast<int8_t*>(keys) + slot, kBlockTokens, keys);
  store_codes(v, head_dim, slot, reinterpret_cast<int8_t*>(values) + slot * head_dim, 1, values);
}

}  // namespace

const Kernels& scalar_kernels() {
  static const KvKernels plain = {4, 0, attend<Plain>, nullptr, nullptr, store_plain};
  static const KvKernels int8 = {1, sizeof(float), attend<Codes>, nullptr, nullptr, store_int8};
  static const Kernels table = {"scalar",
                                {plain, int8},
                                {scalar_gemm(WeightFormat::kBf16), scalar_gemm(WeightFormat::kInt8),
                                 scalar_gemm(WeightFormat::kInt4)},
                                rms_norm,
                                rotate,
                                silu_multiply,
                                gelu_multiply,
                                soft_cap};
  return table;
}

}  // namespace kvasir
