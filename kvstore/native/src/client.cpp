#include "client.h"

#include <algorithm>
#include <stdexcept>
#include <unordered_set>

#include "crc32c.h"

namespace kvasir {
namespace {

constexpr int64_t kConnectMs = 3'000;  // a peer that does not answer so long is unreachable
constexpr int64_t kHelloMs = 5'000;
constexpr int64_t kIdleMs = 30'000;  // below the server's limit, so that it rarely closes first
constexpr size_t kIdlePeersMax = 256;
constexpr size_t kCancelledEarlyMax = 1024;

}  // namespace

// One running pull, known to cancel() and close() for as long as this object lives.
class BlockClient::Registration {
 public:
  Registration(BlockClient& client, uint64_t cancel_id) : client_(client), cancel_id_(cancel_id) {
    const std::lock_guard lock(client_.mutex_);
    id_ = client_.next_pull_++;
    client_.running_[id_] = &ended_;
    if (client_.closed_) ended_.raise();
    if (cancel_id_ == 0) return;
    client_.cancellable_[cancel_id_] = id_;
    if (std::erase(client_.cancelled_early_, cancel_id_) > 0) ended_.raise();
  }
  ~Registration() {
    const std::lock_guard lock(client_.mutex_);
    client_.running_.erase(id_);
    const auto it = client_.cancellable_.find(cancel_id_);
    if (it != client_.cancellable_.end() && it->second == id_) client_.cancellable_.erase(it);
    client_.changed_.notify_all();
  }
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;
  const Signal* ended() const { return &ended_; }

