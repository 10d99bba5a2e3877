// A map from block names to small payloads that also keeps its entries in order of age.
//
// Open addressing over (entry, tag) slots: a miss costs one cache line, a hit two. Names are hashes
// already, so their bytes serve as the hash. Entries live in chunks and never move.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace kvasir::router {

inline constexpr size_t kNameBytes = 16;
inline constexpr uint32_t kNone = UINT32_MAX;

struct Name {
  uint64_t low;
  uint64_t high;
  bool operator==(const Name&) const = default;
};

inline Name load_name(const char* bytes) {
  Name name;
  std::memcpy(&name, bytes, kNameBytes);
  return name;
}

template <class Payload>
class NameTable {
 public:
  struct Entry {
    Name name;
    uint32_t older;
    uint32_t newer;
    Payload payload;
  };

  NameTable() : slots_(kSlotsMin) {}

  uint32_t size() const { return size_; }
  // Entries ever used: every live index is below it.
  uint32_t num_indices() const { return num_indices_; }
  uint32_t oldest() const { return oldest_; }
  Entry& operator[](uint32_t index) { return chunks_[index / kChunk][index % kChunk]; }
  const Entry& operator[](uint32_t index) const { return chunks_[index / kChunk][index % kChunk]; }
  size_t num_bytes() const {
    return slots_.capacity() * sizeof(Slot) + chunks_.size() * kChunk * sizeof(Entry) +
           free_.capacity() * sizeof(uint32_t);
  }

  void prefetch_slot(const Name& name) const { __builtin_prefetch(&slots_[home(name)]); }
  void prefetch_entry(uint32_t index) const { __builtin_prefetch(&(*this)[index]); }

  // The index of an entry that is likely this name's (its tag fits): saves reading the entry.
  uint32_t find_likely(const Name& name) const {
    for (size_t at = home(name);; at = (at + 1) & mask()) {
      const Slot& slot = slots_[at];
      if (slot.entry == kNone || slot.tag == tag(name)) return slot.entry;
    }
  }

  uint32_t find(const Name& name) const {
    const size_t at = find_slot(name);
    return slots_[at].entry;
  }

  // A new entry, the newest; the name must be absent.
  uint32_t insert(const Name& name) {
    if (4 * (size_t{size_} + 1) > 3 * slots_.size()) grow();
    uint32_t index;
    if (free_.empty()) {
      index = num_indices_++;
      if (index / kChunk == chunks_.size()) chunks_.emplace_back(new Entry[kChunk]);
    } else {
      index = free_.back();
      free_.pop_back();
    }
    Entry& entry = (*this)[index];
    entry.name = name;
    entry.payload = Payload{};
    link_newest(index);
    slots_[find_slot(name)] = {index, tag(name)};
    ++size_;
    return index;
  }

  void make_newest(uint32_t index) {
    if (index == newest_) return;
    unlink(index);
    link_newest(index);
  }

  void erase(uint32_t index) {
    size_t hole = find_slot((*this)[index].name);
    for (size_t at = (hole + 1) & mask(); slots_[at].entry != kNone; at = (at + 1) & mask()) {
      const size_t wanted = home((*this)[slots_[at].entry].name);
      if (((at - wanted) & mask()) >= ((at - hole) & mask())) {
        slots_[hole] = slots_[at];
        hole = at;
      }
    }
    slots_[hole] = Slot{};
    unlink(index);
    (*this)[index].older = (*this)[index].newer = index;  // marks it as unused
    free_.push_back(index);
    --size_;
  }

  bool is_used(uint32_t index) const {
    const Entry& entry = (*this)[index];
    return entry.older != index || entry.newer != index;
  }

 private:
  struct Slot {
    uint32_t entry = kNone;
    uint32_t tag = 0;
  };
  static constexpr size_t kSlotsMin = 64;
  static constexpr uint32_t kChunk = 4096;

  size_t mask() const { return slots_.size() - 1; }
  size_t home(const Name& name) const { return name.low & mask(); }
  static uint32_t tag(const Name& name) { return static_cast<uint32_t>(name.high); }

  // The slot that holds the name, else the empty one where it belongs.
  size_t find_slot(const Name& name) const {
    for (size_t at = home(name);; at = (at + 1) & mask()) {
      const Slot& slot = slots_[at];
      if (slot.entry == kNone) return at;
      if (slot.tag == tag(name) && (*this)[slot.entry].name == name) return at;
    }
  }

  void grow() {
    slots_.assign(2 * slots_.size(), Slot{});
    for (uint32_t index = oldest_; index != kNone; index = (*this)[index].newer) {
      const Name& name = (*this)[index].name;
      slots_[find_slot(name)] = {index, tag(name)};
    }
  }

  void link_newest(uint32_t index) {
    Entry& entry = (*this)[index];
    entry.older = newest_;
    entry.newer = kNone;
    (newest_ == kNone ? oldest_ : (*this)[newest_].newer) = index;
    newest_ = index;
  }

  void unlink(uint32_t index) {
    const Entry& entry = (*this)[index];
    (entry.older == kNone ? oldest_ : (*this)[entry.older].newer) = entry.newer;
    (entry.newer == kNone ? newest_ : (*this)[entry.newer].older) = entry.older;
  }

  std::vector<Slot> slots_;
  std::vector<std::unique_ptr<Entry[]>> chunks_;
  std::vector<uint32_t> free_;
  uint32_t num_indices_ = 0;
  uint32_t size_ = 0;
  uint32_t oldest_ = kNone;
  uint32_t newest_ = kNone;
};

}  // namespace kvasir::router
