#include "client.h"

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <unordered_set>

#include "crc32c.h"
#include "handshake.h"
#include "local_socket.h"

namespace kvasir {
namespace {

constexpr int64_t kConnectMs = 3'000;  // a peer that does not answer so long is unreachable
constexpr int64_t kHelloMs = 5'000;
constexpr int64_t kIdleMs = 30'000;  // below the server's limit, so that it rarely closes first
constexpr int64_t kTellMs = 1'000;
constexpr size_t kUsedMax = 4096;
static_assert(kUsedMax <= kNamesMax);
constexpr auto kWatchEvery = std::chrono::seconds(1);
constexpr uint32_t kKeptForSmall = 2;  // of a peer's connections: large pulls leave them free
constexpr int64_t kMoreLinksMs = 200;  // a pull that has one connection waits no longer for more
constexpr size_t kIdlePeersMax = 256;
constexpr size_t kCancelledEarlyMax = 1024;

// Fills in what all requests of the pull have in common; names go with the types that take them.
Code send_request(const Pull& pull, const Stream& stream, Request request, Deadline deadline,
                  const Signal* ended) {
  const bool is_named = has_names(request.type);
  const size_t body_bytes = is_named ? pull.names.size() * sizeof(Name) : 0;
  request.session_id = pull.session_id;
  request.count = static_cast<uint32_t>(is_named ? pull.names.size() : pull.blocks.size());
  request.timeout_ms = static_cast<uint32_t>(deadline.left_ms());
  request.num_stripes = std::max<uint16_t>(request.num_stripes, 1);
  request.body_crc = crc32c(pull.names.data(), body_bytes);
  seal(request);
  std::vector<Name> names(is_named ? pull.names : std::vector<Name>());
  auto* body = reinterpret_cast<uint8_t*>(names.data());
  Tag tag;
  SecureChannel* const secure = stream.secure();
  if (secure != nullptr && !secure->sending.run(as_bytes(request), body, body, body_bytes, tag)) {
    return Code::kRefused;
  }
  iovec parts[3] = {
      {.iov_base = &request, .iov_len = sizeof request},
      {.iov_base = body, .iov_len = body_bytes},
      {.iov_base = &tag, .iov_len = secure != nullptr ? sizeof tag : 0},
  };
  return stream.send_all(parts, 3, deadline, ended);
}

Request used_request() {
  Request request{};
  request.type = RequestType::kUsed;
  return request;
}

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
  Signal& ended() { return ended_; }

