// The KV memory of one process, the names under which its blocks can be pulled, and the sessions
// in which they are handed off.
//
// Invariant: a byte of a block is read by a transfer only while its layer is below `ready` and the
// block is held by a pin or a session, so it cannot change under the reader.
// Lock order: one mutex guards names and sessions; it is a leaf (nothing else is locked, and no
// call blocks, while it is held). `ready` and `progress` are atomics outside of it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

namespace kvasir {

inline constexpr size_t kNameBytes = 16;
using Name = std::array<uint8_t, kNameBytes>;  // also digests and uids

struct NameHash {
  size_t operator()(const Name& name) const {
    size_t value;
    std::memcpy(&value, name.data(), sizeof value);
    return value;
  }
};

// An anonymous private mapping, zeroed when first touched.
class Mapping {
 public:
  Mapping(size_t bytes, bool huge);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_;
  size_t bytes_;
};

struct PoolShape {
  uint32_t num_blocks;
  uint32_t num_layers;
  uint32_t layer_bytes;
  Name layout_digest;

  size_t block_bytes() const { return size_t{num_layers} * layer_bytes; }
};

class BlockPool {
 public:
  enum class SessionStatus { kUnknown, kOpen, kFinished, kAborted };

  explicit BlockPool(const PoolShape& shape);

  const PoolShape& shape() const { return shape_; }
  uint8_t* data() const { return data_.data(); }
  uint32_t* ready() const { return reinterpret_cast<uint32_t*>(counters_.data()); }
  uint32_t* progress() const;
  uint32_t* uses() const;
  uint8_t* layer(uint32_t block, uint32_t layer) const;

  // Layers of `block` that are final (acquire).
  uint32_t ready_layers(uint32_t block) const;
  // Declares the first `layers` layers of `block` final (release) and wakes the waiters.
  void raise_ready(uint32_t block, uint32_t layers);
  void wake();

  // Forgets the contents of `block`. Throws if it is published.
  void reset(uint32_t block);
  // False: the name already stands for another block, which keeps it.
  bool publish(const Name& name, uint32_t block);
  // False: pinned. True: not published (any more).
  bool unpublish(const Name& name);
  std::optional<uint32_t> lookup(const Name& name) const;
  size_t num_published() const;

  // A pinned name stays published, so its block is not reused.
  std::optional<uint32_t> pin(const Name& name);
  void unpin(const Name& name);

  void open_session(uint64_t id);
  void extend_session(uint64_t id, const std::vector<uint32_t>& blocks);
  void finish_session(uint64_t id);
  void abort_session(uint64_t id);
  bool session_pulled(uint64_t id) const;
  bool close_session(uint64_t id);
  size_t num_sessions() const;

  // The sending side. While begin_read() and end_read() bracket it, the session cannot be closed.
  // kUnknown: not yet opened; kAborted: aborted, or closed some time ago.
  SessionStatus begin_read(uint64_t id);
  // Appends the blocks from ordinal blocks.size() on.
  SessionStatus read_session(uint64_t id, std::vector<uint32_t>& blocks) const;
  void end_read(uint64_t id, bool acknowledged);

 private:
  struct Entry {
    uint32_t block;
    uint32_t pins;
  };
  struct Session {
    std::vector<uint32_t> blocks;
    SessionStatus status = SessionStatus::kOpen;
    uint32_t readers = 0;
    bool pulled = false;
  };

  void check_block(uint32_t block) const;
  Session& session(uint64_t id);

  const PoolShape shape_;
  Mapping data_;
  Mapping counters_;  // ready[num_blocks], uses[num_blocks], progress, on cache lines of their own

  mutable std::mutex mutex_;
  std::unordered_map<Name, Entry, NameHash> names_;
  std::unordered_map<uint32_t, Name> published_;  // block -> its name
  std::unordered_map<uint64_t, Session> sessions_;
  std::deque<uint64_t> closed_;  // the last few, so that a late puller is told at once
};

}  // namespace kvasir
