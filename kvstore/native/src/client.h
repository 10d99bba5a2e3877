// Pulls blocks of peers into a pool, over connections that are kept for the next pull.
//
// Lock order: mutex_ guards connections and cancellations; nothing blocks and no other lock is
// taken while it is held.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "pool.h"
#include "receiver.h"
#include "remote.h"
#include "shared_view.h"
#include "stream.h"
#include "wire.h"

namespace kvasir {

struct Peer {
  std::string host;
  uint16_t port;
  Identity life;
  bool may_be_local = true;  // false: reached by TCP, even if it is of this node

  auto key() const { return std::tie(host, port, life.uid, life.epoch, may_be_local); }
  bool operator<(const Peer& other) const { return key() < other.key(); }
};

struct Pull {
  Peer peer;
  std::vector<uint32_t> blocks;
  std::vector<Name> names;  // per block; empty: pull the session
  uint64_t session_id = 0;
  int64_t timeout_ms = 0;
  uint64_t cancel_id = 0;      // 0: cannot be cancelled by id
  Codec codec = Codec::kRaw;   // wished for, over TCP
  bool is_background = false;  // by name, and nobody waits for it

  bool is_session() const { return names.empty(); }
};

class BlockClient {
 public:
  struct Options {
    uint32_t connections_per_peer_max;
    std::string socket_dir;  // where peers of this node are looked for; "": all by TCP
    std::string secret;      // that all peers hold; "": connections are not encrypted
    CodecShape codecs = {};  // of the pool's blocks; without, all travels raw
    std::shared_ptr<RemoteReader> remote = {};  // how others' pools are read from afar; null: TCP
  };

  // Throws std::runtime_error if it cannot encrypt.
  BlockClient(BlockPool& pool, Options options);
  ~BlockClient() { close(); }
  BlockClient(const BlockClient&) = delete;
  BlockClient& operator=(const BlockClient&) = delete;

  bool can_decode() const { return options_.codecs.num_heads != 0; }
  // Throws std::invalid_argument or std::out_of_range for blocks that cannot be written to.
  PullResult pull(const Pull& pull);
  void cancel(uint64_t cancel_id);
  // Cancels all pulls and waits until they have ended.
  void close();

 private:
  // A connection, greeted. `view`: of the peer's memory, if it is of this node. `remote`: how it is
  // read, if from afar.
  struct Link {
    Stream stream;
    std::shared_ptr<const SharedView> view;
    std::optional<RemotePool> remote;
    bool is_kept = false;  // from an earlier pull: the peer may have closed it meanwhile

    Transport transport() const {
      if (view) return Transport::kShared;
      return stream.secure() != nullptr ? Transport::kEncrypted : Transport::kTcp;
    }
  };
  struct Idle {
    Link link;
    int64_t since_ms;
  };
  struct PeerState {
    std::vector<Idle> idle;
    std::weak_ptr<const SharedView> view;  // one for all connections
    uint32_t num_urgent = 0;               // connections to the peer that named pulls hold
    uint32_t num_background = 0;           // those in the background: they have their own
    std::vector<Name> used;  // looked for in the peer's memory, which it has yet to be told
  };
  class Registration;
  class Turn;

  void claim_blocks(const std::vector<uint32_t>& blocks);
  uint32_t num_stripes(const Pull& pull) const;
  PullResult pull_alone(const Pull& pull, Link link, Deadline deadline, const Signal* ended);
  PullResult pull_striped(const Pull& pull, std::vector<Link> links, Deadline deadline,
                          Signal& ended);
  Receiver make_receiver(const Pull& pull);
  Code attempt(const Pull& pull, Link link, Receiver& receiver, Deadline deadline,
               const Signal* ended);
  Code run(const Pull& pull, const Link& link, Receiver& receiver, Deadline deadline,
           const Signal* ended);
  Code read_shared(const Pull& pull, const Link& link, Receiver& receiver, Deadline deadline,
                   const Signal* ended);
  // One that is kept, or a new one.
  Code find_link(const Peer& peer, Deadline deadline, const Signal* ended, Link& link);
  void add_links(const Peer& peer, uint32_t num, Deadline deadline, const Signal* ended,
                 std::vector<Link>& links);
  Code note_used(const Pull& pull, const Link& link, Deadline deadline, const Signal* ended);
  void tell_used();
  Code connect(const Peer& peer, LinkKind kind, Deadline deadline, const Signal* ended, Link& link);
  Code greet(const Peer& peer, Stream& stream, LinkKind kind, Deadline deadline,
             const Signal* ended) const;
  Code map_memory(const Peer& peer, Deadline deadline, const Signal* ended, Link& link);
  Link take_idle(const Peer& peer);
  void keep(const Peer& peer, Link link);
  void drop_unused();
  void watch_peers();

  BlockPool& pool_;
  const Options options_;
  std::atomic<uint64_t> next_request_id_ = 1;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<Peer, PeerState> peers_;
  uint64_t next_pull_ = 0;
  std::unordered_map<uint64_t, Signal*> running_;       // by pull
  std::unordered_map<uint64_t, uint64_t> cancellable_;  // cancel id -> pull
  std::deque<uint64_t> cancelled_early_;                // before their pull began
  bool closed_ = false;
  std::thread watcher_;  // lets go of the memory of peers that have gone
};

}  // namespace kvasir
