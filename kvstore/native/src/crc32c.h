// CRC-32C (Castagnoli), the checksum of every message of the data plane.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvasir {

// Continues from `seed`, the checksum of the bytes before. Picks the fastest path of this CPU.
uint32_t crc32c(const void* data, size_t size, uint32_t seed = 0);

// Copies `size` bytes and returns the checksum of what was copied: every byte is read once, so the
// checksum is that of the copy even if the source changes meanwhile.
uint32_t crc32c_copy(void* target, const void* source, size_t size);

// The slow reference that the fast path is compared with.
uint32_t crc32c_reference(const void* data, size_t size, uint32_t seed = 0);

}  // namespace kvasir
