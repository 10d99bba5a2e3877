// Products of int8 activations with int8 and int4 weights, over V with integer operations.
//
// V gives beside what vector_kernels.h says: I (a register of 32-bit integers), Codes (a register
// of unsigned weights) and Inputs (4 signed activations, repeated), each in the form that dot
// wants; load_codes, low_codes, high_codes, broadcast_inputs, dot (adds 4 products to each lane),
// to_float, kIntegerRows and kInt4Rows. Integer sums are exact, so only the few float operations
// have an order, and all paths give the same bits.
#pragma once

#include "integer_rows.h"
#include "vector_exercise.h"
#include "vector_word_tile.h"

namespace kvasir::vec {

template <class V>
struct Int8Words {
  using Sum = typename V::I;
  static constexpr int kRows = V::kIntegerRows;
  static constexpr int kDepth = 4;  // of k in a word

  static Sum zero() { return V::zero_integers(); }

  // (sums - what the bias of codes added) * both scales
  static inline __attribute__((always_inline)) void finish(const GemmArgs& g, const uint8_t* panel,
                                                           int row, int column, const Sum* sums) {
    const float* scales = reinterpret_cast<const float*>(
                              panel + panel_bytes(WeightFormat::kInt8, g.k) - kScalesBytes) +
                          column % kPanelColumns;
    const RowTail* tail = tail_of(reinterpret_cast<const int8_t*>(g.a + row * g.a_stride), g.k);
    const typename V::I excess = V::broadcast_integer(tail->sum * kCodeBias);
    const typename V::F scale = V::broadcast(tail->scale);
    typename V::F values[V::kColumns];
#pragma GCC unroll 4
    for (int j = 0; j < V::kColumns; ++j) {
      const typename V::F both = V::multiply(scale, V::load(scales + j * V::kWidth));
      values[j] = V::multiply(V::to_float(V::subtract_integers(sums[j], excess)), both);
    }
    store_columns<V>(g, row, column, values);
  }
};

// Pairs of cache lines of one group of a panel.
constexpr int kUnitsOfGroup = static_cast<int>(kInt4GroupBytes / kCacheLineBytes / 2);

template <class V>
struct Int4Tile {
  static constexpr int kRows = V::kInt4Rows;
  static constexpr int kRowUnit = 1;
  static constexpr int kC = V::kColumns;

  // Adds the products of one group: exact integers, then scaled.
  template <int kR>
  static inline __attribute__((always_inline)) void add_group(const GemmArgs& g, const uint8_t* a,
                                                              int group, const uint8_t* codes,
                                                              const uint8_t* scales,
                                                              typename V::F (*totals)[kC]) {
    typename V::I sums[kR][kC];
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kC; ++j) sums[r][j] = V::zero_integers();
    }
#pragma GCC unroll 1
    for (int i = 0; i < kInt4Depth / 8; ++i) {
      typename V::Codes low[kC], high[kC];
#pragma GCC unroll 4
      for (int j = 0; j < kC; ++j) {
        const uint8_t* bytes = codes + i * 4 * kPanelColumns + j * V::kWidth * 4;
        low[j] = V::low_codes(bytes);
        high[j] = V::high_codes(bytes);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kR; ++r) {
        const uint8_t* x = a + r * g.a_stride + group * kInt4Depth + i * 8;
        const typename V::Inputs first = V::broadcast_inputs(x);
        const typename V::Inputs second = V::broadcast_inputs(x + 4);
#pragma GCC unroll 4
        for (int j = 0; j < kC; ++j) {
          sums[r][j] = V::dot(V::dot(sums[r][j], low[j], first), high[j], second);
        }
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kC; ++j) {
      const uint16_t* bits = reinterpret_cast<const uint16_t*>(scales) + j * V::kWidth;
      const typename V::F scale = V::load_bf16(bits);
      const typename V::F offset = V::load_bf16(bits + kPanelColumns);
#pragma GCC unroll 16
      for (int r = 0; r < kR; ++r) {
        const int8_t* row = reinterpret_cast<const int8_t*>(a + r * g.a_stride);
        const GroupTail* tail = group_tails_of(row, g.k) + group;
        const typename V::F sum = V::multiply(V::to_float(sums[r][j]), V::broadcast(tail->scale));
        totals[r][j] = V::fma(sum, scale, totals[r][j]);
        totals[r][j] = V::fma(V::broadcast(tail->sum), offset, totals[r][j]);
      }
    }
  }

  template <int kR>
  static void run(const GemmArgs& g, int row, const uint8_t* panel, int column, Fetch ahead) {
    const int inside = column % kPanelColumns;
    const uint8_t* a = g.a + row * g.a_stride;
    typename V::F totals[kR][kC];
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kC; ++j) totals[r][j] = V::zero();
    }
    for (int group = 0; group < padded_depth(g.k) / kInt4Depth; ++group) {
      const uint8_t* block = panel + group * kInt4GroupBytes;
#pragma GCC unroll 5
      for (int i = 0; i < kUnitsOfGroup; ++i) ahead.fetch(group * kUnitsOfGroup + i);
      add_group<kR>(g, a, group, block + inside * 4,
                    block + kInt4ScalesOffset + inside * sizeof(uint16_t), totals);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) store_columns<V>(g, row + r, column, totals[r]);
  }
};

template <class V>
void multiply_int8(const GemmArgs& g) {
  using Tile = WordTile<V, Int8Words<V>>;
  multiply_tiles<V, Tile>(g, panel_bytes(WeightFormat::kInt8, g.k), Tile::num_words(g.k));
}

template <class V>
void multiply_int4(const GemmArgs& g) {
  multiply_tiles<V, Int4Tile<V>>(g, panel_bytes(WeightFormat::kInt4, g.k),
                                 padded_depth(g.k) / kInt4Depth * kUnitsOfGroup);
}

template <class V>
GemmKernel integer_gemm_of(WeightFormat format) {
  if (format == WeightFormat::kInt8) {
    return {int8_row_bytes, prepare_int8_row, multiply_int8<V>, exercise_integers<V>};
  }
  return {int4_row_bytes, prepare_int4_row, multiply_int4<V>, exercise_integers<V>};
}

}  // namespace kvasir::vec
