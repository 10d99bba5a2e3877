// 16 bytes: the name of a block, a digest, or a process's uid.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kvasir {

inline constexpr size_t kNameBytes = 16;
using Name = std::array<uint8_t, kNameBytes>;

struct NameHash {
  size_t operator()(const Name& name) const {
    size_t value;
    std::memcpy(&value, name.data(), sizeof value);
    return value;
  }
};

}  // namespace kvasir
