#include "receiver.h"

#include <utility>

#include "crc32c.h"

namespace kvasir {

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
  for (;;) {
    if (ended->is_raised()) return Code::kCancelled;
    if (deadline.is_past()) return Code::kTimeout;
    Frame frame;
    Code code = receive_header(frame);
    if (code != Code::kOk) return code;
    has_received_ = true;
    if (!is_expected(frame)) return bad_frame();
    if (frame.kind == FrameKind::kEnd) return next_bytes_ == 0 ? frame.code : bad_frame();
    if (frame.kind == FrameKind::kMiss) continue;
    code = receive_payload(frame);
    if (code != Code::kOk) return code;
  }
}

Code Receiver::receive_header(Frame& frame) {
  auto* header = reinterpret_cast<uint8_t*>(&next_);
  const Code code =
      stream_->recv_all(header + next_bytes_, sizeof(Frame) - next_bytes_, deadline_, ended_);
  next_bytes_ = 0;
  frame = next_;
  return code;
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
  const uint32_t num_layers = pool_.shape().num_layers;
  return frame.kind == FrameKind::kData && frame.codec == Codec::kRaw &&
         frame.layer_first == layers_[frame.ordinal] && frame.layer_count > 0 &&
         frame.layer_count <= num_layers - frame.layer_first &&
         frame.payload_bytes == uint64_t{frame.layer_count} * pool_.shape().layer_bytes;
}

// Straight into the block. Receives ahead into the next header, which saves a call per frame.
Code Receiver::receive_payload(const Frame& frame) {
  const uint32_t block = blocks_[frame.ordinal];
  uint8_t* const start = pool_.layer(block, frame.layer_first);
  size_t done = 0;
  while (done < frame.payload_bytes) {
    iovec parts[2] = {
        {.iov_base = start + done, .iov_len = frame.payload_bytes - done},
        {.iov_base = &next_, .iov_len = sizeof next_},
    };
    size_t received = 0;
    const Code code = stream_->recv_some(parts, received, deadline_, ended_);
    if (code != Code::kOk) return code;
    done += received;
  }
  next_bytes_ = done - frame.payload_bytes;
  layers_[frame.ordinal] += frame.layer_count;
  if (crc32c(start, frame.payload_bytes) != frame.payload_crc) {
    spoilt_[frame.ordinal] = true;
    result_.frames_bad += 1;
  }
  if (!spoilt_[frame.ordinal]) {
    result_.bytes_moved += frame.payload_bytes;
    pool_.raise_ready(block, layers_[frame.ordinal]);
  }
  return Code::kOk;
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
    if (!whole) pool_.raise_ready(blocks_[i], 0);
  }
  return std::move(result_);
}

}  // namespace kvasir
