// Products whose operands both come in words of 4 bytes along k: int8, and bf16 pairs.
#pragma once

#include "vector_tiles.h"

namespace kvasir::vec {

// W gives Sum (a register of sums), kRows, zero, and finish, which brings a row of sums to its
// place. V gives Codes and Inputs, words of both operands in the form that dot wants, load_codes,
// broadcast_inputs, and dot, which adds a word's products to each lane.
template <class V, class W>
struct WordTile {
  static constexpr int kRows = W::kRows;
  static constexpr int kC = V::kColumns;
  static constexpr size_t kUnitBytes = size_t{4} * kPanelColumns;
  static constexpr int kUnroll = 2;  // panels and prepared rows are padded to whole groups of 64

  template <int kR>
  static void run(const GemmArgs& g, int row, const uint8_t* panel, int column, Fetch ahead) {
    const int units = num_words(g.k);
    const uint8_t* weights = panel + column % kPanelColumns * 4;
    const uint8_t* a = g.a + row * g.a_stride;
    const size_t a_stride = g.a_stride;
    typename W::Sum sums[kR][kC];
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kC; ++j) sums[r][j] = W::zero();
    }
    for (int unit = 0; unit < units; unit += kUnroll) {
#pragma GCC unroll 2
      for (int u = unit; u < unit + kUnroll; ++u) {
        ahead.fetch(u);
        typename V::Codes codes[kC];
#pragma GCC unroll 4
        for (int j = 0; j < kC; ++j) {
          codes[j] = V::load_codes(weights + u * kUnitBytes + j * V::kWidth * 4);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kR; ++r) {
          const typename V::Inputs x = V::broadcast_inputs(a + r * a_stride + u * 4);
#pragma GCC unroll 4
          for (int j = 0; j < kC; ++j) sums[r][j] = V::dot(sums[r][j], codes[j], x);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) W::finish(g, panel, row + r, column, sums[r]);
  }

  static int num_words(int k) { return num_groups(k) * kGroupDepth / W::kDepth; }
};

}  // namespace kvasir::vec
