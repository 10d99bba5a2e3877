#include "kv_move.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "bf16.h"

namespace kvasir {

namespace {

// One head of one token: `keys` and `values` are the head's parts of its block.
struct Slot {
  uint8_t* keys;
  uint8_t* values;
  int index;
};

class LayerSlots {
 public:
  LayerSlots(const KvPool& pool, const ModelShape& shape, const KvKernels& kv, int layer)
      : pool_(pool),
        head_bytes_(kv.head_bytes(shape.head_width())),
        half_(head_bytes_ * shape.num_kv_heads),
        offset_(layer * 2 * half_) {}

  Slot at(const int32_t* table, int position, int head) const {
    uint8_t* keys = pool_.data + table[position / kBlockTokens] * pool_.block_bytes + offset_ +
                    head * head_bytes_;
    return {keys, keys + half_, position % kBlockTokens};
  }

 private:
  const KvPool& pool_;
  size_t head_bytes_, half_, offset_;
};

float element(const uint8_t* data, size_t index, int element_bytes) {
  if (element_bytes == 1) return static_cast<float>(reinterpret_cast<const int8_t*>(data)[index]);
  if (element_bytes == 2) return bf16_to_float(reinterpret_cast<const uint16_t*>(data)[index]);
  return reinterpret_cast<const float*>(data)[index];
}

float scale_of(const uint8_t* data, int head_dim, int slot, const KvKernels& kv) {
  if (kv.scale_bytes == 0) return 1.0f;
  const size_t codes = static_cast<size_t>(kBlockTokens) * head_dim * kv.element_bytes;
  float scale;
  std::memcpy(&scale, data + codes + static_cast<size_t>(slot) * kv.scale_bytes, sizeof scale);
  return scale;
}

void read_slot(const Slot& slot, int head_dim, const KvKernels& kv, float* k, float* v) {
  const float k_scale = scale_of(slot.keys, head_dim, slot.index, kv);
  const float v_scale = scale_of(slot.values, head_dim, slot.index, kv);
  for (int d = 0; d < head_dim; ++d) {
    const size_t column = static_cast<size_t>(d) * kBlockTokens + slot.index;
    k[d] = k_scale * element(slot.keys, column, kv.element_bytes);
    const size_t row = static_cast<size_t>(slot.index) * head_dim + d;
    v[d] = v_scale * element(slot.values, row, kv.element_bytes);
  }
}

void copy_scale(const uint8_t* from, int from_slot, uint8_t* to, int to_slot, int head_dim,
                const KvKernels& kv) {
  const size_t codes = static_cast<size_t>(kBlockTokens) * head_dim * kv.element_bytes;
  const size_t bytes = kv.scale_bytes;
  std::memcpy(to + codes + to_slot * bytes, from + codes + from_slot * bytes, bytes);
}

void copy_keys(const Slot& from, const Slot& to, int head_dim, const KvKernels& kv) {
  const size_t bytes = kv.element_bytes;
  for (int d = 0; d < head_dim; ++d) {
    const size_t column = static_cast<size_t>(d) * kBlockTokens;
    std::memcpy(to.keys + (column + to.index) * bytes, from.keys + (column + from.index) * bytes,
                bytes);
  }
  copy_scale(from.keys, from.index, to.keys, to.index, head_dim, kv);
}

void copy_values(const Slot& from, const Slot& to, int head_dim, const KvKernels& kv) {
  const size_t bytes = static_cast<size_t>(head_dim) * kv.element_bytes;
  std::memcpy(to.values + to.index * bytes, from.values + from.index * bytes, bytes);
  copy_scale(from.values, from.index, to.values, to.index, head_dim, kv);
}

}  // namespace

void check_span(const KvSpan& span, const KvPool& pool) {
  const auto require = [](bool condition, const char* text) {
    if (!condition) throw std::invalid_argument(text);
  };
  require(pool.data != nullptr, "no KV pool is attached");
  require(span.first >= 0 && span.count > 0, "a span needs a first token and at least one");
  const int64_t last = int64_t{span.first} + span.count - 1;
  require(static_cast<size_t>(last / kBlockTokens) < span.table_width,
          "a span lies outside its block table");
  for (int64_t b = span.first / kBlockTokens; b <= last / kBlockTokens; ++b) {
    require(span.block_table[b] >= 0 && span.block_table[b] < pool.num_blocks,
            "a block id is outside the pool");
  }
}

void move_layer(const KvPool& pool, const ModelShape& shape, const Kernels& kernels,
                const KvKernels& kv, int layer, const KvMove& move) {
  const int width = shape.head_width(), num_pairs = shape.rope_pairs();
  const int distance = move.target.first - move.source.first;
  const Rope& rope = shape.ropes[shape.layers[layer].rope];
  std::vector<float> cos(num_pairs), sin(num_pairs), k(width), v(width);
  for (int i = 0; i < num_pairs; ++i) {
    const double angle = static_cast<double>(distance) * rope.inverse_frequencies[i];
    cos[i] = static_cast<float>(std::cos(angle));
    sin[i] = static_cast<float>(std::sin(angle));
  }
  const LayerSlots slots(pool, shape, kv, layer);
  for (int t = 0; t < move.source.count; ++t) {
    for (int head = 0; head < shape.num_kv_heads; ++head) {
      const Slot from = slots.at(move.source.block_table, move.source.first + t, head);
      const Slot to = slots.at(move.target.block_table, move.target.first + t, head);
      if (distance == 0) {
        copy_keys(from, to, width, kv);
      } else {
        read_slot(from, width, kv, k.data(), v.data());
        kernels.rotate(k.data(), cos.data(), sin.data(), 2 * num_pairs);
        kv.store(k.data(), v.data(), width, to.index, to.keys, to.values);
      }
      copy_values(from, to, width, kv);
    }
  }
}

void read_layer(const KvPool& pool, const ModelShape& shape, const KvKernels& kv, int layer,
                const KvSpan& span, float* out) {
  const int width = shape.head_width();
  const LayerSlots slots(pool, shape, kv, layer);
  for (int t = 0; t < span.count; ++t, out += 2 * shape.kv_size()) {
    for (int head = 0; head < shape.num_kv_heads; ++head) {
      float* k = out + head * width;
      read_slot(slots.at(span.block_table, span.first + t, head), width, kv, k,
                k + shape.kv_size());
    }
  }
}

}  // namespace kvasir
