#include "sender.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "crc32c.h"
#include "frame_batch.h"
#include "futex.h"
#include "handshake.h"
#include "local_socket.h"
#include "remote.h"

namespace kvasir {
namespace {

constexpr int64_t kHelloMs = 5'000;         // a client says at once what it wants
constexpr int64_t kIdleMs = 60'000;         // between requests
constexpr int64_t kRequestMsMax = 600'000;  // whatever the client asks for
constexpr size_t kInPlaceBytes = 1 << 20;   // an answer as large is worth an acknowledgement
constexpr int64_t kSliceMs = 50;            // between looks at the client while a session computes
constexpr size_t kSweepBytes = 1 << 20;     // between looks at the session, however slow the client

using Status = BlockPool::SessionStatus;

// What was agreed on for all requests of a connection.
struct Terms {
  CodecShape codecs = {};
  bool is_remote = false;  // the peer's transfer library reads the pool's memory
};

CodecShape codec_shape(const Hello& hello) {
  return {.num_heads = hello.num_heads, .head_dim = hello.head_dim};
}

Code check_hello(const SenderContext& context, const Hello& hello) {
  if (!is_intact(hello)) return Code::kRefused;
  if (hello.uid != context.self.uid || hello.epoch != context.self.epoch) return Code::kStalePeer;
  if ((hello.is_secured != 0) == context.secret.empty()) return Code::kUnauthenticated;
  const PoolShape& shape = context.pool.shape();
  if (hello.layout_digest != shape.layout_digest || hello.num_layers != shape.num_layers ||
      hello.layer_bytes != shape.layer_bytes) {
    return Code::kOtherLayout;
  }
  const CodecShape codecs = codec_shape(hello);
  const bool is_right = codecs.is_encodable() && codecs.layer_bytes() == shape.layer_bytes;
  if (hello.num_heads != 0 && !is_right) return Code::kOtherLayout;
  return hello.kind == LinkKind::kRemote && context.remote_agent.empty() ? Code::kOtherTransport
                                                                         : Code::kOk;
}

void count_refusal(ServerCounters& counters, Code code) {
  counters.bad_requests += code == Code::kRefused;
  counters.stale_refused += code == Code::kStalePeer;
  counters.layout_refused += code == Code::kOtherLayout;
  counters.unauthenticated += code == Code::kUnauthenticated;
}

bool greet(const SenderContext& context, Stream& stream, Terms& terms) {
  const Deadline deadline = Deadline::in(kHelloMs);
  const Signal* stopped = &context.stopped;
  Greeting greeting{};
  Hello& hello = greeting.hello;
  if (stream.recv_all(&hello, sizeof hello, deadline, stopped) != Code::kOk) return false;
  Key& nonce = greeting.client_nonce;
  const bool is_secured = is_intact(hello) && hello.is_secured;
  if (is_secured && stream.recv_all(&nonce, sizeof nonce, deadline, stopped) != Code::kOk) {
    return false;
  }
  terms = {.codecs = codec_shape(hello), .is_remote = hello.kind == LinkKind::kRemote};
  HelloReply& reply = greeting.reply;
  reply.code = check_hello(context, hello);
  reply.uid = context.self.uid;
  reply.epoch = context.self.epoch;
  count_refusal(context.counters, reply.code);
  const bool is_unwanted = hello.kind == LinkKind::kExtra && !context.takes_extra;
  if (reply.code == Code::kOk && is_unwanted) reply.code = Code::kRefused;
  seal(reply);
  Code code = stream.send_all(&reply, sizeof reply, deadline, stopped);
  if (code != Code::kOk || reply.code != Code::kOk) return false;
  if (is_secured) {
    code = prove_as_server(stream, context.secret, greeting, deadline, stopped);
    count_refusal(context.counters, code);
  }
  if (code == Code::kOk && context.is_local) {
    code = send_shared_memory(stream, context.pool.descriptor(), context.pool.shape().num_blocks,
                              deadline, stopped);
  }
  if (code == Code::kOk && terms.is_remote) {
    const RemotePool pool{.agent = context.remote_agent,
                          .address = reinterpret_cast<uint64_t>(context.pool.data()),
                          .num_blocks = context.pool.shape().num_blocks};
    code = send_remote_pool(stream, pool, deadline, stopped);
  }
  return code == Code::kOk;
}

// Opens a request that has arrived whole; without encryption, its checksum tells.
bool open_request(const Stream& stream, const Request& request, std::vector<Name>& names,
                  Deadline deadline, const Signal* stopped) {
  auto* body = reinterpret_cast<uint8_t*>(names.data());
  const size_t size = names.size() * sizeof(Name);
  if (stream.secure() == nullptr) return crc32c(body, size) == request.body_crc;
  Tag tag;
  return stream.recv_all(&tag, sizeof tag, deadline, stopped) == Code::kOk &&
         stream.secure()->receiving.run(as_bytes(request), body, body, size, tag);
}

// False: not a request, or the client has gone.
bool receive_request(const SenderContext& context, const Stream& stream, Request& request,
                     std::vector<Name>& names) {
  const Deadline deadline = Deadline::in(kHelloMs);
  if (stream.recv_all(&request, sizeof request, deadline, &context.stopped) != Code::kOk) {
    return false;
  }
  bool good = is_intact(request) && request.count <= kNamesMax &&
              request.stripe < request.num_stripes && request.num_stripes <= kStripesMax;
  if (good) {
    names.resize(has_names(request.type) ? request.count : 0);
    const size_t size = names.size() * sizeof(Name);
    const Code code = stream.recv_all(names.data(), size, deadline, &context.stopped);
    if (code != Code::kOk) return false;
    good = open_request(stream, request, names, deadline, &context.stopped);
  }
  if (!good) context.counters.bad_requests += 1;
  return good;
}

// The client has verified all that it asked for.
bool receive_acknowledgement(const SenderContext& context, const Stream& stream,
                             const Request& request, Deadline deadline) {
  Request reply;
  std::vector<Name> none;
  return stream.wait_readable(deadline, &context.stopped) == Code::kOk &&
         receive_request(context, stream, reply, none) && reply.type == RequestType::kAcknowledge &&
         reply.request_id == request.request_id;
}

// False: the connection is of no more use.
bool serve_named(const SenderContext& context, const Stream& stream, const Request& request,
                 const std::vector<Name>& names, const Terms& terms) {
  const Deadline deadline = Deadline::in(std::min<int64_t>(request.timeout_ms, kRequestMsMax));
  const uint32_t num_layers = context.pool.shape().num_layers;
  const Codec codec = terms.is_remote ? Codec::kShared : request.codec;
  FrameBatch batch(context.pool, stream, context.stopped, request.request_id, codec, terms.codecs);
  batch.set_stripe({.index = request.stripe, .count = request.num_stripes});
  const bool counts = request.stripe == 0;  // a pull is counted once
  if (terms.is_remote) batch.keep_pins();
  const size_t bytes = names.size() * context.pool.shape().block_bytes() / request.num_stripes;
  const bool is_plain = codec == Codec::kRaw && stream.secure() == nullptr;
  if (is_plain && bytes >= kInPlaceBytes) batch.send_in_place();
  std::optional<Traffic::Urgent> urgent;
  if (request.type == RequestType::kBackground) {
    batch.set_background();
  } else {
    urgent.emplace(context.pool.traffic());
  }
  uint64_t blocks_sent = 0;
  Code reason = Code::kOk;
  uint32_t ordinal = 0;
  for (; ordinal < names.size() && reason == Code::kOk; ++ordinal) {
    const Name& name = names[ordinal];
    if (deadline.is_past()) {
      reason = Code::kTimeout;
    } else if (const auto block = context.pool.pin(name)) {
      batch.own_pin(name);
      if (counts) context.pool.count_use(name);
      blocks_sent += counts;
      const FrameBatch::Slice whole{.ordinal = ordinal,
                                    .block = *block,
                                    .layer_first = 0,
                                    .layer_end = num_layers,
                                    .is_pinned = true};
      if (batch.add_layers(whole, name) != Code::kOk) return false;
    } else {
      context.counters.blocks_missed += counts;
      if (batch.add_miss(ordinal, name) != Code::kOk) return false;
    }
  }
  if (batch.add_end(reason, ordinal) != Code::kOk) return false;
  if (batch.keeps_pins() && !receive_acknowledgement(context, stream, request, deadline)) {
    return false;
  }
  batch.note_acknowledged();
  context.counters.bytes_sent += batch.payload_bytes_sent();
  context.counters.blocks_sent += blocks_sent;
  return true;
}

// Makes the blocks' checksums, so that the peer can check what it copies from the memory. Frames
// say how far this has come: the peer copies one block while the next one's checksum is made.
bool share_named(const SenderContext& context, const Stream& stream, const Request& request,
                 const std::vector<Name>& names) {
  const Deadline deadline = Deadline::in(std::min<int64_t>(request.timeout_ms, kRequestMsMax));
  FrameBatch batch(context.pool, stream, context.stopped, request.request_id, Codec::kShared);
  if (request.type == RequestType::kBackground) batch.set_background();
  Code reason = Code::kOk;
  uint32_t ordinal = 0;
  for (; ordinal < names.size() && reason == Code::kOk; ++ordinal) {
    const Name& name = names[ordinal];
    Code sent = Code::kOk;
    if (deadline.is_past()) {
      reason = Code::kTimeout;
    } else if (const auto block = context.pool.pin(name)) {
      const uint32_t checksum =
          crc32c(context.pool.layer(*block, 0), context.pool.shape().block_bytes());
      context.pool.share_checksum(*block, checksum);
      context.pool.unpin(name);
      sent = batch.add_block(ordinal, *block, name, checksum);
    } else {
      sent = batch.add_miss(ordinal, name);
    }
    if (sent != Code::kOk) return false;
  }
  return batch.add_end(reason, ordinal) == Code::kOk;
}

// The peer has looked for these in the memory: counted here as if they had been sent.
void count_used(const SenderContext& context, const std::vector<Name>& names) {
  uint64_t blocks_sent = 0;
  for (const Name& name : names) blocks_sent += context.pool.count_use(name);
  context.counters.blocks_sent += blocks_sent;
  context.counters.blocks_missed += names.size() - blocks_sent;
  context.counters.bytes_sent += blocks_sent * context.pool.shape().block_bytes();
}

// One hand-off: sends each block's layers as they become final.
class SessionSender {
 public:
  SessionSender(const SenderContext& context, const Stream& stream, const Request& request,
                const Terms& terms)
      : context_(context),
        stream_(stream),
        request_(request),
        name_(session_name(request.session_id)),
        deadline_(Deadline::in(std::min<int64_t>(request.timeout_ms, kRequestMsMax))),
        batch_(context.pool, stream, context.stopped, request.request_id,
               context.is_local || terms.is_remote ? Codec::kShared : request.codec, terms.codecs) {
  }

