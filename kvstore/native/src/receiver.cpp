#include "receiver.h"

#include <algorithm>
#include <utility>

#include "crc32c.h"

namespace kvasir {
namespace {

// Received, then checked or decrypted while it is in the cache and the peer sends the next.
constexpr size_t kPieceBytes = 128 << 10;

}  // namespace

const char* transport_name(Transport transport) {
  switch (transport) {
    case Transport::kNone:
      return "";
    case Transport::kTcp:
      return "tcp";
    case Transport::kEncrypted:
      return "tcp-encrypted";
    case Transport::kShared:
      return "shm";
    case Transport::kRemote:
      return "nixl";
  }
  return "";
}

Receiver::Receiver(BlockPool& pool, const std::vector<uint32_t>& blocks,
                   const std::vector<Name>& names, uint64_t session_id)
    : pool_(pool),
      blocks_(blocks),
      names_(names),
      session_(session_name(session_id)),
      layers_(blocks.size(), 0),
      spoilt_(blocks.size(), false) {}

Code Receiver::run(const Stream& stream, uint64_t request_id, Deadline deadline,
                   const Signal* ended) {
  stream_ = &stream;
  request_id_ = request_id;
  deadline_ = deadline;
  ended_ = ended;
  next_bytes_ = 0;
  waiting_.clear();
  waiting_bytes_ = 0;
  for (;;) {
    if (ended->is_raised()) return Code::kCancelled;
    if (deadline.is_past()) return Code::kTimeout;
    Code code = Code::kOk;
    if (!waiting_.empty() && !stream.is_disturbed()) code = read_waiting();
    Frame frame;
    if (code == Code::kOk) code = receive_header(frame);
    if (code != Code::kOk) return code;
    has_received_ = true;
    if (!is_expected(frame)) return bad_frame();
    if (background_) background_->before(frame.payload_bytes);
    if (frame.kind == FrameKind::kData && frame.codec != Codec::kShared) {
      code = receive_payload(frame);
      if (code != Code::kOk) return code;
      continue;
    }
    code = open(frame);
    if (code != Code::kOk) return code;
    if (frame.kind == FrameKind::kData) code = take_reference(frame);
    if (frame.kind == FrameKind::kEnd) code = read_waiting();
    if (code != Code::kOk) return code;
    is_source_holding_ = frame.kind == FrameKind::kEnd && frame.is_held != 0;
    if (frame.kind == FrameKind::kEnd) return next_bytes_ == 0 ? frame.code : bad_frame();
  }
}

// The frame says where its payload lies: in memory that is mapped here, or afar.
Code Receiver::take_reference(const Frame& frame) {
  if (remote_ == nullptr) {
    copy_payload(frame);
    return Code::kOk;
  }
  Code code = Code::kOk;
  if (waiting_bytes_ + frame.payload_bytes > remote_->bytes_max()) code = read_waiting();
  waiting_.push_back(frame);
  waiting_bytes_ += frame.payload_bytes;
  return code;
}

Code Receiver::read_waiting() {
  if (waiting_.empty()) return Code::kOk;
  const PoolShape& shape = pool_.shape();
  std::vector<RemotePiece> pieces;
  for (const Frame& frame : waiting_) {
    const uint64_t offset =
        frame.source_block * shape.block_bytes() + uint64_t{frame.layer_first} * shape.layer_bytes;
    pieces.push_back({.address = remote_pool_->address + offset, .bytes = frame.payload_bytes});
  }
  const int64_t began_ns = monotonic_ns();
  const Code code =
      remote_->read(*remote_pool_, pieces, deadline_, ended_, [&](const uint8_t* bytes) {
        for (const Frame& frame : waiting_) {
          const uint32_t checksum = crc32c_copy(
              pool_.layer(blocks_[frame.ordinal], frame.layer_first), bytes, frame.payload_bytes);
          take_layers(frame.ordinal, frame.layer_count, checksum == frame.payload_crc);
          bytes += frame.payload_bytes;
        }
      });
  if (code == Code::kOk) {
    result_.wire_ns += monotonic_ns() - began_ns;
    result_.bytes_wire += waiting_bytes_;
  }
  waiting_.clear();
  waiting_bytes_ = 0;
  return code;
}

// Layers that have come, or that a waiting frame stands for.
uint32_t Receiver::next_layer(size_t ordinal) const {
  uint32_t next = layers_[ordinal];
  for (const Frame& frame : waiting_) next += frame.ordinal == ordinal ? frame.layer_count : 0;
  return next;
}

void Receiver::accept(Codec codec, const CodecShape& shape) {
  codec_ = codec;
  shape_ = shape;
}

void Receiver::read_from(const SharedView* view, Transport transport) {
  view_ = view;
  remote_ = nullptr;
  result_.transport = transport;
}

void Receiver::read_from(RemoteReader& reader, const RemotePool& pool) {
  remote_ = &reader;
  remote_pool_ = &pool;
  result_.transport = Transport::kRemote;
}

void Receiver::set_stripe(const Stripe& stripe, std::vector<std::atomic<uint32_t>>& landed) {
  stripe_ = stripe;
  landed_ = &landed;
  for (size_t i = 0; i < layers_.size(); ++i) layers_[i] = stripe.next_layer(pool_.shape(), i, 0);
}

size_t Receiver::copy_listed(Deadline deadline, const Signal* ended) {
  size_t num_unknown = 0;
  for (size_t i = 0; i < names_.size(); ++i) {
    if (ended->is_raised() || deadline.is_past()) break;
    if (background_) background_->before(pool_.shape().block_bytes());
    num_unknown += !copy_named(i);
  }
  return num_unknown;
}

bool Receiver::copy_named(size_t ordinal) {
  if (layers_[ordinal] > 0) return true;  // by an earlier attempt
  const auto found = view_->directory().find(names_[ordinal]);
  if (!found) return true;
  if (!found->checksum) return false;
  const uint32_t checksum = crc32c_copy(pool_.layer(blocks_[ordinal], 0),
                                        view_->layer(found->block, 0), pool_.shape().block_bytes());
  if (!view_->directory().is_unchanged(*found)) return true;  // evicted meanwhile: a miss
  take_layers(ordinal, pool_.shape().num_layers, checksum == *found->checksum);
  return true;
}

void Receiver::copy_payload(const Frame& frame) {
  if (!names_.empty()) {
    copy_named(frame.ordinal);
    return;
  }
  const uint32_t checksum =
      crc32c_copy(pool_.layer(blocks_[frame.ordinal], frame.layer_first),
                  view_->layer(frame.source_block, frame.layer_first), frame.payload_bytes);
  take_layers(frame.ordinal, frame.layer_count, checksum == frame.payload_crc);
}

// Layers that have landed; they become final if they are what was sent.
void Receiver::take_layers(size_t ordinal, uint32_t count, bool is_right) {
  const PoolShape& shape = pool_.shape();
  layers_[ordinal] = stripe_.next_layer(shape, ordinal, layers_[ordinal] + count);
  if (!is_right) {
    spoilt_[ordinal] = true;
    result_.frames_bad += 1;
  }
  if (spoilt_[ordinal]) return;
  result_.bytes_moved += size_t{count} * shape.layer_bytes;
  if (landed_ == nullptr) {
    pool_.raise_ready(blocks_[ordinal], layers_[ordinal]);
  } else if ((*landed_)[ordinal].fetch_add(count) + count == shape.num_layers) {
    pool_.raise_ready(blocks_[ordinal], shape.num_layers);
  }
}

Code Receiver::receive_header(Frame& frame) {
  auto* header = reinterpret_cast<uint8_t*>(&ahead_.frame);
  const Code code =
      stream_->recv_all(header + next_bytes_, sizeof(Frame) - next_bytes_, deadline_, ended_);
  next_bytes_ = 0;
  frame = ahead_.frame;
  return code;
}

// The rest of the tag, of which `received` bytes are in ahead_ together with what follows it.
Code Receiver::receive_tag(size_t received) {
  if (received < sizeof(Tag)) {
    const Code code =
        stream_->recv_all(ahead_.tag.data() + received, sizeof(Tag) - received, deadline_, ended_);
    if (code != Code::kOk) return code;
    received = sizeof(Tag);
  }
  next_bytes_ = received - sizeof(Tag);
  return Code::kOk;
}

Code Receiver::open(const Frame& frame) {
  SecureChannel* const secure = stream_->secure();
  if (secure == nullptr) return Code::kOk;
  const Code code = receive_tag(next_bytes_);
  if (code != Code::kOk) return code;
  const bool is_right = secure->receiving.run(as_bytes(frame), nullptr, nullptr, 0, ahead_.tag);
  return is_right ? Code::kOk : bad_frame();
}

bool Receiver::is_expected(const Frame& frame) const {
  if (!is_intact(frame) || frame.request_id != request_id_) return false;
  if (frame.kind == FrameKind::kEnd) {
    const bool fits = frame.ordinal <= blocks_.size() || frame.code != Code::kOk;
    return frame.payload_bytes == 0 && fits;
  }
  if (frame.ordinal >= blocks_.size()) return false;
  if (frame.name != (names_.empty() ? session_ : names_[frame.ordinal])) return false;
  if (frame.kind == FrameKind::kMiss) return frame.payload_bytes == 0 && !names_.empty();
  const PoolShape& shape = pool_.shape();
  if (frame.kind != FrameKind::kData || frame.layer_count == 0 ||
      frame.layer_first + frame.layer_count > shape.num_layers) {
    return false;
  }
  const uint32_t on_grid = std::min(frame_layers(shape), shape.num_layers - frame.layer_first);
  if (stripe_.count > 1 && frame.layer_count != on_grid) return false;  // the rest is of others
  const uint64_t layers_bytes = uint64_t{frame.layer_count} * shape.layer_bytes;
  const bool is_encoded = is_lossy(frame.codec);
  if (is_encoded ? frame.codec != codec_ || frame.payload_bytes >= layers_bytes
                 : frame.payload_bytes != layers_bytes) {
    return false;
  }
  const bool is_next = frame.layer_first == next_layer(frame.ordinal);
  if (remote_ != nullptr) {
    return frame.codec == Codec::kShared && frame.source_block < remote_pool_->num_blocks &&
           frame.payload_bytes <= remote_->bytes_max() && is_next;
  }
  if (view_ == nullptr) return (is_encoded || frame.codec == Codec::kRaw) && is_next;
  // A named block that had a checksum before we asked has been copied before.
  return frame.codec == Codec::kShared && frame.source_block < view_->shape().num_blocks &&
         (is_next || !names_.empty());
}

// Straight into the block, and decrypted there, or, if encoded, decoded into it. Receives ahead
// into the next header, which saves a call per frame.
Code Receiver::receive_payload(const Frame& frame) {
  const bool is_encoded = is_lossy(frame.codec);
  if (is_encoded && encoded_.size() < frame.payload_bytes) encoded_.resize(frame.payload_bytes);
  uint8_t* const start =
      is_encoded ? encoded_.data() : pool_.layer(blocks_[frame.ordinal], frame.layer_first);
  const int64_t began_ns = monotonic_ns();
  SecureChannel* const secure = stream_->secure();
  void* const ahead = secure != nullptr ? static_cast<void*>(&ahead_) : &ahead_.frame;
  const size_t ahead_bytes = secure != nullptr ? sizeof ahead_ : sizeof ahead_.frame;
  bool is_right = secure == nullptr || secure->receiving.begin(as_bytes(frame));
  uint32_t checksum = 0;
  size_t done = 0;
  while (done < frame.payload_bytes) {
    const size_t left = frame.payload_bytes - done;
    iovec parts[2] = {
        {.iov_base = start + done, .iov_len = std::min(left, kPieceBytes)},
        {.iov_base = ahead, .iov_len = left <= kPieceBytes ? ahead_bytes : 0},
    };
    size_t received = 0;
    const Code code = stream_->recv_some(parts, received, deadline_, ended_);
    if (code != Code::kOk) return code;
    const size_t landed = std::min(received, left);
    if (secure == nullptr) {
      checksum = crc32c(start + done, landed, checksum);
    } else {
      is_right = is_right && secure->receiving.update(start + done, start + done, landed);
    }
    done += received;
  }
  result_.wire_ns += monotonic_ns() - began_ns;
  result_.bytes_wire += frame.payload_bytes;
  next_bytes_ = done - frame.payload_bytes;
  if (secure == nullptr) {
    is_right = checksum == frame.payload_crc;
    take_layers(frame.ordinal, frame.layer_count, is_right && land(frame, start));
    return Code::kOk;
  }
  const Code code = receive_tag(next_bytes_);
  if (code != Code::kOk) return code;
  // Where somebody changed it, nothing after it can be trusted.
  if (!is_right || !secure->receiving.finish(ahead_.tag)) return bad_frame();
  take_layers(frame.ordinal, frame.layer_count, land(frame, start));
  return Code::kOk;
}

bool Receiver::land(const Frame& frame, const uint8_t* payload) {
  if (!is_lossy(frame.codec)) return true;
  result_.is_lossy = true;
  uint8_t* const layers = pool_.layer(blocks_[frame.ordinal], frame.layer_first);
  const CodecFault fault =
      decode(shape_, frame.layer_count, {payload, frame.payload_bytes}, layers);
  return fault == CodecFault::kNone;
}

Code Receiver::bad_frame() {
  result_.frames_bad += 1;
  return Code::kBadFrame;
}

bool Receiver::all_whole() const {
  for (size_t i = 0; i < blocks_.size(); ++i) {
    if (spoilt_[i] || layers_[i] != pool_.shape().num_layers) return false;
  }
  return true;
}

PullResult Receiver::take_result(Code error) {
  if (result_.frames_bad > 0) error = Code::kBadFrame;
  result_.error = error;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const bool whole = !spoilt_[i] && layers_[i] == pool_.shape().num_layers;
    result_.blocks_ok.push_back(whole);
    if (!whole && landed_ == nullptr) pool_.raise_ready(blocks_[i], 0);
  }
  return std::move(result_);
}

}  // namespace kvasir
