// The fast kernels, written once over a vector type V and compiled for each instruction set.
//
// V gives: F (a register of kWidth floats), kRows and kColumns (the register tile, columns in
// registers), and load, load_bf16, load_pair, store, broadcast, zero, fma, add, multiply, divide,
// max, min, round, power_of_two, less. Lanes never mix except in sum_lanes, whose order is fixed at
// 16 lanes: so paths of different width agree bit for bit. No std:: function templates here: what
// one of these translation units emits must not be linked into code for lesser processors.
#pragma once

#include "arena.h"
#include "bf16.h"
#include "kernels.h"

namespace kvasir::vec {

// ---- products -----------------------------------------------------------------------------------

template <class V>
inline typename V::F load_as_float(const float* p) {
  return V::load(p);
}
template <class V>
inline typename V::F load_as_float(const uint16_t* p) {
  return V::load_bf16(p);
}
template <class V>
inline typename V::F load_as_float(const int8_t* p) {
  return V::load_int8(p);
}

// Memory to fetch while computing: `bytes` further on with each step of a product's sum.
struct Ahead {
  const void* data = nullptr;
  int steps = 0;
  int bytes = kCacheLineBytes;
};

// c[kR][kC * width] = (is_first ? 0 : c) + a[kR][k] * b[k][kC * width], summed in the order of k.
template <class V, int kR, int kC, bool kFetches, class B>
void product_tile(const float* a, size_t a_stride, int k, const B* b, size_t b_stride, float* c,
                  size_t c_stride, bool is_first, const char* ahead, int ahead_bytes) {
  typename V::F sums[kR][kC];
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kC; ++j) {
      sums[r][j] = is_first ? V::zero() : V::load(c + r * c_stride + j * V::kWidth);
    }
  }
  for (int i = 0; i < k; ++i) {
    if constexpr (kFetches) __builtin_prefetch(ahead + i * ahead_bytes);
    typename V::F columns[kC];
#pragma GCC unroll 4
    for (int j = 0; j < kC; ++j) {
      columns[j] = load_as_float<V>(b + i * b_stride + j * V::kWidth);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      const typename V::F x = V::broadcast(a[r * a_stride + i]);
#pragma GCC unroll 4
      for (int j = 0; j < kC; ++j) sums[r][j] = V::fma(x, columns[j], sums[r][j]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kC; ++j) V::store(c + r * c_stride + j * V::kWidth, sums[r][j]);
  }
}

template <class V, int kC, bool kFetches, class B>
void product_rows(int rows, const float* a, size_t a_stride, int k, const B* b, size_t b_stride,
                  float* c, size_t c_stride, bool is_first, const char* ahead, int ahead_bytes) {
#define KVASIR_ROWS(R)                                                                            \
  case R:                                                                                         \
    if constexpr (R <= V::kRows) {                                                                \
      return product_tile<V, R, kC, kFetches>(a, a_stride, k, b, b_stride, c, c_stride, is_first, \
                                              ahead, ahead_bytes);                                \
    }                                                                                             \
    break;
  switch (rows) {
    KVASIR_ROWS(1)
    KVASIR_ROWS(2)
    KVASIR_ROWS(3)
    KVASIR_ROWS(4)
    KVASIR_ROWS(5)
    KVASIR_ROWS(6)
    KVASIR_ROWS(7)
    KVASIR_ROWS(8)
    KVASIR_ROWS(9)
    KVASIR_ROWS(10)
    KVASIR_ROWS(11)
    KVASIR_ROWS(12)
  }
#undef KVASIR_ROWS
}

// Any m; n a multiple of 16. Rows are spread evenly over tiles: 16 rows are 8 + 8, not 12 + 4.
template <class V, class B>
void product(const float* a, size_t a_stride, int m, int k, const B* b, size_t b_stride, int n,
             float* c, size_t c_stride, bool is_first, Ahead ahead) {
  constexpr int kWide = V::kColumns * V::kWidth;
  int num_tiles = (m + V::kRows - 1) / V::kRows;
  int step = 0;
  for (int row = 0; row < m; --num_tiles) {
    const int rows = (m - row + num_tiles - 1) / num_tiles;
    const float* a_row = a + row * a_stride;
    float* c_row = c + row * c_stride;
    for (int column = 0; column < n;) {
      const char* next = static_cast<const char*>(ahead.data) + step * ahead.bytes;
      const bool fetches = step < ahead.steps;
      if (column + kWide > n) {
        product_rows<V, 1, false>(rows, a_row, a_stride, k, b + column, b_stride, c_row + column,
                                  c_stride, is_first, next, 0);
        column += V::kWidth;
        continue;
      }
      const auto tile =
          fetches ? product_rows<V, V::kColumns, true, B> : product_rows<V, V::kColumns, false, B>;
      tile(rows, a_row, a_stride, k, b + column, b_stride, c_row + column, c_stride, is_first, next,
           ahead.bytes);
      if (fetches) step += k;
      column += kWide;
    }
    row += rows;
  }
}

template <class V, class B>
void expand(const B* source, size_t count, float* target) {
  for (size_t i = 0; i < count; i += V::kWidth) {
    V::store(target + i, load_as_float<V>(source + i));
  }
}

// ---- elementwise --------------------------------------------------------------------------------