  bool run() {
    const Code opened = wait_for_open();
    if (opened != Code::kOk) return finish(opened, false);
    Code reason = Code::kOk;
    bool all_sent = false;
    while (reason == Code::kOk && !all_sent) reason = send_new_layers(all_sent);
    return finish(reason, reason == Code::kOk);
  }

 private:
  // Sleeps until something of the pool changes; not kOk: stop.
  Code pause(uint32_t seen) {
    futex_wait(context_.pool.progress(), seen, std::min(deadline_.left_ms(), kSliceMs));
    if (context_.stopped.is_raised()) return Code::kCancelled;
    if (stream_.is_disturbed()) return Code::kUnreachable;
    return deadline_.is_past() ? Code::kTimeout : Code::kOk;
  }

  uint32_t progress() const {
    return std::atomic_ref<uint32_t>(*context_.pool.progress()).load(std::memory_order_seq_cst);
  }

  Code wait_for_open() {
    for (;;) {
      const uint32_t seen = progress();
      const Status status = context_.pool.begin_read(request_.session_id);
      if (status == Status::kAborted) return Code::kAborted;
      if (status != Status::kUnknown) {
        reading_ = true;
        return Code::kOk;
      }
      const Code code = pause(seen);
      if (code != Code::kOk) return code;
    }
  }

