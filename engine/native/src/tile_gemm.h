// Products by tile registers (AMX), over Ops: the instructions, or a slow model of them.
//
// 2 x 2 tiles of sums: 32 rows of activations times one panel. Tiles 0 to 3 hold sums (row tile
// major), 4 and 5 activations, 6 and 7 weights. Each tile has 16 rows of 64 bytes. One kernel
// serves every number of rows, and a sum runs over k in rising order whatever the tile it lies in.
#pragma once

#include "bf16_rows.h"
#include "integer_rows.h"
#include "kernels.h"

namespace kvasir {

inline constexpr int kTileRows = 16;
inline constexpr size_t kTileRowBytes = 64;
inline constexpr size_t kPanelRowBytes = size_t{4} * kPanelColumns;  // one word of k
inline constexpr size_t kTileBytes = kTileRows * kPanelRowBytes;     // of a panel, 16 words of k

template <class Ops>
struct Bf16Tiles {
  using Sum = float;
  static constexpr WeightFormat kFormat = WeightFormat::kBf16;
  static constexpr int kDepth = 32;  // of k in a tile
  template <int kSums, int kA, int kB>
  static void dot() {
    Ops::template dot_bf16<kSums, kA, kB>();
  }
  static float finish(const GemmArgs&, const uint8_t*, int, int, float sum) { return sum; }
};

template <class Ops>
struct Int8Tiles {
  using Sum = int32_t;
  static constexpr WeightFormat kFormat = WeightFormat::kInt8;
  static constexpr int kDepth = 64;
  template <int kSums, int kA, int kB>
  static void dot() {
    Ops::template dot_int8<kSums, kA, kB>();
  }
  // (sum - what the bias of codes added) * both scales
  static float finish(const GemmArgs& g, const uint8_t* panel, int row, int j, int32_t sum) {
    const RowTail* tail = tail_of(reinterpret_cast<const int8_t*>(g.a + row * g.a_stride), g.k);
    const float* scales = reinterpret_cast<const float*>(
        panel + panel_bytes(WeightFormat::kInt8, g.k) - kScalesBytes);
    return static_cast<float>(sum - tail->sum * kCodeBias) * (tail->scale * scales[j]);
  }
};

// Sums of up to 32 rows and one panel, [32][32], into g.scratch.
template <class Ops, class T>
void sum_block(const GemmArgs& g, const uint8_t* panel, int row) {
  const bool is_tall = g.m - row > kTileRows;
  const uint8_t* a = g.a + row * g.a_stride;
  Ops::template zero<0>();
  Ops::template zero<1>();
  Ops::template zero<2>();
  Ops::template zero<3>();
  const int steps = num_groups(g.k) * kGroupDepth / T::kDepth;
  for (int step = 0; step < steps; ++step) {
    const uint8_t* weights = panel + step * kTileBytes;
    const uint8_t* inputs = a + step * kTileRowBytes;
    Ops::template load<6>(weights, kPanelRowBytes);
    Ops::template load<7>(weights + kTileRowBytes, kPanelRowBytes);
    Ops::template load<4>(inputs, g.a_stride);
    T::template dot<0, 4, 6>();
    T::template dot<1, 4, 7>();
    if (!is_tall) continue;
    Ops::template load<5>(inputs + kTileRows * g.a_stride, g.a_stride);
    T::template dot<2, 5, 6>();
    T::template dot<3, 5, 7>();
  }
  uint8_t* sums = reinterpret_cast<uint8_t*>(g.scratch);
  Ops::template store<0>(sums, kPanelRowBytes);
  Ops::template store<1>(sums + kTileRowBytes, kPanelRowBytes);
  if (!is_tall) return;
  Ops::template store<2>(sums + kTileBytes, kPanelRowBytes);
  Ops::template store<3>(sums + kTileBytes + kTileRowBytes, kPanelRowBytes);
}

template <class Ops, class T>
void multiply_by_tiles(const GemmArgs& g) {
  Ops::configure();
  for (int first = 0; first < g.n; first += kPanelColumns) {
    const uint8_t* panel = g.panels + first / kPanelColumns * panel_bytes(T::kFormat, g.k);
    const int columns = g.n - first < kPanelColumns ? g.n - first : kPanelColumns;
    for (int row = 0; row < g.m; row += 2 * kTileRows) {
      sum_block<Ops, T>(g, panel, row);
      const typename T::Sum* sums = reinterpret_cast<const typename T::Sum*>(g.scratch);
      for (int r = 0; r < 2 * kTileRows && row + r < g.m; ++r) {
        float* c = g.c + (row + r) * g.c_stride + first;
        for (int j = 0; j < columns; ++j) {
          float value = T::finish(g, panel, row + r, j, sums[r * kPanelColumns + j]);
          if (g.bias != nullptr) value += g.bias[first + j];
          c[j] = g.store == Store::kAdd ? c[j] + value : value;
        }
      }
    }
  }
  Ops::release();
}

template <class Ops>
double exercise_bf16_tiles(int rounds) {
  Ops::configure();
  for (int i = 0; i < rounds; ++i) {
    Ops::template dot_bf16<0, 4, 6>();
    Ops::template dot_bf16<1, 4, 7>();
    Ops::template dot_bf16<2, 5, 6>();
    Ops::template dot_bf16<3, 5, 7>();
  }
  Ops::release();
  return 2.0 * rounds * 4 * kTileRows * kTileRows * 32;
}

template <class Ops>
double exercise_int8_tiles(int rounds) {
  Ops::configure();
  for (int i = 0; i < rounds; ++i) {
    Ops::template dot_int8<0, 4, 6>();
    Ops::template dot_int8<1, 4, 7>();
    Ops::template dot_int8<2, 5, 6>();
    Ops::template dot_int8<3, 5, 7>();
  }
  Ops::release();
  return 2.0 * rounds * 4 * kTileRows * kTileRows * 64;
}

// Of bf16 and int8 weights.
template <class Ops>
GemmKernel tile_gemm_of(WeightFormat format) {
  if (format == WeightFormat::kBf16) {
    return {bf16_row_bytes, prepare_bf16_row, multiply_by_tiles<Ops, Bf16Tiles<Ops>>,
            exercise_bf16_tiles<Ops>};
  }
  return {int8_row_bytes, prepare_int8_row, multiply_by_tiles<Ops, Int8Tiles<Ops>>,
          exercise_int8_tiles<Ops>};
}

}  // namespace kvasir
