// Products of int8 codes with rows brought to 16 bits, over V with integer operations: attention
// over int8 KV. Pairs of products are added at a time, sums are exact, so their order does not
// show and all paths give the same bits.
//
// V gives beside what vector_kernels.h says: I (a register of 32-bit integers), pair_codes (two
// rows of 2 registers of codes to 16-bit pairs in the lanes of two registers), unpair (brings
// these to the order of the columns), dot_pairs (adds the products of two pairs to each lane),
// load_integers, store_integers, add_integers, broadcast_integer, to_float, store_halves.
#pragma once

#include "vector_kernels.h"

namespace kvasir::vec {

constexpr float kHalfLevels = 32767.0f;  // 256 products with codes of 127 still fit 32 bits

// Rows of 16-bit integers in words of two along k.
struct HalfRows {
  const int32_t* words;
  size_t stride;  // words from one row to the next

  const int32_t* row(int index) const { return words + index * stride; }
};

// c[m][n] (=|+=) a[m][2 * pairs] * columns[2 * pairs][n]: scores as floats, weighted sums as
// integers. Columns are codes, or words that expand_pairs() made of them.
template <class B, class C>
struct PairProduct {
  HalfRows a;
  int pairs;
  Columns<B> columns;  // words: the stride leads from one pair to the next
  int n;               // whole registers; codes are read in twos of them
  C* c;
  size_t c_stride;
};

template <class V>
constexpr int kPairColumns = 2 * V::kWidth;

template <class V, int kC>
inline __attribute__((always_inline)) void load_pairs(const int8_t* codes, size_t stride,
                                                      typename V::I* words) {
#pragma GCC unroll 4
  for (int j = 0; j < kC; j += 2) {
    V::pair_codes(codes + j * V::kWidth, codes + j * V::kWidth + stride, words + j);
  }
}

template <class V, int kC>
inline __attribute__((always_inline)) void load_pairs(const int32_t* source, size_t,
                                                      typename V::I* words) {
#pragma GCC unroll 8
  for (int j = 0; j < kC; ++j) words[j] = V::load_integers(source + j * V::kWidth);
}

template <class C>
inline constexpr bool kIsSum = false;
template <>
inline constexpr bool kIsSum<int32_t> = true;

template <class V>
inline void store_sum(float* c, typename V::I sum) {
  V::store(c, V::to_float(sum));
}
template <class V>
inline void store_sum(int32_t* c, typename V::I sum) {
  V::store_integers(c, V::add_integers(V::load_integers(c), sum));
}

template <class V, int kR, int kC, class B, class C>
void pair_tile(const PairProduct<B, C>& p, int row, int column, Fetches ahead) {
  constexpr bool kIsCodes = sizeof(B) == 1;
  constexpr int kRowsOfPair = kIsCodes ? 2 : 1;
  constexpr int kHalf = kC / 2;
  constexpr int kLow = kHalf < 2 ? kC : kHalf;  // registers of columns that surely lie together
  const size_t a_stride = p.a.stride, stride = p.columns.stride;
  const int32_t* a = p.a.row(row);
  const B* low = p.columns.at(column);
  const B* high = p.columns.at(column + kLow * V::kWidth);
  typename V::I sums[kR][kC];
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kC; ++j) sums[r][j] = V::zero_integers();
  }
  for (int i = 0; i < p.pairs; ++i) {
    if constexpr (kIsCodes) {
      __builtin_prefetch(ahead.first);
      __builtin_prefetch(ahead.second);
      if constexpr (kIsSum<C>) {  // rows of V are long
        __builtin_prefetch(ahead.first + kCacheLineBytes);
        __builtin_prefetch(ahead.second + kCacheLineBytes);
      }
      ahead.first += ahead.step;
      ahead.second += ahead.step;
    }
    typename V::I words[kC];
    load_pairs<V, kLow>(low, stride, words);
    if constexpr (kLow < kC) load_pairs<V, kC - kLow>(high, stride, words + kLow);
    low += kRowsOfPair * stride;
    high += kRowsOfPair * stride;
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      const typename V::I x = V::broadcast_integer(a[r * a_stride + i]);
#pragma GCC unroll 8
      for (int j = 0; j < kC; ++j) sums[r][j] = V::dot_pairs(sums[r][j], words[j], x);
    }
  }
  C* c = p.c + row * p.c_stride + column;
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kC; j += 2) {
      if constexpr (kIsCodes) V::unpair(&sums[r][j], &sums[r][j + 1]);
      store_sum<V>(c + r * p.c_stride + j * V::kWidth, sums[r][j]);
      store_sum<V>(c + r * p.c_stride + (j + 1) * V::kWidth, sums[r][j + 1]);
    }
  }
}