  // One sweep over the blocks that are not yet wholly sent; sleeps if there was nothing to send.
  Code send_new_layers(bool& all_sent) {
    if (deadline_.is_past()) return Code::kTimeout;
    const uint32_t seen = progress();
    const Status status = context_.pool.read_session(request_.session_id, blocks_);
    if (status == Status::kAborted) return Code::kAborted;
    if (blocks_.size() > request_.count) return Code::kRefused;
    sent_.resize(blocks_.size(), 0);
    const uint32_t num_layers = context_.pool.shape().num_layers;
    size_t swept_bytes = 0;
    std::optional<Traffic::Urgent> urgent;
    for (size_t i = first_unsent_; i < blocks_.size() && swept_bytes < kSweepBytes; ++i) {
      const uint32_t ready = std::min(context_.pool.ready_layers(blocks_[i]), num_layers);
      if (ready <= sent_[i]) continue;
      if (!urgent) urgent.emplace(context_.pool.traffic());
      const FrameBatch::Slice slice{.ordinal = static_cast<uint32_t>(i),
                                    .block = blocks_[i],
                                    .layer_first = sent_[i],
                                    .layer_end = ready};
      if (const Code code = batch_.add_layers(slice, name_); code != Code::kOk) return code;
      swept_bytes += size_t{ready - sent_[i]} * context_.pool.shape().layer_bytes;
      sent_[i] = ready;
    }
    if (const Code code = batch_.flush(); code != Code::kOk) return code;
    urgent.reset();
    while (first_unsent_ < blocks_.size() && sent_[first_unsent_] == num_layers) ++first_unsent_;
    all_sent = status == Status::kFinished && first_unsent_ == blocks_.size();
    return all_sent || swept_bytes > 0 ? Code::kOk : pause(seen);
  }

