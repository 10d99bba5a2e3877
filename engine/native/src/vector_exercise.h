// The most that registers can do on a path: the peak that products are measured against.
#pragma once

#include "kernels.h"

namespace kvasir::vec {

// Independent chains of float32 multiply-adds; returns the operations done.
template <class V>
double exercise_floats(int rounds) {
  constexpr int kChains = V::kRows * V::kColumns;
  volatile float source = 0.5f;  // read for each chain, or they would be computed as one
  const typename V::F x = V::broadcast(source), y = V::broadcast(source);
  typename V::F sums[kChains];
#pragma GCC unroll 32
  for (int c = 0; c < kChains; ++c) sums[c] = V::broadcast(source);
  for (int i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int c = 0; c < kChains; ++c) sums[c] = V::fma(x, y, sums[c]);
  }
#pragma GCC unroll 32
  for (int c = 1; c < kChains; ++c) sums[0] = V::add(sums[0], sums[c]);
  float lanes[V::kWidth];
  V::store(lanes, sums[0]);
  source = lanes[0];
  return 2.0 * rounds * kChains * V::kWidth;
}

// The same of products of 4 bytes a lane.
template <class V>
double exercise_integers(int rounds) {
  constexpr int kChains = V::kIntegerRows * V::kColumns;
  volatile int32_t source = 1;
  const int32_t word = source;
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(&word);
  int32_t words[V::kWidth] = {word};
  const typename V::Inputs x = V::broadcast_inputs(bytes);
  const typename V::Codes y = V::load_codes(reinterpret_cast<const uint8_t*>(words));
  typename V::I sums[kChains];
#pragma GCC unroll 32
  for (int c = 0; c < kChains; ++c) sums[c] = V::broadcast_integer(source);
  for (int i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int c = 0; c < kChains; ++c) sums[c] = V::dot(sums[c], y, x);
  }
  typename V::F total = V::to_float(sums[0]);
#pragma GCC unroll 32
  for (int c = 1; c < kChains; ++c) total = V::add(total, V::to_float(sums[c]));
  float lanes[V::kWidth];
  V::store(lanes, total);
  source = lanes[0] > 0;
  return 8.0 * rounds * kChains * V::kWidth;
}

// The same of products of bf16 pairs.
template <class V>
double exercise_pairs(int rounds) {
  constexpr int kChains = V::kRows * V::kColumns;
  float lanes[V::kWidth] = {};
  const typename V::Inputs x = V::broadcast_inputs(reinterpret_cast<const uint8_t*>(lanes));
  const typename V::Codes y = V::load_codes(reinterpret_cast<const uint8_t*>(lanes));
  volatile float source = 0.5f;
  typename V::F sums[kChains];
#pragma GCC unroll 32
  for (int c = 0; c < kChains; ++c) sums[c] = V::broadcast(source);
  for (int i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int c = 0; c < kChains; ++c) sums[c] = V::dot(sums[c], y, x);
  }
#pragma GCC unroll 32
  for (int c = 1; c < kChains; ++c) sums[0] = V::add(sums[0], sums[c]);
  V::store(lanes, sums[0]);
  source = lanes[0];
  return 4.0 * rounds * kChains * V::kWidth;
}

}  // namespace kvasir::vec
