// Products of float32 activations with bf16 weights by float32 multiply-adds, over V (see
// vector_kernels.h). Every sum runs over k in rising order, whatever the tile.
#pragma once

#include "vector_integer_gemm.h"
#include "vector_tiles.h"

namespace kvasir::vec {

// Whole groups of rows lie interleaved where that suits the tile.
template <class V>
inline constexpr bool kInterleavesFloats = V::kRows % kRowGroup == 0;

// Weights are widened in registers.
template <class V>
struct Bf16Tile {
  static constexpr int kRows = V::kRows;
  static constexpr int kRowUnit = kInterleavesFloats<V> ? kRowGroup : 1;
  static constexpr int kC = V::kColumns;

  // `a` is row 0 at this k; `stride` leads from one unit of rows to the next.
  template <int kR>
  static inline __attribute__((always_inline)) void add_one(const float* a, size_t stride,
                                                            const typename V::F* weights,
                                                            typename V::F (*sums)[kC]) {
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      const float* place = a + r / kRowUnit * stride + r % kRowUnit;
      if constexpr (kInterleavesFloats<V>) {
        if (r % 2 == 1) {
#pragma GCC unroll 4
          for (int j = 0; j < kC; ++j) sums[r][j] = V::fma_at(place, weights[j], sums[r][j]);
          continue;
        }
      }
      const typename V::F x = V::broadcast(*place);
#pragma GCC unroll 4
      for (int j = 0; j < kC; ++j) sums[r][j] = V::fma(x, weights[j], sums[r][j]);
    }
  }

  template <int kR>
  static void run(const GemmArgs& g, int row, const uint8_t* panel, int column, Fetch ahead) {
    const size_t stride = (kRowUnit > 1 ? g.words_stride : g.a_stride) / sizeof(float);
    const float* a =
        reinterpret_cast<const float*>(kRowUnit > 1 ? g.words : g.a) + row / kRowUnit * stride;
    const uint16_t* weights = reinterpret_cast<const uint16_t*>(panel) + column % kPanelColumns * 2;
    typename V::F sums[kR][kC], even[kC], odd[kC];
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kC; ++j) sums[r][j] = V::zero();
    }
    for (int left = g.k; left > 0; left -= 2) {
      ahead.fetch(0);
      ahead.data += ahead.stride;
#pragma GCC unroll 4
      for (int j = 0; j < kC; ++j) V::load_pair(weights + j * V::kWidth * 2, &even[j], &odd[j]);
      add_one<kR>(a, stride, even, sums);
      if (left == 1) break;
      add_one<kR>(a + kRowUnit, stride, odd, sums);
      weights += 2 * kPanelColumns;
      a += 2 * kRowUnit;
    }
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
  return {float_row_bytes, nullptr, multiply_bf16<V>, exercise_floats<V>,
          kInterleavesFloats<V> ? interleave_words<1> : nullptr};
}

}  // namespace kvasir::vec
