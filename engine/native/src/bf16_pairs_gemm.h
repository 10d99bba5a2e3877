// Products of bf16 activations with bf16 weights by multiply-adds of pairs (VDPBF16PS), over V (see
// vector_word_tile.h). A sum runs over pairs of k in rising order.
#pragma once

#include "bf16_rows.h"
#include "vector_word_tile.h"

namespace kvasir::vec {

template <class V>
struct PairWords {
  using Sum = typename V::F;
  static constexpr int kRows = V::kRows;
  static constexpr int kDepth = 2;  // of k in a word

  static Sum zero() { return V::zero(); }
  static void finish(const GemmArgs& g, const uint8_t*, int row, int column, const Sum* sums) {
    store_columns<V>(g, row, column, sums);
  }
};

template <class V>
void multiply_pairs(const GemmArgs& g) {
  using Tile = WordTile<V, PairWords<V>>;
  multiply_tiles<V, Tile>(g, panel_bytes(WeightFormat::kBf16, g.k), Tile::num_words(g.k));
}

}  // namespace kvasir::vec
