#include "mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

namespace kvasir {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;

[[noreturn]] void fail(const char* what) {
  throw std::runtime_error(std::string(what) + ": " + std::strerror(errno));
}

}  // namespace

Fd::~Fd() {
  if (fd_ >= 0) ::close(fd_);
}

Mapping::Mapping(size_t bytes, int protection, int flags, int fd) : bytes_(bytes) {
  void* data = mmap(nullptr, bytes_, protection, flags, fd, 0);
  if (data == MAP_FAILED) {
    throw std::runtime_error("cannot map " + std::to_string(bytes) +
                             " bytes of KV memory: " + std::strerror(errno));
  }
  data_ = static_cast<uint8_t*>(data);
}

Mapping Mapping::make_private(size_t bytes, bool huge) {
  bytes = std::max<size_t>(bytes, 1);
  Mapping mapping(bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
  if (huge) madvise(mapping.data_, bytes, MADV_HUGEPAGE);  // advice: it works without
  return mapping;
}

Mapping Mapping::make_shared(size_t bytes, Fd& fd) {
  fd = Fd(memfd_create("kvasir-kv", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) fail("memfd_create");
  if (ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) fail("KV memory file");
  Mapping mapping(bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd.get());
  if (fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) fail("sealing KV memory");
  madvise(mapping.data_, bytes, MADV_HUGEPAGE);
  return mapping;
}

Mapping Mapping::open_shared(int fd, size_t bytes) {
  struct stat status{};
  const bool is_sealed = (fcntl(fd, F_GET_SEALS) & F_SEAL_SHRINK) != 0;
  if (!is_sealed || fstat(fd, &status) != 0 || static_cast<size_t>(status.st_size) < bytes) {
    throw std::runtime_error("not a peer's KV memory");
  }
  Mapping mapping(bytes, PROT_READ, MAP_SHARED, fd);
  madvise(mapping.data_, bytes, MADV_HUGEPAGE);
  return mapping;
}

Mapping::~Mapping() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

}  // namespace kvasir
