#include "arena.h"

#include <sys/mman.h>

#include <new>
#include <stdexcept>
#include <utility>

namespace kvasir {

namespace {
constexpr size_t kHugePageBytes = size_t{2} << 20;
}

Mapping::Mapping(size_t bytes) : bytes_(round_up(bytes, kHugePageBytes)) {
  if (bytes_ == 0) return;
  data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data_ == MAP_FAILED) {
    data_ = nullptr;
    throw std::bad_alloc();
  }
  madvise(data_, bytes_, MADV_HUGEPAGE);  // a hint: ordinary pages serve as well
}

Mapping::~Mapping() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

void* Arena::take_bytes(size_t bytes) {
  const size_t start = used_;
  used_ += round_up(bytes, kCacheLineBytes);
  if (used_ > bytes_) throw std::logic_error("arena is smaller than what it must hold");
  return data_ + start;
}

}  // namespace kvasir