template <class V, int kR, int kC, class B, class C>
int pair_columns(const PairProduct<B, C>& p, int row, int column, Fetches ahead) {
  if constexpr (kC > 2) {
    if (column + kC * V::kWidth > p.n) return pair_columns<V, kR, kC / 2>(p, row, column, ahead);
  }
  pair_tile<V, kR, kC>(p, row, column, ahead);
  return kC * V::kWidth;
}

// As product() does.
template <class V, class B, class C>
void pair_product(const PairProduct<B, C>& p, int m, Ahead ahead) {
  constexpr bool kIsCodes = sizeof(B) == 1;
  constexpr int kSquareRows = 6;
  const bool is_square = !kIsCodes && p.n >= 4 * V::kWidth;
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
        const unsigned steps = p.pairs * ((p.n + kWide - 1) / kWide);
        fetches = {static_cast<const char*>(ahead.first), static_cast<const char*>(ahead.second),
                   static_cast<int>(ahead.bytes / steps)};
      }
      for (int column = 0; column < p.n;) {
        column += pair_columns<V, kR, widest_tile<V>(kR)>(p, row, column, fetches);
        fetches.first += static_cast<ptrdiff_t>(p.pairs) * fetches.step;
        fetches.second += static_cast<ptrdiff_t>(p.pairs) * fetches.step;
      }
    });
    row += rows;
  }
}

// Words of `pairs` twos of rows of n codes, in the order of the columns. Fetches as much from
// `next` on; null: nothing.
template <class V>
void expand_pairs(const int8_t* codes, size_t stride, int pairs, int n, int32_t* words,
                  const int8_t* next) {
  if (next == nullptr) next = codes;
  for (int i = 0; i < pairs; ++i) {
    const int8_t* row = codes + 2 * i * stride;
    for (int column = 0; column < n; column += kPairColumns<V>) {
      __builtin_prefetch(next + (row - codes) + 2 * column);
      typename V::I both[2];
      V::pair_codes(row + column, row + column + stride, both);
      V::unpair(&both[0], &both[1]);
      V::store_integers(words + column, both[0]);
      V::store_integers(words + column + V::kWidth, both[1]);
    }
    words += n;
  }
}

// n floats, a multiple of 16, to integers of 16 bits whose largest is `levels`; they may lie where
// the floats begin. Returns what one step means; a NaN or an infinity makes that NaN.
template <class V>
float to_halves(const float* x, int n, int16_t* halves) {
  constexpr float kLeast = 1e-30f;  // below it the inverse could overflow: all counts as zero
  typename V::F highest = V::zero(), bad = V::zero();
  for (int i = 0; i < n; i += V::kWidth) {
    const typename V::F value = V::load(x + i);
    highest = V::max(V::max(value, V::subtract(V::zero(), value)), highest);
    bad = V::fma(value, V::zero(), bad);
  }
  float lanes[2][V::kWidth];
  V::store(lanes[0], highest);
  V::store(lanes[1], bad);
  float most = lanes[0][0], wrong = lanes[1][0];
  for (int i = 1; i < V::kWidth; ++i) {
    most = lanes[0][i] > most ? lanes[0][i] : most;
    wrong += lanes[1][i];
  }
  const typename V::F inverse = V::broadcast(most > kLeast ? kHalfLevels / most : 0);
  for (int i = 0; i < n; i += V::kWidth) {
    V::store_halves(halves + i, V::multiply(V::load(x + i), inverse));
  }
  return most > kLeast ? most * (1.0f / kHalfLevels) + wrong : wrong;
}

}  // namespace kvasir::vec