  // Says how it ended, takes the acknowledgement and lets go of the session.
  bool finish(Code reason, bool complete) {
    bool acknowledged = false;
    const Code ended = batch_.add_end(reason, static_cast<uint32_t>(blocks_.size()));
    if (ended == Code::kOk && complete) {
      acknowledged = receive_acknowledgement(context_, stream_, request_, deadline_);
    }
    if (reading_) context_.pool.end_read(request_.session_id, acknowledged);
    context_.counters.bytes_sent += batch_.payload_bytes_sent();
    if (acknowledged) {
      context_.counters.blocks_sent += blocks_.size();
      context_.counters.sessions_sent += 1;
    }
    return ended == Code::kOk && (acknowledged || !complete);
  }

  const SenderContext& context_;
  const Stream& stream_;
  const Request& request_;
  const Name name_;
  const Deadline deadline_;
  FrameBatch batch_;
  std::vector<uint32_t> blocks_;
  std::vector<uint32_t> sent_;  // layers, per block
  size_t first_unsent_ = 0;
  bool reading_ = false;
};

}  // namespace

void serve_connection(const SenderContext& context, Stream& stream,
                      std::atomic<int64_t>& idle_since_ms) {
  Terms terms;
  if (!greet(context, stream, terms)) return;
  Request request;
  std::vector<Name> names;
  for (;;) {
    idle_since_ms = monotonic_ms();
    const Code code = stream.wait_readable(Deadline::in(kIdleMs), &context.stopped);
    idle_since_ms = 0;
    if (code != Code::kOk || !receive_request(context, stream, request, names)) return;
    bool usable = false;
    if (request.codec != Codec::kRaw && !(is_lossy(request.codec) && terms.codecs.is_encodable())) {
      context.counters.bad_requests += 1;
      return;
    }
    if (request.type == RequestType::kNamed || request.type == RequestType::kBackground) {
      usable = context.is_local ? share_named(context, stream, request, names)
                                : serve_named(context, stream, request, names, terms);
    } else if (request.type == RequestType::kUsed) {
      count_used(context, names);
      usable = true;
    } else if (request.type == RequestType::kSession) {
      usable = SessionSender(context, stream, request, terms).run();
    } else {
      context.counters.bad_requests += 1;
    }
    if (!usable) return;
  }
}

}  // namespace kvasir
