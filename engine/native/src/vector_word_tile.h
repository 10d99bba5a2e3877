// Products whose operands both come in words of 4 bytes along k: int8, and bf16 pairs.
#pragma once

#include "vector_tiles.h"

namespace kvasir::vec {

// W gives Sum (a register of sums), kRows, zero, and finish, which brings a row of sums to its
// place. V gives Codes and Inputs, words of both operands in the form that dot wants, load_codes,
// broadcast_inputs, and dot, which adds a word's products to each lane. If V gives dot_at, a dot
// that takes its inputs from memory, rows lie interleaved and every second one is read by it: that
// balances loads with instructions.
template <class V>
concept TakesInterleaved = requires { V::dot_at; };

template <class V, class W>
struct WordTile {
  static constexpr int kRows = W::kRows;
  static constexpr int kRowUnit = TakesInterleaved<V> ? kRowGroup : 1;
  static constexpr int kC = V::kColumns;
  static constexpr size_t kUnitBytes = size_t{4} * kPanelColumns;
  static_assert(kRows % kRowUnit == 0);

  template <int kR>
  static void run(const GemmArgs& g, int row, const uint8_t* panel, int column, Fetch ahead) {
    const uint8_t* weights = panel + column % kPanelColumns * 4;
    const size_t stride = TakesInterleaved<V> ? g.words_stride : g.a_stride;
    const uint8_t* a = (TakesInterleaved<V> ? g.words : g.a) + row / kRowUnit * stride;
    typename W::Sum sums[kR][kC];
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kC; ++j) sums[r][j] = W::zero();
    }
    // Panels and prepared rows are padded to whole groups of 64: words come in pairs.
    for (int pairs = num_words(g.k) / 2; pairs > 0; --pairs) {
      ahead.fetch(0);
      ahead.fetch(1);
      add_word<kR>(weights, a, stride, sums);
      add_word<kR>(weights + kUnitBytes, a + 4 * kRowUnit, stride, sums);
      ahead.data += 2 * ahead.stride;
      weights += 2 * kUnitBytes;
      a += 8 * kRowUnit;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) W::finish(g, panel, row + r, column, sums[r]);
  }

  // `a` is the word of row 0; `stride` leads from one group of rows to the next.
  template <int kR>
  static inline __attribute__((always_inline)) void add_word(const uint8_t* weights,
                                                             const uint8_t* a, size_t stride,
                                                             typename W::Sum (*sums)[kC]) {
    typename V::Codes codes[kC];
#pragma GCC unroll 4
    for (int j = 0; j < kC; ++j) codes[j] = V::load_codes(weights + j * V::kWidth * 4);
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      const uint8_t* word = a + r / kRowUnit * stride + r % kRowUnit * 4;
      if constexpr (TakesInterleaved<V>) {
        if (r % 2 == 1) {
#pragma GCC unroll 4
          for (int j = 0; j < kC; ++j) sums[r][j] = V::dot_at(sums[r][j], codes[j], word);
          continue;
        }
      }
      const typename V::Inputs x = V::broadcast_inputs(word);
#pragma GCC unroll 4
      for (int j = 0; j < kC; ++j) sums[r][j] = V::dot(sums[r][j], codes[j], x);
    }
  }

  static int num_words(int k) { return num_groups(k) * kGroupDepth / W::kDepth; }
};

// See GemmKernel::interleave; kDepth of k in a word: 1 of float32 rows, which are not padded.
template <int kDepth>
void interleave_words(const uint8_t* rows, size_t stride, int count, int k, uint8_t* words) {
  const int num_words = kDepth == 1 ? k : num_groups(k) * kGroupDepth / kDepth;
  for (int r = 0; r < count; ++r) {
    for (int i = 0; i < num_words; ++i) {
      __builtin_memcpy(words + (i * kRowGroup + r) * 4, rows + r * stride + i * 4, 4);
    }
  }
}

}  // namespace kvasir::vec
