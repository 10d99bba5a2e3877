// Activations as bf16: the operand of products that take bf16 on both sides.
//
// A prepared row: [k padded to 64] bf16, then a cache line of padding, so that rows do not fall on
// one set of the cache.
#pragma once

#include "arena.h"
#include "bf16.h"
#include "weight_format.h"

namespace kvasir {

// One definition per translation unit: each is compiled for another instruction set.
static inline size_t bf16_row_bytes(int k) {
  return static_cast<size_t>(num_groups(k)) * kGroupDepth * sizeof(uint16_t) + kCacheLineBytes;
}

static inline void prepare_bf16_row(const float* a, int k, float*, void* row) {
  uint16_t* bits = static_cast<uint16_t*>(row);
  for (int i = 0; i < k; ++i) bits[i] = bf16_from_float(a[i]);
  for (int i = k; i < num_groups(k) * kGroupDepth; ++i) bits[i] = 0;
}

}  // namespace kvasir
