// Activations as int8: the operands of products with int8 and int4 weights.
//
// With int8 weights a row has one scale, so its outliers are spread over it first: it is multiplied
// by an orthogonal matrix (QuaRot, arXiv 2404.00456), as the weights were when they were packed,
// which leaves the product what it was. With int4 weights each group of 32 has its own scale. Plain
// integer and single float operations in one order, so every path prepares the same bits.
//
// A prepared row: [k padded to 64] int8, its RowTail or its GroupTails, padding to a cache line.
#pragma once

#include <cstring>

#include "arena.h"
#include "weight_format.h"

namespace kvasir {

struct RowTail {  // int8 weights
  float scale;
  int32_t sum;  // of the codes
};

struct GroupTail {  // int4 weights
  float scale;
  float sum;  // of the codes, scaled
};

// One definition per translation unit each: they are compiled for other instruction sets.

static inline size_t int8_row_bytes(int k) {
  return static_cast<size_t>(padded_depth(k)) + round_up(sizeof(RowTail), kCacheLineBytes);
}

static inline size_t int4_row_bytes(int k) {
  const size_t depth = padded_depth(k);
  return depth + round_up(depth / kInt4Depth * sizeof(GroupTail), kCacheLineBytes);
}

static inline const RowTail* tail_of(const int8_t* row, int k) {
  return reinterpret_cast<const RowTail*>(row + padded_depth(k));
}

static inline const GroupTail* group_tails_of(const int8_t* row, int k) {
  return reinterpret_cast<const GroupTail*>(row + padded_depth(k));
}

// Nearest integer, ties to even, of |x| < 2^22.
static inline int32_t nearest(float x) {
  const float shifted = x + 12582912.0f;  // 1.5 * 2^23
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4B400000;
}

// One step of six: sums and differences of halves, interleaved, so that the next step's partners
// lie half a group apart again.
static inline void spread_once(const float* in, float* out) {
  constexpr int kHalf = kGroupDepth / 2;
  for (int i = 0; i < kHalf; ++i) {
    out[2 * i] = in[i] + in[i + kHalf];
    out[2 * i + 1] = in[i] - in[i + kHalf];
  }
}

// Pairs `stride` apart to their sums and differences.
static inline void mix_pairs(float* x, int depth, int stride) {
  for (int first = 0; first < depth; first += 2 * stride) {
    float* __restrict a = x + first;
    float* __restrict b = a + stride;
    for (int i = 0; i < stride; ++i) {
      const float sum = a[i] + b[i], difference = a[i] - b[i];
      a[i] = sum;
      b[i] = difference;
    }
  }
}

// Triples `stride` apart, mirrored in the plane across (1, 1, 1).
static inline void mix_triples(float* x, int depth, int stride) {
  constexpr float kTwoThirds = 2.0f / 3.0f;
  for (int first = 0; first < depth; first += 3 * stride) {
    float* __restrict a = x + first;
    float* __restrict b = a + stride;
    float* __restrict c = b + stride;
    for (int i = 0; i < stride; ++i) {
      const float shift = (a[i] + b[i] + c[i]) * kTwoThirds;
      a[i] -= shift;
      b[i] -= shift;
      c[i] -= shift;
    }
  }
}

// Steps of pairs that join the groups of a row.
static inline int pair_steps(int num_groups) {
  int steps = 0;
  for (; num_groups % 2 == 0; num_groups /= 2) ++steps;
  return steps;
}

// Rows of k floats to padded_depth(k), zeros behind k, times a matrix that is orthogonal and
// symmetric: Hadamard within each group of 64, then across as many groups as are a power of two,
// then mirrors across what is left as powers of three.
static inline void spread_outliers(const float* in, int k, float* out) {
  static_assert(kGroupDepth == 64);
  constexpr float kInverseRoot = 0.125f, kRootHalf = 0.70710678f;
  const int depth = padded_depth(k), num_pair_steps = pair_steps(depth / kGroupDepth);
  float scale = num_pair_steps % 2 == 0 ? kInverseRoot : kInverseRoot * kRootHalf;
  for (int i = 0; i < num_pair_steps / 2; ++i) scale *= 0.5f;
  for (int first = 0; first < depth; first += kGroupDepth) {
    const int count = k - first < kGroupDepth ? k - first : kGroupDepth;
    float a[kGroupDepth] = {}, b[kGroupDepth];
    for (int i = 0; i < count; ++i) a[i] = in[first + i] * scale;
    for (int step = 0; step < 2; ++step) {
      spread_once(a, b);
      spread_once(b, a);
    }
    spread_once(a, b);
    spread_once(b, out + first);
  }
  int stride = kGroupDepth;
  for (int step = 0; step < num_pair_steps; ++step, stride *= 2) mix_pairs(out, depth, stride);
  for (; depth / stride % 3 == 0; stride *= 3) mix_triples(out, depth, stride);
}

struct Coding {
  float inverse;
  float scale;
};

// 127 steps to the largest magnitude of n floats.
static inline Coding coding_of(const float* x, int n) {
  constexpr float kLevels = 127.0f;
  constexpr float kScaleMin = 1e-30f;  // below it 1 / scale could overflow: all counts as zero
  uint32_t largest = 0;                // of non-negative floats, bits compare as values do
  for (int i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7FFFFFFFu;
    largest = bits > largest ? bits : largest;
  }
  float most;
  std::memcpy(&most, &largest, sizeof most);
  if (most < kScaleMin) return {0.0f, 0.0f};
  return {kLevels / most, most / kLevels};
}

// Codes of n floats, zeros up to `width`; returns their sum.
static inline int32_t encode_row(const float* x, int n, float inverse, int8_t* codes, int width) {
  int32_t sum = 0;
  for (int i = 0; i < n; ++i) {
    const int32_t code = nearest(x[i] * inverse);
    codes[i] = static_cast<int8_t>(code);
    sum += codes[i];
  }
  for (int i = n; i < width; ++i) codes[i] = 0;
  return sum;
}

static inline void prepare_int8_row(const float* a, int k, float* scratch, void* row) {
  const int depth = padded_depth(k);
  spread_outliers(a, k, scratch);
  const Coding coding = coding_of(scratch, depth);
  int8_t* codes = static_cast<int8_t*>(row);
  RowTail* tail = reinterpret_cast<RowTail*>(codes + depth);
  tail->scale = coding.scale;
  tail->sum = encode_row(scratch, depth, coding.inverse, codes, depth);
}

static inline void prepare_int4_row(const float* a, int k, float*, void* row) {
  const int depth = padded_depth(k);
  int8_t* codes = static_cast<int8_t*>(row);
  GroupTail* tails = reinterpret_cast<GroupTail*>(codes + depth);
  for (int group = 0; group < depth / kInt4Depth; ++group) {
    const int first = group * kInt4Depth;
    const int left = k - first;
    const int count = left < 0 ? 0 : left < kInt4Depth ? left : kInt4Depth;
    const Coding coding = coding_of(a + first, count);
    const int32_t sum = encode_row(a + first, count, coding.inverse, codes + first, kInt4Depth);
    tails[group] = {coding.scale, static_cast<float>(sum) * coding.scale};
  }
}

}  // namespace kvasir
