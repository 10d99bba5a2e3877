// Writing K and V into blocks over V (see vector_kernels.h), in bf16 or as int8 codes.
#pragma once

#include "vector_kernels.h"

namespace kvasir::vec {

inline void store_bf16(const float* k, const float* v, int head_dim, int slot, uint8_t* keys,
                       uint8_t* values) {
  uint16_t* key_column = reinterpret_cast<uint16_t*>(keys) + slot;
  uint16_t* value_row = reinterpret_cast<uint16_t*>(values) + static_cast<size_t>(slot) * head_dim;
  for (int i = 0; i < head_dim; ++i) key_column[i * kBlockTokens] = bf16_from_float(k[i]);
  for (int i = 0; i < head_dim; ++i) value_row[i] = bf16_from_float(v[i]);
}

// One head of one token as codes, `stride` apart, and its scale: the largest is 127.
template <class V>
inline __attribute__((always_inline)) void quantise(const float* x, int head_dim, int8_t* codes,
                                                    size_t stride, float* scale) {
  typename V::F highest = V::zero();
  for (int i = 0; i < head_dim; i += V::kWidth) {
    const typename V::F value = V::load(x + i);
    highest = V::max(V::max(value, V::subtract(V::zero(), value)), highest);
  }
  float lanes[V::kWidth];
  V::store(lanes, highest);
  float most = lanes[0];
  for (int i = 1; i < V::kWidth; ++i) most = lanes[i] > most ? lanes[i] : most;
  *scale = most * (1.0f / 127.0f);
  const typename V::F inverse = V::broadcast(most > 0 ? 127.0f / most : 0);
  const typename V::F low = V::broadcast(-127.0f), high = V::broadcast(127.0f);
  for (int i = 0; i < head_dim; i += V::kWidth) {
    const typename V::F scaled = V::multiply(V::load(x + i), inverse);
    int8_t rounded[V::kWidth];
    V::store_codes(rounded, V::min(V::max(scaled, low), high));  // as code_of() does, NaN included
    for (int j = 0; j < V::kWidth; ++j) codes[(i + j) * stride] = rounded[j];
  }
}

template <class V>
void store_int8(const float* k, const float* v, int head_dim, int slot, uint8_t* keys,
                uint8_t* values) {
  const size_t num_codes = static_cast<size_t>(kBlockTokens) * head_dim;
  quantise<V>(k, head_dim, reinterpret_cast<int8_t*>(keys) + slot, kBlockTokens,
              reinterpret_cast<float*>(keys + num_codes) + slot);
  quantise<V>(v, head_dim, reinterpret_cast<int8_t*>(values) + slot * head_dim, 1,
              reinterpret_cast<float*>(values + num_codes) + slot);
}

}  // namespace kvasir::vec
