// Memory that lives as long as its owner: weights and scratch, on huge pages where the kernel
// agrees.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvasir {

inline constexpr size_t kCacheLineBytes = 64;

inline size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// A zeroed anonymous mapping; physical pages appear when first written.
class Mapping {
 public:
  Mapping() = default;
  explicit Mapping(size_t bytes);
  ~Mapping();
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Hands out cache-line aligned pieces of memory whose size is known beforehand: a mapping of its
// own, zeroed, or memory that somebody has filled, which is only read and must outlive the arena.
class Arena {
 public:
  explicit Arena(size_t bytes)
      : mapping_(bytes), data_(static_cast<uint8_t*>(mapping_.data())), bytes_(bytes) {}
  explicit Arena(std::span<const uint8_t> filled)
      : data_(const_cast<uint8_t*>(filled.data())), bytes_(filled.size()), is_filled_(true) {}

  template <class T>
  T* take(size_t count) {
    return static_cast<T*>(take_bytes(count * sizeof(T)));
  }
  // Bytes handed out; going back to a former count hands them out once more, as they are by then.
  size_t used() const { return used_; }
  void rewind(size_t used) { used_ = used; }
  size_t bytes() const { return bytes_; }
  const uint8_t* data() const { return data_; }
  bool is_filled() const { return is_filled_; }

 private:
  void* take_bytes(size_t bytes);

  Mapping mapping_;
  uint8_t* data_;
  size_t bytes_;
  bool is_filled_ = false;
  size_t used_ = 0;
};

}  // namespace kvasir
