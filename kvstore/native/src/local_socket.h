// Unix sockets in a folder that the processes of one node share: one per process, named by its uid.
#pragma once

#include <string>

#include "stream.h"
#include "wire.h"

namespace kvasir {

struct LocalListener {
  Fd fd;
  Fd folder;
  std::string file;
  uint64_t inode = 0;  // of the file: a later process of this uid may have put its own in its place
};

// Listens, and clears the folder of sockets whose process has gone. Throws std::system_error.
LocalListener listen_local(const std::string& folder, const Name& uid, int backlog);
// Removes the socket's file, unless it has become that of another.
void stop_listening(LocalListener& listener);
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