 private:
  BlockClient& client_;
  const uint64_t cancel_id_;
  uint64_t id_;
  Signal ended_;
};

void BlockClient::cancel(uint64_t cancel_id) {
  if (cancel_id == 0) return;
  const std::lock_guard lock(mutex_);
  const auto it = cancellable_.find(cancel_id);
  if (it != cancellable_.end()) {
    running_.at(it->second)->raise();
    changed_.notify_all();
    return;
  }
  cancelled_early_.push_back(cancel_id);
  if (cancelled_early_.size() > kCancelledEarlyMax) cancelled_early_.pop_front();
}

void BlockClient::close() {
  std::map<Peer, PeerState> dropped;
  std::unique_lock lock(mutex_);
  closed_ = true;
  for (const auto& [id, ended] : running_) ended->raise();
  changed_.notify_all();
  changed_.wait(lock, [this] { return running_.empty(); });  // each ends within 50 ms
  dropped.swap(peers_);
}

void BlockClient::claim_blocks(const std::vector<uint32_t>& blocks) {
  std::unordered_set<uint32_t> seen;
  for (const uint32_t block : blocks) {
    if (!seen.insert(block).second) {
      throw std::invalid_argument("block " + std::to_string(block) + " is given twice");
    }
  }
  for (const uint32_t block : blocks) pool_.reset(block);  // throws if it may not be written
}

PullResult BlockClient::pull(const Pull& pull) {
  claim_blocks(pull.blocks);
  const Registration registration(*this, pull.cancel_id);
  const Deadline deadline = Deadline::in(pull.timeout_ms);
  Receiver receiver(pool_, pull.blocks, pull.names, pull.session_id);
  Code code = enter(pull, deadline, registration.ended());
  if (code == Code::kOk) {
    code = attempt(pull, receiver, deadline, registration.ended());
    leave(pull);
  }
  return receiver.take_result(code);
}

// A connection kept from earlier may have been closed by the peer: then once more on a new one.
Code BlockClient::attempt(const Pull& pull, Receiver& receiver, Deadline deadline,
                          const Signal* ended) {
  for (;;) {
    Stream stream = take_idle(pull.peer);
    const bool kept = static_cast<bool>(stream);
    if (!kept) {
      const Code code = connect(pull.peer, deadline, ended, stream);
      if (code != Code::kOk) return code;
    }
    const Code code = run(pull, stream, receiver, deadline, ended);
    if (code == Code::kUnreachable && kept && !receiver.has_received()) continue;
    if (code == Code::kOk) keep(pull.peer, std::move(stream));
    return code;
  }
}

Code BlockClient::run(const Pull& pull, const Stream& stream, Receiver& receiver, Deadline deadline,
                      const Signal* ended) {
  Request request{};
  request.type = pull.is_session() ? RequestType::kSession : RequestType::kNamed;
  request.request_id = next_request_id_++;
  request.session_id = pull.session_id;
  request.count = static_cast<uint32_t>(pull.blocks.size());
  request.timeout_ms = static_cast<uint32_t>(deadline.left_ms());
  const size_t body_bytes = pull.names.size() * sizeof(Name);
  request.body_crc = crc32c(pull.names.data(), body_bytes);
  seal(request);
  iovec parts[2] = {
      {.iov_base = &request, .iov_len = sizeof request},
      {.iov_base = const_cast<Name*>(pull.names.data()), .iov_len = body_bytes},
  };
  Code code = stream.send_all(parts, 2, deadline, ended);
  if (code == Code::kOk) code = receiver.run(stream, request.request_id, deadline, ended);
  if (code != Code::kOk || !pull.is_session()) return code;
  if (!receiver.all_whole()) return Code::kAborted;  // the source ended with fewer blocks, or bad
  request.type = RequestType::kAcknowledge;
  seal(request);
  stream.send_all(&request, sizeof request, deadline, ended);  // all is here: a loss is harmless
  return Code::kOk;
}

Code BlockClient::connect(const Peer& peer, Deadline deadline, const Signal* ended,
                          Stream& stream) const {
  Code code = Stream::connect(peer.host, peer.port, deadline.at_most(kConnectMs), ended, stream);
  if (code != Code::kOk) return code;
  Hello hello{};
  hello.layout_digest = pool_.shape().layout_digest;
  hello.uid = peer.life.uid;
  hello.epoch = peer.life.epoch;
  hello.num_layers = pool_.shape().num_layers;
  hello.layer_bytes = pool_.shape().layer_bytes;
  seal(hello);
  const Deadline soon = deadline.at_most(kHelloMs);
  HelloReply reply;
  code = stream.send_all(&hello, sizeof hello, soon, ended);
  if (code == Code::kOk) code = stream.recv_all(&reply, sizeof reply, soon, ended);
  if (code != Code::kOk) return code;
  if (!is_intact(reply)) return Code::kRefused;
  if (reply.code != Code::kOk) return reply.code;
  const bool is_same_life = reply.uid == peer.life.uid && reply.epoch == peer.life.epoch;
  return is_same_life ? Code::kOk : Code::kStalePeer;
}

// Named pulls wait for one of the peer's connections. Sessions do not: one that waits for its turn
// to be computed must not hold back one that is being computed, or both sides could wait for ever.
Code BlockClient::enter(const Pull& pull, Deadline deadline, const Signal* ended) {
  std::unique_lock lock(mutex_);
  for (;;) {
    if (ended->is_raised()) return Code::kCancelled;
    if (deadline.is_past()) return Code::kTimeout;
    if (pull.is_session()) return Code::kOk;
    PeerState& state = peers_[pull.peer];
    if (state.num_named < connections_per_peer_max_) {
      ++state.num_named;
      return Code::kOk;
    }
    changed_.wait_for(lock, std::chrono::milliseconds(deadline.left_ms()));
  }
}

void BlockClient::leave(const Pull& pull) {
  if (pull.is_session()) return;
  const std::lock_guard lock(mutex_);
  --peers_.at(pull.peer).num_named;
  changed_.notify_all();
}

Stream BlockClient::take_idle(const Peer& peer) {
  const std::lock_guard lock(mutex_);
  const auto it = peers_.find(peer);
  if (it == peers_.end()) return Stream();
  const int64_t oldest_ms = monotonic_ms() - kIdleMs;
  while (!it->second.idle.empty()) {
    Idle idle = std::move(it->second.idle.back());
    it->second.idle.pop_back();
    if (idle.since_ms >= oldest_ms && !idle.stream.is_disturbed()) return std::move(idle.stream);
  }
  return Stream();
}

// Keeps the connection for the next pull, and drops those that nobody has used for long.
void BlockClient::keep(const Peer& peer, Stream stream) {
  const std::lock_guard lock(mutex_);
  const int64_t now_ms = monotonic_ms();
  if (closed_) return;
  for (auto it = peers_.begin(); it != peers_.end();) {
    PeerState& state = it->second;
    std::erase_if(state.idle, [&](const Idle& idle) { return idle.since_ms < now_ms - kIdleMs; });
    const bool is_unused = state.idle.empty() && state.num_named == 0;
    it = is_unused ? peers_.erase(it) : std::next(it);
  }
  if (peers_.size() >= kIdlePeersMax && !peers_.contains(peer)) return;
  PeerState& state = peers_[peer];
  if (state.idle.size() >= connections_per_peer_max_) return;
  state.idle.push_back({.stream = std::move(stream), .since_ms = now_ms});
}

}  // namespace kvasir
