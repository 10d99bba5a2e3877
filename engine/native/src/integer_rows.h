// Activations as int8, one scale per token: the operand of products with int8 and int4 weights.
//
// A prepared row: [k padded to 64] int8, float32 scale, int32 sum, int32 sums of groups of 64, then
// padding to a cache line. Plain integer and single float operations, so every path prepares the
// same bits.
#pragma once

#include <cstring>

#include "arena.h"
#include "weight_format.h"

namespace kvasir {

struct RowTail {
  float scale;
  int32_t sum;
};

// One definition per translation unit: each is compiled for another instruction set.
static inline size_t integer_row_bytes(int k) {
  const size_t groups = num_groups(k);
  return groups * kGroupDepth +
         round_up(sizeof(RowTail) + groups * sizeof(int32_t), kCacheLineBytes);
}

// One definition per translation unit: each is compiled for another instruction set.
static inline const RowTail* tail_of(const int8_t* row, int k) {
  return reinterpret_cast<const RowTail*>(row + static_cast<size_t>(num_groups(k)) * kGroupDepth);
}

static inline const int32_t* group_sums_of(const int8_t* row, int k) {
  return reinterpret_cast<const int32_t*>(tail_of(row, k) + 1);
}

// Nearest integer, ties to even, of |x| < 2^22.
static inline int32_t nearest(float x) {
  const float shifted = x + 12582912.0f;  // 1.5 * 2^23
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4B400000;
}

static inline void prepare_integer_row(const float* a, int k, void* row) {
  constexpr float kLevels = 127.0f;
  constexpr float kScaleMin = 1e-30f;  // below it 1 / scale could overflow: the row counts as zero
  uint32_t largest = 0;                // of non-negative floats, bits compare as values do
  for (int i = 0; i < k; ++i) {
    uint32_t bits;
    std::memcpy(&bits, a + i, sizeof bits);
    bits &= 0x7FFFFFFFu;
    largest = bits > largest ? bits : largest;
  }
  float most;
  std::memcpy(&most, &largest, sizeof most);
  const bool is_zero = most < kScaleMin;
  const float inverse = is_zero ? 0.0f : kLevels / most;
  int8_t* codes = static_cast<int8_t*>(row);
  for (int i = 0; i < k; ++i) codes[i] = static_cast<int8_t>(nearest(a[i] * inverse));
  const int groups = num_groups(k);
  for (int i = k; i < groups * kGroupDepth; ++i) codes[i] = 0;
  RowTail* tail = reinterpret_cast<RowTail*>(codes + static_cast<size_t>(groups) * kGroupDepth);
  int32_t* sums = reinterpret_cast<int32_t*>(tail + 1);
  tail->scale = is_zero ? 0.0f : most / kLevels;
  tail->sum = 0;
  for (int g = 0; g < groups; ++g) {
    int32_t sum = 0;
    for (int i = 0; i < kGroupDepth; ++i) sum += codes[g * kGroupDepth + i];
    sums[g] = sum;
    tail->sum += sum;
  }
}

}  // namespace kvasir
