#include "directory.h"

#include <atomic>
#include <bit>
#include <thread>

namespace kvasir {
namespace {

constexpr size_t kLine = 128;
constexpr uint64_t kKnown = uint64_t{1} << 32;
constexpr int kAttemptsMax =
    1000;  // a writer changes a chain within nanoseconds; one may have died

template <typename Word>
std::atomic_ref<Word> atomic(Word& word) {
  return std::atomic_ref<Word>(word);
}

uint32_t num_heads(uint32_t num_blocks) { return std::bit_ceil(num_blocks); }

size_t heads_bytes(uint32_t num_blocks) {
  return (size_t{num_heads(num_blocks)} * sizeof(uint32_t) + kLine - 1) / kLine * kLine;
}

}  // namespace

size_t Directory::bytes(uint32_t num_blocks) {
  return kLine + heads_bytes(num_blocks) + size_t{num_blocks} * sizeof(Record);
}

Directory::Directory(uint8_t* memory, uint32_t num_blocks)
    : num_blocks_(num_blocks),
      version_(reinterpret_cast<uint32_t*>(memory)),
      heads_(reinterpret_cast<uint32_t*>(memory + kLine)),
      records_(reinterpret_cast<Record*>(memory + kLine + heads_bytes(num_blocks))) {}

uint32_t& Directory::head(const Name& name) const {
  uint64_t halves[2];
  std::memcpy(halves, name.data(), sizeof halves);
  const uint64_t mixed = (halves[0] ^ std::rotl(halves[1], 32)) * 0x9e3779b97f4a7c15;
  return heads_[mixed >> 32 & (num_heads(num_blocks_) - 1)];
}

void Directory::add(const Name& name, uint32_t block) {
  Record& record = records_[block];
  uint32_t& first = head(name);
  atomic(*version_).fetch_add(1, std::memory_order_seq_cst);
  record.name = name;
  atomic(record.checksum).store(0, std::memory_order_relaxed);
  atomic(record.next).store(first, std::memory_order_relaxed);
  atomic(record.generation).fetch_add(1, std::memory_order_release);
  atomic(first).store(block + 1, std::memory_order_release);
  atomic(*version_).fetch_add(1, std::memory_order_seq_cst);
}

void Directory::remove(uint32_t block) {
  Record& record = records_[block];
  atomic(*version_).fetch_add(1, std::memory_order_seq_cst);
  uint32_t* link = &head(record.name);
  while (*link != block + 1) link = &records_[*link - 1].next;
  atomic(*link).store(record.next, std::memory_order_relaxed);
  atomic(record.generation).fetch_add(1, std::memory_order_relaxed);
  atomic(*version_).fetch_add(1, std::memory_order_seq_cst);
  // The caller may now write to the block: never before the new generation can be seen.
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

void Directory::set_checksum(uint32_t block, uint32_t checksum) {
  atomic(records_[block].checksum).store(kKnown | checksum, std::memory_order_release);
}

std::optional<Directory::Found> Directory::find(const Name& name) const {
  for (int attempt = 0; attempt < kAttemptsMax; ++attempt) {
    const uint32_t version = atomic(*version_).load(std::memory_order_acquire);
    std::optional<Found> found;
    uint32_t next = atomic(head(name)).load(std::memory_order_acquire);
    for (uint32_t i = 0; i < num_blocks_ && next - 1 < num_blocks_ && !found; ++i) {
      Record& record = records_[next - 1];
      if (record.name == name) {
        const uint64_t checksum = atomic(record.checksum).load(std::memory_order_acquire);
        found = {.block = next - 1,
                 .generation = atomic(record.generation).load(std::memory_order_acquire),
                 .checksum = std::nullopt};
        if (checksum & kKnown) found->checksum = static_cast<uint32_t>(checksum);
      }
      next = atomic(record.next).load(std::memory_order_acquire);
    }
    std::atomic_thread_fence(std::memory_order_acquire);
    const bool is_stable = atomic(*version_).load(std::memory_order_relaxed) == version;
    if (is_stable && version % 2 == 0) return found;
    std::this_thread::yield();
  }
  return std::nullopt;
}

bool Directory::is_unchanged(const Found& found) const {
  std::atomic_thread_fence(std::memory_order_acquire);
  const uint64_t now = atomic(records_[found.block].generation).load(std::memory_order_relaxed);
  return now == found.generation && now % 2 == 1;
}

}  // namespace kvasir
