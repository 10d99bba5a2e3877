// Owns a file descriptor, or a piece of address space.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace kvasir {

// Owns a file descriptor.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd();
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

// Memory that is zeroed when first touched; huge pages are advised where that pays.
class Mapping {
 public:
  // All throw std::runtime_error if the system refuses.
  static Mapping make_private(size_t bytes, bool huge);
  // Backed by a memory file that others may map, but neither resize nor write to.
  static Mapping make_shared(size_t bytes, Fd& fd);
  // Another process's memory file, read-only. Refuses one that could shrink under the reader.
  static Mapping open_shared(int fd, size_t bytes);

  Mapping(Mapping&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Mapping& operator=(Mapping&&) = delete;
  ~Mapping();
  uint8_t* data() const { return data_; }

 private:
  Mapping(size_t bytes, int protection, int flags, int fd);

  uint8_t* data_;
  size_t bytes_;
};

}  // namespace kvasir