// 16 partial sums to one, always by the same tree.
inline __attribute__((always_inline)) float sum_lanes(const float* lanes) {
  float s[8];
  for (int i = 0; i < 8; ++i) s[i] = lanes[i] + lanes[i + 8];
  for (int i = 0; i < 4; ++i) s[i] += s[i + 4];
  return (s[0] + s[2]) + (s[1] + s[3]);
}

// exp(x), within 2 ulp; exactly 0 below -87.3; NaN stays NaN. Cephes' polynomial.
template <class V>
inline typename V::F exp(typename V::F x) {
  using F = typename V::F;
  const F low = V::broadcast(-87.3f);
  const F clamped = V::max(low, V::min(V::broadcast(88.3f), x));
  const F n = V::round(V::multiply(clamped, V::broadcast(1.44269504088896341f)));
  F r = V::fma(n, V::broadcast(-0.693359375f), clamped);
  r = V::fma(n, V::broadcast(2.12194440e-4f), r);
  F p = V::broadcast(1.9875691500e-4f);
  p = V::fma(p, r, V::broadcast(1.3981999507e-3f));
  p = V::fma(p, r, V::broadcast(8.3334519073e-3f));
  p = V::fma(p, r, V::broadcast(4.1665795894e-2f));
  p = V::fma(p, r, V::broadcast(1.6666665459e-1f));
  p = V::fma(p, r, V::broadcast(5.0000001201e-1f));
  p = V::fma(V::multiply(r, r), p, V::add(r, V::broadcast(1.0f)));
  return V::zero_where_less(V::multiply(p, V::power_of_two(n)), x, low);
}

template <class V>
void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
  const int whole = n / kRowAlign * kRowAlign;
  float lanes[kRowAlign] = {};
  for (int i = 0; i < whole; i += kRowAlign) {
    for (int j = 0; j < kRowAlign; j += V::kWidth) {
      const typename V::F value = V::load(x + i + j);
      V::store(lanes + j, V::fma(value, value, V::load(lanes + j)));
    }
  }
  for (int i = whole; i < n; ++i) lanes[i - whole] = __builtin_fmaf(x[i], x[i], lanes[i - whole]);
  const float mean = sum_lanes(lanes) / static_cast<float>(n);
  const float scale = 1.0f / __builtin_sqrtf(mean + eps);
  const typename V::F scales = V::broadcast(scale);
  for (int i = 0; i < whole; i += V::kWidth) {
    V::store(out + i, V::multiply(V::multiply(V::load(x + i), scales), V::load(weight + i)));
  }
  for (int i = whole; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

template <class V>
void rotate(float* head, const float* cos, const float* sin, int head_dim) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; ++i) {
    const float x1 = head[i], x2 = head[i + half];
    head[i] = x1 * cos[i] - x2 * sin[i];
    head[i + half] = x2 * cos[i] + x1 * sin[i];
  }
}

// body(p) for whole vectors of out[n] that start at p; the last one goes by way of a copy.
template <class V, class Body>
inline void for_vectors(const float* a, const float* b, int n, float* out, const Body& body) {
  const int whole = n / V::kWidth * V::kWidth;
  for (int i = 0; i < whole; i += V::kWidth) {
    V::store(out + i, body(V::load(a + i), V::load(b + i)));
  }
  if (whole == n) return;
  float last[2][V::kWidth] = {};
  for (int i = whole; i < n; ++i) {
    last[0][i - whole] = a[i];
    last[1][i - whole] = b[i];
  }
  V::store(last[0], body(V::load(last[0]), V::load(last[1])));
  for (int i = whole; i < n; ++i) out[i] = last[0][i - whole];
}

// x / (1 + exp(-s)): x times the logistic function of s
template <class V>
inline typename V::F logistic_times(typename V::F x, typename V::F s) {
  const typename V::F one = V::broadcast(1.0f);
  return V::divide(x, V::add(one, exp<V>(V::subtract(V::zero(), s))));
}

template <class V>
void silu_multiply(const float* gate, const float* up, int n, float* out) {
  for_vectors<V>(gate, up, n, out, [](typename V::F g, typename V::F u) {
    return V::multiply(logistic_times<V>(g, g), u);
  });
}

// 0.5 x (1 + tanh(u)) is x times the logistic function of 2u.
template <class V>
void gelu_multiply(const float* gate, const float* up, int n, float* out) {
  for_vectors<V>(gate, up, n, out, [](typename V::F g, typename V::F u) {
    const typename V::F cubic = V::multiply(V::broadcast(0.044715f), V::multiply(g, g));
    const typename V::F inner = V::fma(cubic, g, g);
    const typename V::F s = V::multiply(V::broadcast(1.5957691216057308f), inner);
    return V::multiply(logistic_times<V>(g, s), u);
  });
}

// tanh(x) as 2 / (1 + exp(-2x)) - 1; near zero its error is one unit of 1.0, times cap.
template <class V>
void soft_cap(float* x, float cap, int n) {
  const float slope = 2.0f / cap;
  for_vectors<V>(x, x, n, x, [=](typename V::F value, typename V::F) {
    const typename V::F s = V::multiply(value, V::broadcast(slope));
    const typename V::F grown = logistic_times<V>(V::broadcast(2.0f * cap), s);
    return V::subtract(grown, V::broadcast(cap));
  });
}

}  // namespace kvasir::vec
