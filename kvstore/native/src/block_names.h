// Chained names of KV blocks: BLAKE2b (RFC 7693) with 16-byte digests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvasir {

// 16 bytes of BLAKE2b, unkeyed, over the concatenation of `parent` (16 bytes) and `data`.
void name_block(const uint8_t* parent, std::span<const uint8_t> data, uint8_t* name);

}  // namespace kvasir
