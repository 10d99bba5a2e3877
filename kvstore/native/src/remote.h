// Memory of peers on other nodes that a transfer library reads, RDMA say, and what is asked of it.
//
// The peer's frames say where in its pool the layers lie, and hold them there until we acknowledge.
// What is read lands in memory of the reader's own, and comes into a block only verified: a read
// that cannot be called off never writes to a block that is used again.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "stream.h"

namespace kvasir {

// A peer's pool, for its library's counterpart here.
struct RemotePool {
  std::string agent;  // what the library must know of the peer
  uint64_t address = 0;
  uint32_t num_blocks = 0;
};

struct RemotePiece {
  uint64_t address;
  size_t bytes;
};

class RemoteReader {
 public:
  using Take = std::function<void(const uint8_t*)>;

  virtual ~RemoteReader() = default;
  // Of all pieces of one read.
  virtual size_t bytes_max() const = 0;
  // Reads the pieces, one behind the other, and gives `take` their bytes.
  virtual Code read(const RemotePool& pool, const std::vector<RemotePiece>& pieces,
                    Deadline deadline, const Signal* ended, const Take& take) = 0;
};

inline constexpr size_t kAgentBytesMax = 1 << 20;

// After a greeting that asks for it, the server says how its pool is read.
Code send_remote_pool(const Stream& stream, const RemotePool& pool, Deadline deadline,
                      const Signal* ended);
Code recv_remote_pool(const Stream& stream, RemotePool& pool, Deadline deadline,
                      const Signal* ended);

}  // namespace kvasir
