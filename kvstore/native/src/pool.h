// The KV memory of one process, the names under which its blocks can be pulled, and the sessions
// in which they are handed off.
//
// Invariant: a byte of a block is read by a transfer only while its layer is below `ready` and the
// block is held by a pin or a session, so it cannot change under the reader.
// Lock order: one mutex guards names and sessions; it is a leaf (nothing else is locked, and no
// call blocks, while it is held). `ready` and `progress` are atomics outside of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "directory.h"
#include "mapping.h"
#include "name.h"
#include "traffic.h"

namespace kvasir {

struct PoolShape {
  uint32_t num_blocks;
  uint32_t num_layers;
  uint32_t layer_bytes;
  Name layout_digest;

  size_t block_bytes() const { return size_t{num_layers} * layer_bytes; }
  size_t data_bytes() const { return num_blocks * block_bytes(); }
  // Of the memory file of a shared pool: its directory, then its blocks.
  size_t shared_data_offset() const;
  size_t shared_bytes() const { return shared_data_offset() + data_bytes(); }
};

class BlockPool {
 public:
  enum class SessionStatus { kUnknown, kOpen, kFinished, kAborted };

  // `is_shared`: processes of this node that are given the memory's descriptor may read it.
  BlockPool(const PoolShape& shape, bool is_shared);

  const PoolShape& shape() const { return shape_; }
  bool is_shared() const { return directory_.has_value(); }
  int descriptor() const { return descriptor_.get(); }
  uint8_t* data() const { return data_; }
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
  // Counts a pull of the block by name; false: it is not published.
  bool count_use(const Name& name);
  void unpin(const Name& name);
  // Of the layers from `layer_first` on that one frame of the (pinned) block carries, once kept.
  std::optional<uint32_t> frame_checksum(uint32_t block, uint32_t layer_first) const;
  void keep_frame_checksum(uint32_t block, uint32_t layer_first, uint32_t checksum);
  // Lets readers of the shared memory check what they copy; the block must be pinned.
  void share_checksum(uint32_t block, uint32_t checksum);

  // Of all transfers from and into this memory.
  Traffic& traffic() { return traffic_; }

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
  uint64_t& checksum(uint32_t block, uint32_t layer_first) const;
  Session& session(uint64_t id);

  const PoolShape shape_;
  Fd descriptor_;
  Mapping memory_;
  uint8_t* const data_;
  Mapping checksums_;  // uint64 [num_blocks, num_layers]: of frames, by their first layer
  Mapping counters_;   // ready[num_blocks], uses[num_blocks], progress, on cache lines of their own

  Traffic traffic_;

  mutable std::mutex mutex_;
  std::optional<Directory> directory_;  // of a shared pool: names_, for other processes
  std::unordered_map<Name, Entry, NameHash> names_;
  std::unordered_map<uint32_t, Name> published_;  // block -> its name
  std::unordered_map<uint64_t, Session> sessions_;
  std::deque<uint64_t> closed_;  // the last few, so that a late puller is told at once
};

}  // namespace kvasir
