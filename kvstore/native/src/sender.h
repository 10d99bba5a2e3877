// Serves one connection: checks who is asked for, then answers requests from the pool's memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "pool.h"
#include "stream.h"
#include "wire.h"

namespace kvasir {

struct ServerCounters {
  std::atomic<uint64_t> connections_refused = 0;
  std::atomic<uint64_t> stale_refused = 0;
  std::atomic<uint64_t> layout_refused = 0;
  std::atomic<uint64_t> unauthenticated = 0;
  std::atomic<uint64_t> bad_requests = 0;
  std::atomic<uint64_t> blocks_sent = 0;
  std::atomic<uint64_t> blocks_missed = 0;
  std::atomic<uint64_t> bytes_sent = 0;
  std::atomic<uint64_t> sessions_sent = 0;
};

struct SenderContext {
  BlockPool& pool;
  Identity self;
  ServerCounters& counters;
  const Signal& stopped;
  const std::string& secret;  // "": connections are not encrypted
  const std::string&
      remote_agent;         // what peers that read the pool from afar must know; "": none do
  bool is_local = false;    // the peer reads the pool's memory itself
  bool takes_extra = true;  // there is room for connections that are not needed
};

// Returns when the connection should be closed. `idle_since_ms` is nonzero while the connection
// waits for a request, so that the server may close the one that has been idle longest.
void serve_connection(const SenderContext& context, Stream& stream,
                      std::atomic<int64_t>& idle_since_ms);

}  // namespace kvasir
