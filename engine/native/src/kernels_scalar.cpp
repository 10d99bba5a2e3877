// The reference path: plain loops, float32 activations and float32 KV. The fast paths are tested
// against it, so it shares no arithmetic with them.
#include <cmath>
#include <limits>

#include "bf16.h"
#include "kernels.h"

namespace kvasir {

namespace {

void gemm(const GemmArgs& g) {
  for (int row = 0; row < g.m; ++row) {
    const float* a = g.a + row * g.a_stride;
    float* c = g.c + row * g.c_stride;
    for (int first = 0; first < g.n; first += kPanelColumns) {
      const uint16_t* panel = g.panels + static_cast<size_t>(first) * g.k;
      float sums[kPanelColumns] = {};
      for (int i = 0; i < g.k; ++i) {
        for (int j = 0; j < kPanelColumns; ++j) {
          sums[j] += a[i] * bf16_to_float(panel[static_cast<size_t>(i) * kPanelColumns + j]);
        }
      }
      for (int j = 0; j < kPanelColumns && first + j < g.n; ++j) {
        const float sum = g.bias == nullptr ? sums[j] : sums[j] + g.bias[first + j];
        c[first + j] = g.store == Store::kAdd ? c[first + j] + sum : sum;
      }
    }
  }
}

void soft_cap(float* x, float cap, int n) {
  for (int i = 0; i < n; ++i) x[i] = cap * std::tanh(x[i] / cap);
}

// One query row: a numerically safe softmax over blocks of the context, in order.
void attend_row(const AttentionArgs& a, const float* q, int position, float* out) {
  float max = -std::numeric_limits<float>::infinity();
  float total = 0;
  for (int i = 0; i < a.head_dim; ++i) out[i] = 0;
  const int seen = first_seen(a, position);
  for (int first = seen / kBlockTokens * kBlockTokens; first <= position; first += kBlockTokens) {
    const size_t offset = a.block_table[first / kBlockTokens] * a.block_bytes;
    const float* keys = reinterpret_cast<const float*>(a.keys + offset);
    const float* values = reinterpret_cast<const float*>(a.values + offset);
    for (int slot = 0; slot < kBlockTokens && first + slot <= position; ++slot) {
      if (first + slot < seen) continue;
      float score = 0;
      for (int i = 0; i < a.head_dim; ++i) score += q[i] * keys[i * kBlockTokens + slot];
      if (a.score_cap > 0) soft_cap(&score, a.score_cap, 1);
      const float max_now = std::fmax(max, score);
      const float keep = std::exp(max - max_now);
      const float weight = std::exp(score - max_now);
      total = total * keep + weight;
      for (int i = 0; i < a.head_dim; ++i) {
        out[i] = out[i] * keep + weight * values[slot * a.head_dim + i];
      }
      max = max_now;
    }
  }
  for (int i = 0; i < a.head_dim; ++i) out[i] /= total;
}

void attend(const AttentionArgs& a) {
  for (int token = 0; token < a.num_tokens; ++token) {
    for (int head = 0; head < a.group; ++head) {
      const size_t column = static_cast<size_t>(head) * a.head_dim;
      attend_row(a, a.q + token * a.q_stride + column, a.first_position + token,
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

void store_kv(const float* k, const float* v, int head_dim, int slot, uint8_t* keys,
              uint8_t* values) {
  float* key_column = reinterpret_cast<float*>(keys) + slot;
  float* value_row = reinterpret_cast<float*>(values) + static_cast<size_t>(slot) * head_dim;
  for (int i = 0; i < head_dim; ++i) {
    key_column[i * kBlockTokens] = k[i];
    value_row[i] = v[i];
  }
}

}  // namespace

const Kernels& scalar_kernels() {
  static const Kernels table = {"scalar", 4,       gemm,          attend,
                                rms_norm, rotate,  silu_multiply, gelu_multiply,
                                soft_cap, store_kv};
  return table;
}

}  // namespace kvasir
