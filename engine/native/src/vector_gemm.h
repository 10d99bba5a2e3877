// Products of float32 activations with bf16 weights by float32 multiply-adds, over V (see
// vector_kernels.h). Every sum runs over k in rising order, whatever the tile.
#pragma once

#include "vector_integer_gemm.h"
#include "vector_tiles.h"

namespace kvasir::vec {

// Two rows of a panel (k = 2 unit and 2 unit + 1): bf16 pairs, or float32 rows of kPanelColumns.
template <class V>
inline __attribute__((always_inline)) void load_pair(const uint16_t* weights, int unit, int column,
                                                     typename V::F* even, typename V::F* odd) {
  V::load_pair(weights + (static_cast<size_t>(unit) * kPanelColumns + column) * 2, even, odd);
}
template <class V>
inline __attribute__((always_inline)) void load_pair(const float* weights, int unit, int column,
                                                     typename V::F* even, typename V::F* odd) {
  const float* row = weights + static_cast<size_t>(unit) * 2 * kPanelColumns + column;
  *even = V::load(row);
  *odd = V::load(row + kPanelColumns);
}

// sums[r][j] += a[r][0..k) * weights
template <class V, int kR, class B>
inline __attribute__((always_inline)) void add_products(const float* a, size_t a_stride, int k,
                                                        const B* weights, int column, Fetch ahead,
                                                        typename V::F (*sums)[V::kColumns]) {
  constexpr int kC = V::kColumns;
  typename V::F even[kC], odd[kC];
  for (int unit = 0; unit < k / 2; ++unit) {
    ahead.fetch(unit);
#pragma GCC unroll 4
    for (int j = 0; j < kC; ++j) {
      load_pair<V>(weights, unit, column + j * V::kWidth, &even[j], &odd[j]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      const typename V::F x = V::broadcast(a[r * a_stride + unit * 2]);
#pragma GCC unroll 4
      for (int j = 0; j < kC; ++j) sums[r][j] = V::fma(x, even[j], sums[r][j]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      const typename V::F x = V::broadcast(a[r * a_stride + unit * 2 + 1]);
#pragma GCC unroll 4
      for (int j = 0; j < kC; ++j) sums[r][j] = V::fma(x, odd[j], sums[r][j]);
    }
  }
  if (k % 2 == 0) return;
#pragma GCC unroll 4
  for (int j = 0; j < kC; ++j) {
    load_pair<V>(weights, k / 2, column + j * V::kWidth, &even[j], &odd[j]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
    const typename V::F x = V::broadcast(a[r * a_stride + k - 1]);
#pragma GCC unroll 4
    for (int j = 0; j < kC; ++j) sums[r][j] = V::fma(x, even[j], sums[r][j]);
  }
}

// Weights widened in registers: for rows that fit few tiles.
template <class V>
struct Bf16Tile {
  static constexpr int kRows = V::kRows;
  static constexpr int kRowUnit = 1;

  template <int kR>
  static void run(const GemmArgs& g, int row, const uint8_t* panel, int column, Fetch ahead) {
    const float* a = reinterpret_cast<const float*>(g.a + row * g.a_stride);
    typename V::F sums[kR][V::kColumns];
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < V::kColumns; ++j) sums[r][j] = V::zero();
    }
    add_products<V, kR>(a, g.a_stride / sizeof(float), g.k,
                        reinterpret_cast<const uint16_t*>(panel), column % kPanelColumns, ahead,
                        sums);
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) store_columns<V>(g, row + r, column, sums[r]);
  }
};

template <class V>
void multiply_bf16(const GemmArgs& g) {
  multiply_tiles<V, Bf16Tile<V>>(g, panel_bytes(WeightFormat::kBf16, g.k), (g.k + 1) / 2);
}

static inline size_t float_row_bytes(int k) {
  return round_up(static_cast<size_t>(k) * sizeof(float), kCacheLineBytes) + kCacheLineBytes;
}

template <class V>
GemmKernel gemm_of(WeightFormat format) {
  if (format != WeightFormat::kBf16) return integer_gemm_of<V>(format);
  return {float_row_bytes, nullptr, multiply_bf16<V>, exercise_floats<V>};
}

}  // namespace kvasir::vec
