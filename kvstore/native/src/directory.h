// The names of a pool's blocks in memory that other processes read: chained hashing in a flat
// array, made by one writer and looked up by any number of readers without locks.
//
// Invariant: a block's generation is odd exactly while it is published, and grows with every
// change. A reader copies, then asks whether the generation is still the one it found: if so, not
// a byte changed under it, since a writer unpublishes a block before it reuses it. Readers leave no
// trace, so one that dies holds nothing back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>

#include "name.h"

namespace kvasir {

class Directory {
 public:
  struct Found {
    uint32_t block;
    uint64_t generation;
    std::optional<uint32_t> checksum;  // of the whole block, once the owner has made it
  };

  static size_t bytes(uint32_t num_blocks);
  // `memory`: bytes(num_blocks), zeroed; the reader's may be read-only.
  Directory(uint8_t* memory, uint32_t num_blocks);

  // The writer's side; calls must not overlap.
  void add(const Name& name, uint32_t block);
  void remove(uint32_t block);
  void set_checksum(uint32_t block, uint32_t checksum);

  // The reader's side.
  std::optional<Found> find(const Name& name) const;
  bool is_unchanged(const Found& found) const;

 private:
  struct Record {
    Name name;
    uint64_t generation;
    uint64_t checksum;  // bit 32: it is known
    uint32_t next;      // in the chain: block + 1, or 0
    uint32_t reserved;
  };

  uint32_t& head(const Name& name) const;

  const uint32_t num_blocks_;
  uint32_t* const version_;  // odd while chains change
  uint32_t* const heads_;
  Record* const records_;
};

}  // namespace kvasir
