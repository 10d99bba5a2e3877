// The entropy codec (after CacheGen, arXiv:2310.07240): layer-wise quantisation, a distribution for
// each channel of each layer, and a range coder.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "codec.h"
#include "codec_kernels.h"

namespace kvasir {

size_t entropy_bytes_max(const CodecShape& shape, uint32_t num_layers);

// As encode() and decode(), without header. 0, false: refused.
size_t entropy_encode(const CodecKernels& kernels, const CodecShape& shape, const LayerRun& run,
                      const uint16_t* source, uint8_t* target);
bool entropy_decode(const CodecKernels& kernels, const CodecShape& shape, uint32_t num_layers,
                    std::span<const uint8_t> source, uint16_t* target);

}  // namespace kvasir
