// How a large pull is spread over several connections to one peer.
//
// A block is cut into frames of whole layers, always at the same places. All frames of a pull are
// numbered, block after block, and each connection (stripe) carries every num-th of them, so the
// blocks still come in their order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pool.h"
#include "wire.h"

namespace kvasir {

inline constexpr uint32_t kStripesMax = 4;

inline uint32_t frame_layers(const PoolShape& shape) {
  return std::max<uint32_t>(1, kFramePayloadBytes / shape.layer_bytes);
}

inline uint32_t frames_per_block(const PoolShape& shape) {
  return (shape.num_layers + frame_layers(shape) - 1) / frame_layers(shape);
}

struct Stripe {
  uint32_t index = 0;
  uint32_t count = 1;

  // Whether the frame of the pull's block `ordinal` that begins at this layer is of the stripe.
  bool has(const PoolShape& shape, uint64_t ordinal, uint32_t layer) const {
    return count == 1 ||
           (ordinal * frames_per_block(shape) + layer / frame_layers(shape)) % count == index;
  }
  // The first layer from `layer` on at which a frame of the stripe begins; num_layers: none does.
  uint32_t next_layer(const PoolShape& shape, uint64_t ordinal, uint32_t layer) const {
    while (layer < shape.num_layers && !has(shape, ordinal, layer)) layer += frame_layers(shape);
    return std::min(layer, shape.num_layers);
  }
};

}  // namespace kvasir
