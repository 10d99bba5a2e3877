// What all vector products share: the walk over register tiles, fetching ahead, storing results.
//
// A format's product gives a Tile: kRows (most rows of a register tile), kRowUnit (rows of a tile
// are a multiple of it, but for the last), and
// run<kR, kLines>(args, row, panel, column, ahead), which computes kR rows of V::kColumns registers
// of columns over all of k and fetches kLines cache lines from `ahead` on with each unit of a
// panel.
#pragma once

#include "arena.h"
#include "kernels.h"
#include "tile_rows.h"

namespace kvasir::vec {

// Products of fewer rows wait for memory that the processor fetches ahead by itself.
constexpr int kFetchRowsMin = 4;

// Columns [first, first + V::kColumns registers) of one row: (c +) value + bias.
template <class V>
inline __attribute__((always_inline)) void store_columns(const GemmArgs& g, int row, int first,
                                                         const typename V::F* values) {
  float* c = g.c + row * g.c_stride + first;
  if (first + V::kColumns * V::kWidth <= g.n) {
#pragma GCC unroll 4
    for (int j = 0; j < V::kColumns; ++j) {
      typename V::F value = values[j];
      if (g.bias != nullptr) value = V::add(value, V::load(g.bias + first + j * V::kWidth));
      if (g.store == Store::kAdd) value = V::add(V::load(c + j * V::kWidth), value);
      V::store(c + j * V::kWidth, value);
    }
    return;
  }
  float lanes[V::kColumns * V::kWidth];
#pragma GCC unroll 4
  for (int j = 0; j < V::kColumns; ++j) V::store(lanes + j * V::kWidth, values[j]);
  for (int j = 0; j < g.n - first; ++j) {
    const float value = g.bias == nullptr ? lanes[j] : lanes[j] + g.bias[first + j];
    c[j] = g.store == Store::kAdd ? c[j] + value : value;
  }
}

// Memory to fetch while computing. Without a stride it is the same line again and again.
struct Fetch {
  const uint8_t* data;
  size_t stride;

  inline __attribute__((always_inline)) void fetch(int unit) const {
    __builtin_prefetch(data + unit * stride, 0, 2);
  }
};

template <class Tile>
inline void run_tile(int rows, const GemmArgs& g, int row, const uint8_t* panel, int column,
                     Fetch ahead) {
  with_rows<Tile::kRows>(rows, [&](auto count) {
    Tile::template run<decltype(count)::value>(g, row, panel, column, ahead);
  });
}

// All rows and panels. Rows are spread evenly over tiles, in whole groups where they lie
// interleaved: 16 rows are 8 + 8, not 12 + 4. The next
// panel is fetched during the first two passes over this one, or during the only one, then two
// lines at a time: their second comes along by itself.
template <class V, class Tile>
void multiply_tiles(const GemmArgs& g, size_t panel_stride, int units) {
  constexpr int kWide = V::kColumns * V::kWidth;
  const size_t half = static_cast<size_t>(units) * kCacheLineBytes;
  for (int first = 0; first < g.n; first += kPanelColumns) {
    const uint8_t* panel = g.panels + first / kPanelColumns * panel_stride;
    int num_tiles = (g.m + Tile::kRows - 1) / Tile::kRows;
    const bool is_only = num_tiles == 1 && kWide == kPanelColumns;
    const int num_fetches = g.m < kFetchRowsMin ? 0 : is_only ? 1 : 2;
    int pass = 0;
    for (int row = 0; row < g.m; --num_tiles) {
      const int left = g.m - row;
      const int even = (left + num_tiles - 1) / num_tiles;
      const int whole = (even + Tile::kRowUnit - 1) / Tile::kRowUnit * Tile::kRowUnit;
      const int rows = whole < left ? whole : left;
      for (int column = 0; column < kPanelColumns && first + column < g.n; column += kWide) {
        Fetch ahead = {panel, 0};
        if (pass < num_fetches) {
          ahead = {panel + panel_stride + pass * half,
                   is_only ? 2 * kCacheLineBytes : kCacheLineBytes};
        }
        run_tile<Tile>(rows, g, row, panel, first + column, ahead);
        ++pass;
      }
      row += rows;
    }
  }
}

}  // namespace kvasir::vec
