// The fast kernels, written once over a vector type V and compiled for each instruction set.
//
// V gives: F (a register of kWidth floats), kRegisters (how many there are), kRows and kColumns
// (the tallest register tile, columns in registers), and load, load_bf16, load_pair, store,
// store_codes (rounded to bytes), broadcast, zero, fma, add, multiply, divide, max, min, round,
// power_of_two, less. Lanes never mix except in sum_lanes, whose order is fixed at 16 lanes: so
// paths of different width agree bit for bit. No std:: function templates here: what one of these
// translation units emits must not be linked into code for lesser processors.
#pragma once

#include "arena.h"
#include "bf16.h"
#include "kernels.h"
#include "tile_rows.h"

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

// Memory to fetch while computing: `bytes` from each of two places.
struct Ahead {
  const void* first = nullptr;
  const void* second = nullptr;
  int bytes = 0;
};

// The columns of a product's right operand; from `split` on they lie elsewhere.
template <class B>
struct Columns {
  const B* first;
  size_t stride;  // from one row to the next
  const B* second = nullptr;
  int split = 1 << 30;

  inline __attribute__((always_inline)) const B* at(int column) const {
    return column < split ? first + column : second + (column - split);
  }
};

// c[m][n] = (is_first ? 0 : c) + a[m][k] * columns[k][n], summed in the order of k.
template <class B>
struct Product {
  const float* a;
  size_t a_stride;
  int k;
  Columns<B> columns;
  int n;  // a multiple of 16
  float* c;
  size_t c_stride;
  bool is_first;
};

// What a tile fetches with each step of k: the same lines again and again without `step`.
struct Fetches {
  const char* first;
  const char* second;
  int step;  // bytes
};

// What is expanded comes from the cache.
template <class B>
inline constexpr bool kFetches = sizeof(B) < sizeof(float);

template <class V, int kR, int kC, class B>
void product_tile(const Product<B>& p, int row, int column, Fetches ahead) {
  constexpr int kLow = (kC + 1) / 2;  // registers of columns that surely lie together
  const size_t a_stride = p.a_stride, b_stride = p.columns.stride, c_stride = p.c_stride;
  const float* a = p.a + row * a_stride;
  const B* low = p.columns.at(column);
  const B* high = p.columns.at(column + kC / 2 * V::kWidth);
  float* c = p.c + row * c_stride + column;
  typename V::F sums[kR][kC];
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kC; ++j) {
      sums[r][j] = p.is_first ? V::zero() : V::load(c + r * c_stride + j * V::kWidth);
    }
  }
  for (int i = 0; i < p.k; ++i) {
    if constexpr (kFetches<B>) {
      __builtin_prefetch(ahead.first);
      __builtin_prefetch(ahead.second);
      ahead.first += ahead.step;
      ahead.second += ahead.step;
    }
    typename V::F columns[kC];
#pragma GCC unroll 8
    for (int j = 0; j < kC; ++j) {
      columns[j] = load_as_float<V>(j < kLow ? low + j * V::kWidth : high + (j - kLow) * V::kWidth);
    }
    low += b_stride;
    high += b_stride;
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      const typename V::F x = V::broadcast(a[r * a_stride + i]);
#pragma GCC unroll 8
      for (int j = 0; j < kC; ++j) sums[r][j] = V::fma(x, columns[j], sums[r][j]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kC; ++j) V::store(c + r * c_stride + j * V::kWidth, sums[r][j]);
  }
}

// Registers of columns of the widest tile of so many rows: sums, columns and a broadcast fit the
// registers. Few rows need wide tiles, or too few sums are on their way at a time.
template <class V>
constexpr int widest_tile(int rows) {
  int columns = 8;
  while ((rows + 1) * columns + 1 > V::kRegisters) columns /= 2;
  return columns;
}

// The widest tile that still fits; returns its columns.
template <class V, int kR, int kC, class B>
int product_columns(const Product<B>& p, int row, int column, Fetches ahead) {
  if constexpr (kC > 1) {
    if (column + kC * V::kWidth > p.n) {
      return product_columns<V, kR, kC / 2>(p, row, column, ahead);
    }
  }
  product_tile<V, kR, kC>(p, row, column, ahead);
  return kC * V::kWidth;
}

// Rows are spread evenly over tiles: 16 rows are 8 + 8, not 12 + 4. The first tiles' rows fetch.
template <class V, class B>
void product(const Product<B>& p, int m, Ahead ahead) {
  constexpr int kSquareRows = 6;  // fewer broadcasts than a tall tile, where columns cost nothing
  const bool is_square = !kFetches<B> && p.n >= 4 * V::kWidth;
  const int most = is_square ? kSquareRows : V::kRows;
  int num_tiles = (m + most - 1) / most;
  for (int row = 0; row < m; --num_tiles) {
    const int rows = (m - row + num_tiles - 1) / num_tiles;
    const char* here = reinterpret_cast<const char*>(p.c);
    Fetches fetches = {here, here, 0};
    with_rows<V::kRows>(rows, [&](auto count) {
      constexpr int kR = decltype(count)::value;
      constexpr int kWide = widest_tile<V>(kR) * V::kWidth;
      if (row == 0 && ahead.bytes > 0) {
        const unsigned steps = p.k * ((p.n + kWide - 1) / kWide);
        fetches = {static_cast<const char*>(ahead.first), static_cast<const char*>(ahead.second),
                   static_cast<int>(ahead.bytes / steps)};
      }
      for (int column = 0; column < p.n;) {
        column += product_columns<V, kR, widest_tile<V>(kR)>(p, row, column, fetches);
        fetches.first += static_cast<ptrdiff_t>(p.k) * fetches.step;
        fetches.second += static_cast<ptrdiff_t>(p.k) * fetches.step;
      }
    });
    row += rows;
  }
}

// Fetches as much from `next` on; null: nothing.
template <class V, class B>
void expand(const B* source, size_t count, float* target, const B* next) {
  if (next == nullptr) next = source;
  for (size_t i = 0; i < count; i += V::kWidth) {
    __builtin_prefetch(next + i);
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
  constexpr int kParts = kRowAlign / V::kWidth;
  const int whole = n / kRowAlign * kRowAlign;
  typename V::F squares[kParts];
  for (int j = 0; j < kParts; ++j) squares[j] = V::zero();
  for (int i = 0; i < whole; i += kRowAlign) {
#pragma GCC unroll 2
    for (int j = 0; j < kParts; ++j) {
      const typename V::F value = V::load(x + i + j * V::kWidth);
      squares[j] = V::fma(value, value, squares[j]);
    }
  }
  float lanes[kRowAlign];
  for (int j = 0; j < kParts; ++j) V::store(lanes + j * V::kWidth, squares[j]);
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
