// Accepts connections, each served by a thread of its own, and ends them all on stop().
//
// Lock order: mutex_ guards the connections; it is held over nothing that blocks, and never while
// the pool's mutex is held.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "local_socket.h"
#include "pool.h"
#include "sender.h"
#include "stream.h"

namespace kvasir {

struct ServerOptions {
  std::string host;
  uint16_t port;
  Identity self;
  uint32_t connections_max;
  std::string secret;        // "": connections are not encrypted
  std::string socket_dir;    // peers of this node read the (shared) pool's memory; "": none does
  std::string remote_agent;  // what peers' transfer library must know to read the pool; "": none
};

class BlockServer {
 public:
  // Throws std::system_error if it cannot listen.
  BlockServer(BlockPool& pool, const ServerOptions& options);
  ~BlockServer() { stop(); }
  BlockServer(const BlockServer&) = delete;
  BlockServer& operator=(const BlockServer&) = delete;

  void stop();
  uint16_t port() const { return port_; }
  BlockPool& pool() const { return pool_; }
  const ServerCounters& counters() const { return counters_; }
  size_t num_connections() const;

 private:
  struct Connection {
    Connection(Stream taken, bool local) : stream(std::move(taken)), is_local(local) {}
    Stream stream;
    const bool is_local;
    std::atomic<int64_t> idle_since_ms = 0;
    std::thread thread;
    bool done = false;  // guarded by mutex_
  };

  void accept_loop();
  void accept_from(const Fd& listener, bool is_local);
  void admit(Stream stream, bool is_local);
  void serve(Connection* connection);
  void refuse(const Stream& stream);
  void close_idlest();
  void reap();

  BlockPool& pool_;
  const Identity self_;
  const uint32_t connections_max_;
  const std::string secret_;
  const std::string remote_agent_;
  Fd listener_;
  const uint16_t port_;
  LocalListener local_listener_;
  Signal stopped_;
  ServerCounters counters_;
  mutable std::mutex mutex_;
  std::map<uint64_t, std::unique_ptr<Connection>> connections_;
  uint64_t next_id_ = 0;
  std::mutex stop_mutex_;  // taken before mutex_
  std::thread acceptor_;
};

}  // namespace kvasir