 private:
  BlockClient& client_;
  const uint64_t cancel_id_;
  uint64_t id_;
  Signal ended_;
};

// Named pulls wait for one of the peer's connections, of which background pulls have some of their
// own. Large ones take more, but no more than half of those that are free, so that others need not
// wait. Sessions do not wait: one that waits for its turn to be computed must not hold back one
// that is being computed, or both sides could wait for ever.
class BlockClient::Turn {
 public:
  Turn(BlockClient& client, const Pull& pull, Deadline deadline, const Signal* ended)
      : client_(client), pull_(pull) {
    if (pull.is_session()) return;
    const uint32_t num_stripes = client.num_stripes(pull);
    const uint32_t max_of_all = client.options_.connections_per_peer_max;
    const uint32_t max = pull.is_background ? std::max(1U, max_of_all / 2) : max_of_all;
    const uint32_t kept = num_stripes > 1 ? std::min(kKeptForSmall, max / 2) : 0;
    const uint32_t running_max = max - kept;
    std::unique_lock lock(client.mutex_);
    for (;;) {
      if (ended->is_raised()) code_ = Code::kCancelled;
      if (deadline.is_past()) code_ = Code::kTimeout;
      if (code_ != Code::kOk) return;
      if (num_running() < running_max) break;
      client.changed_.wait_for(lock, std::chrono::milliseconds(deadline.left_ms()));
    }
    const uint32_t num_more = std::min(num_stripes - 1, (max - num_running() - 1) / 2);
    num_held_ = std::min(1 + num_more, running_max - num_running());
    num_running() += num_held_;
  }
  ~Turn() { keep(0); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  Code code() const { return code_; }
  uint32_t num_held() const { return num_held_; }
  // Gives back those that are not needed.
  void keep(uint32_t num) {
    if (num >= num_held_) return;
    const std::lock_guard lock(client_.mutex_);
    num_running() -= num_held_ - num;
    num_held_ = num;
    client_.changed_.notify_all();
  }

 private:
  uint32_t& num_running() {
    PeerState& state = client_.peers_[pull_.peer];
    return pull_.is_background ? state.num_background : state.num_urgent;
  }

  BlockClient& client_;
  const Pull& pull_;
  Code code_ = Code::kOk;
  uint32_t num_held_ = 0;
};

BlockClient::BlockClient(BlockPool& pool, Options options)
    : pool_(pool), options_(std::move(options)) {
  if (!options_.secret.empty()) require_crypto();
  if (!options_.socket_dir.empty()) watcher_ = std::thread([this] { watch_peers(); });
}

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
  std::thread watcher;
  {
    std::unique_lock lock(mutex_);
    closed_ = true;
    for (const auto& [id, ended] : running_) ended->raise();
    changed_.notify_all();
    changed_.wait(lock, [this] { return running_.empty(); });  // each ends within 50 ms
    dropped.swap(peers_);
    watcher.swap(watcher_);
  }
  if (watcher.joinable()) watcher.join();
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

Receiver BlockClient::make_receiver(const Pull& pull) {
  Receiver receiver(pool_, pull.blocks, pull.names, pull.session_id);
  receiver.accept(pull.codec, options_.codecs);
  if (pull.is_background) receiver.set_background();
  return receiver;
}

PullResult BlockClient::pull(const Pull& pull) {
  claim_blocks(pull.blocks);
  Registration registration(*this, pull.cancel_id);
  Signal& ended = registration.ended();
  const Deadline deadline = Deadline::in(pull.timeout_ms);
  Turn turn(*this, pull, deadline, &ended);
  Link link;
  Code code = turn.code();
  if (code == Code::kOk) code = find_link(pull.peer, deadline, &ended, link);
  if (code != Code::kOk) return make_receiver(pull).take_result(code);
  std::vector<Link> links;
  links.push_back(std::move(link));
  add_links(pull.peer, turn.num_held(), deadline.at_most(kMoreLinksMs), &ended, links);
  turn.keep(std::max<uint32_t>(1, static_cast<uint32_t>(links.size())));
  if (links.size() > 1) return pull_striped(pull, std::move(links), deadline, ended);
  if (links.empty()) code = find_link(pull.peer, deadline, &ended, links.emplace_back());
  if (code != Code::kOk) return make_receiver(pull).take_result(code);
  return pull_alone(pull, std::move(links[0]), deadline, &ended);
}

// Until there are `num`, or the peer has room for no more. It makes room by ending connections that
// are idle to it, which may be those that we hold already: these are dropped.
void BlockClient::add_links(const Peer& peer, uint32_t num, Deadline deadline, const Signal* ended,
                            std::vector<Link>& links) {
  if (links[0].view || num <= 1) return;
  while (links.size() < num) {
    Link more = take_idle(peer);
    if (!more.stream && connect(peer, LinkKind::kExtra, deadline, ended, more) != Code::kOk) break;
    links.push_back(std::move(more));
  }
  std::erase_if(links, [](const Link& link) { return link.stream.is_disturbed(); });
}

PullResult BlockClient::pull_alone(const Pull& pull, Link link, Deadline deadline,
                                   const Signal* ended) {
  Receiver receiver = make_receiver(pull);
  const Code code = attempt(pull, std::move(link), receiver, deadline, ended);
  return receiver.take_result(code);
}

Code BlockClient::find_link(const Peer& peer, Deadline deadline, const Signal* ended, Link& link) {
  link = take_idle(peer);
  return link.stream ? Code::kOk : connect(peer, LinkKind::kUsual, deadline, ended, link);
}

// A connection kept from earlier may have been closed by the peer: then once more on a new one.
Code BlockClient::attempt(const Pull& pull, Link link, Receiver& receiver, Deadline deadline,
                          const Signal* ended) {
  for (;;) {
    const bool is_shared = link.view != nullptr;
    if (is_shared ? receiver.stripe().count > 1 : receiver.has_landed()) return Code::kUnreachable;
    receiver.read_from(link.view.get(), link.transport());
    if (link.remote) receiver.read_from(*options_.remote, *link.remote);
    std::optional<Traffic::Urgent> urgent;
    if (!pull.is_session() && !pull.is_background) urgent.emplace(pool_.traffic());
    Code code = is_shared && !pull.is_session() ? read_shared(pull, link, receiver, deadline, ended)
                                                : run(pull, link, receiver, deadline, ended);
    if (code == Code::kOk) keep(pull.peer, std::move(link));
    if (code != Code::kUnreachable || !link.is_kept || receiver.has_received()) return code;
    urgent.reset();
    code = find_link(pull.peer, deadline, ended, link);
    if (code != Code::kOk) return code;
  }
}

// Most blocks are found and checked without a word to their owner.
Code BlockClient::read_shared(const Pull& pull, const Link& link, Receiver& receiver,
                              Deadline deadline, const Signal* ended) {
  Code code = Code::kOk;
  if (receiver.copy_listed(deadline, ended) > 0) code = run(pull, link, receiver, deadline, ended);
  if (ended->is_raised()) return Code::kCancelled;
  if (deadline.is_past()) return Code::kTimeout;
  return code == Code::kOk ? note_used(pull, link, deadline, ended) : code;
}

// Telling the peer wakes it, which takes longer than reading a block: many are told at a time.
Code BlockClient::note_used(const Pull& pull, const Link& link, Deadline deadline,
                            const Signal* ended) {
  Pull due{.peer = pull.peer, .blocks = {}, .names = {}};
  {
    const std::lock_guard lock(mutex_);
    std::vector<Name>& used = peers_[pull.peer].used;
    if (used.size() + pull.names.size() > kUsedMax) due.names.swap(used);
    used.insert(used.end(), pull.names.begin(), pull.names.end());
  }
  if (due.names.empty()) return Code::kOk;
  return send_request(due, link.stream, used_request(), deadline, ended);
}

// Tells peers what is due, over connections that nobody uses at the moment.
void BlockClient::tell_used() {
  std::vector<std::pair<Pull, Link>> due;
  {
    const std::lock_guard lock(mutex_);
    for (auto& [peer, state] : peers_) {
      if (state.used.empty() || state.idle.empty()) continue;
      due.emplace_back(Pull{.peer = peer, .blocks = {}, .names = std::move(state.used)},
                       std::move(state.idle.back().link));
      state.used.clear();
      state.idle.pop_back();
    }
  }
  for (auto& [pull, link] : due) {
    const Deadline soon = Deadline::in(kTellMs);
    if (send_request(pull, link.stream, used_request(), soon, nullptr) != Code::kOk) continue;
    keep(pull.peer, std::move(link));
  }
}

Code BlockClient::run(const Pull& pull, const Link& link, Receiver& receiver, Deadline deadline,
                      const Signal* ended) {
  const RequestType by_name = pull.is_background ? RequestType::kBackground : RequestType::kNamed;
  Request request{};
  request.type = pull.is_session() ? RequestType::kSession : by_name;
  request.codec = link.view || link.remote ? Codec::kRaw : pull.codec;
  request.request_id = next_request_id_++;
  request.stripe = static_cast<uint16_t>(receiver.stripe().index);
  request.num_stripes = static_cast<uint16_t>(receiver.stripe().count);
  Code code = send_request(pull, link.stream, request, deadline, ended);
  if (code == Code::kOk) code = receiver.run(link.stream, request.request_id, deadline, ended);
  const bool is_awaited = pull.is_session() || receiver.is_source_holding();
  if (code != Code::kOk || !is_awaited) return code;
  if (pull.is_session() && !receiver.all_whole())
    return Code::kAborted;  // the source ended with fewer blocks, or bad
  request.type = RequestType::kAcknowledge;
  send_request(pull, link.stream, request, deadline, ended);  // all is here: a loss is harmless
  return Code::kOk;
}

// A peer of this node is read from its memory, where it offers that; others from afar if that is
// what was chosen, else by TCP.
Code BlockClient::connect(const Peer& peer, LinkKind kind, Deadline deadline, const Signal* ended,
                          Link& link) {
  const bool is_local = peer.may_be_local && !options_.socket_dir.empty() &&
                        connect_local(options_.socket_dir, peer.life.uid, link.stream);
  Code code = Code::kOk;
  if (!is_local) {
    const Deadline soon = deadline.at_most(kConnectMs);
    code = Stream::connect(peer.host, peer.port, soon, ended, link.stream);
  }
  const Deadline soon = deadline.at_most(kHelloMs);
  const bool is_remote = !is_local && options_.remote != nullptr;
  if (is_remote) kind = LinkKind::kRemote;
  if (code == Code::kOk) code = greet(peer, link.stream, kind, soon, ended);
  if (code == Code::kOk && is_local) code = map_memory(peer, soon, ended, link);
  if (code == Code::kOk && is_remote) {
    code = recv_remote_pool(link.stream, link.remote.emplace(), soon, ended);
  }
  return code;
}

Code BlockClient::greet(const Peer& peer, Stream& stream, LinkKind kind, Deadline deadline,
                        const Signal* ended) const {
  Greeting greeting{};
  Hello& hello = greeting.hello;
  hello.is_secured = !options_.secret.empty();
  hello.kind = kind;
  hello.layout_digest = pool_.shape().layout_digest;
  hello.uid = peer.life.uid;
  hello.epoch = peer.life.epoch;
  hello.num_layers = pool_.shape().num_layers;
  hello.layer_bytes = pool_.shape().layer_bytes;
  hello.num_heads = static_cast<uint16_t>(options_.codecs.num_heads);
  hello.head_dim = static_cast<uint16_t>(options_.codecs.head_dim);
  seal(hello);
  if (hello.is_secured) greeting.client_nonce = random_key();
  Key& nonce = greeting.client_nonce;
  HelloReply& reply = greeting.reply;
  iovec parts[2] = {{.iov_base = &hello, .iov_len = sizeof hello},
                    {.iov_base = &nonce, .iov_len = hello.is_secured ? sizeof nonce : 0}};
  Code code = stream.send_all(parts, 2, deadline, ended);
  if (code == Code::kOk) code = stream.recv_all(&reply, sizeof reply, deadline, ended);
  if (code != Code::kOk) return code;
  if (!is_intact(reply)) return Code::kRefused;
  if (reply.code != Code::kOk) return reply.code;
  const bool is_same_life = reply.uid == peer.life.uid && reply.epoch == peer.life.epoch;
  if (!is_same_life) return Code::kStalePeer;
  if (!hello.is_secured) return Code::kOk;
  return prove_as_client(stream, options_.secret, greeting, deadline, ended);
}

Code BlockClient::map_memory(const Peer& peer, Deadline deadline, const Signal* ended, Link& link) {
  SharedMemory memory;
  const Code code = recv_shared_memory(link.stream, memory, deadline, ended);
  if (code != Code::kOk) return code;
  const std::lock_guard lock(mutex_);
  PeerState& state = peers_[peer];
  link.view = state.view.lock();
  if (link.view) return Code::kOk;
  PoolShape shape = pool_.shape();
  shape.num_blocks = memory.num_blocks;
  try {
    link.view = std::make_shared<const SharedView>(memory.fd.get(), shape);
  } catch (const std::runtime_error&) {
    return Code::kRefused;
  }
  state.view = link.view;
  return Code::kOk;
}

BlockClient::Link BlockClient::take_idle(const Peer& peer) {
  const std::lock_guard lock(mutex_);
  const auto it = peers_.find(peer);
  if (it == peers_.end()) return {};
  const int64_t oldest_ms = monotonic_ms() - kIdleMs;
  while (!it->second.idle.empty()) {
    Idle idle = std::move(it->second.idle.back());
    it->second.idle.pop_back();
    if (idle.since_ms < oldest_ms || idle.link.stream.is_disturbed()) continue;
    idle.link.is_kept = true;
    return std::move(idle.link);
  }
  return {};
}

// Keeps the connection for the next pull.
void BlockClient::keep(const Peer& peer, Link link) {
  const std::lock_guard lock(mutex_);
  const bool is_worn = link.stream.secure() != nullptr && link.stream.secure()->is_worn();
  if (closed_ || is_worn) return;
  drop_unused();
  if (peers_.size() >= kIdlePeersMax && !peers_.contains(peer)) return;
  PeerState& state = peers_[peer];
  if (state.idle.size() >= options_.connections_per_peer_max) return;
  state.idle.push_back({.link = std::move(link), .since_ms = monotonic_ms()});
}

// Connections that nobody has used for long, or whose peer has gone. The mutex is held.
void BlockClient::drop_unused() {
  const int64_t oldest_ms = monotonic_ms() - kIdleMs;
  for (auto it = peers_.begin(); it != peers_.end();) {
    PeerState& state = it->second;
    std::erase_if(state.idle, [&](const Idle& idle) {
      return idle.since_ms < oldest_ms || idle.link.stream.is_disturbed();
    });
    const bool is_unused = state.idle.empty() && state.num_urgent == 0 && state.num_background == 0;
    it = is_unused ? peers_.erase(it) : std::next(it);
  }
}

// Mapped memory stays with the system for as long as it is mapped: a peer that has gone must not
// keep its own until the next pull.
void BlockClient::watch_peers() {
  std::unique_lock lock(mutex_);
  while (!closed_) {
    drop_unused();
    lock.unlock();
    tell_used();
    lock.lock();
    changed_.wait_for(lock, kWatchEvery, [this] { return closed_; });
  }
}

}  // namespace kvasir
