// Unix sockets in a folder that the processes of one node share: one per process, named by its uid.
#pragma once

#include <string>

#include "stream.h"
#include "wire.h"

namespace kvasir {

// Listens, and clears the folder of sockets whose process has gone. Throws std::system_error.
Fd listen_local(const std::string& folder, const Name& uid, int backlog);
void unlink_local(const std::string& folder, const Name& uid);
// False: no such process on this node.
bool connect_local(const std::string& folder, const Name& uid, Stream& stream);

// A pool's memory on its way to another process.
struct SharedMemory {
  Fd fd;
  uint32_t num_blocks = 0;
};

Code send_shared_memory(const Stream& stream, int fd, uint32_t num_blocks, Deadline deadline,
                        const Signal* ended);
Code recv_shared_memory(const Stream& stream, SharedMemory& memory, Deadline deadline,
                        const Signal* ended);

}  // namespace kvasir
