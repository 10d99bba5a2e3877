// KV of tokens that were computed at one place of a context, moved to another place.
//
// V does not depend on the position. K was rotated by its position, and rotations add up: turning
// it by the difference gives what its position would have given, but for roundings.
#pragma once

#include "device.h"
#include "kernels.h"

namespace kvasir {

// Consecutive tokens in the blocks of one sequence.
struct KvSpan {
  const int32_t* block_table;
  size_t table_width;
  int first;  // position of the first token in its sequence
  int count;
};

// As many tokens here as there.
struct KvMove {
  KvSpan source;
  KvSpan target;
};

// Throws std::invalid_argument if the span does not lie in blocks of the pool.
void check_span(const KvSpan& span, const KvPool& pool);

// One layer of a move. Between equal positions K is copied bit by bit, as V always is.
void move_layer(const KvPool& pool, const ModelShape& shape, const Kernels& kernels,
                const KvKernels& kv, int layer, const KvMove& move);

// K then V of the span's tokens in one layer, [count][K|V][kv_heads * head_width] float32.
void read_layer(const KvPool& pool, const ModelShape& shape, const KvKernels& kv, int layer,
                const KvSpan& span, float* out);

}  // namespace kvasir
