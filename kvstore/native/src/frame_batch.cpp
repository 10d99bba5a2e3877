#include "frame_batch.h"

#include <algorithm>

#include "crc32c.h"

namespace kvasir {
namespace {

constexpr int64_t kSendStallMs = 20'000;  // a peer that takes nothing for so long is given up

}  // namespace

FrameBatch::~FrameBatch() {
  for (const Name& name : pins_) pool_.unpin(name);
}

Code FrameBatch::add(Frame frame, const uint8_t* payload, size_t size) {
  if (code_ != Code::kOk) return code_;
  if (num_frames_ == kFrames || (bytes_ > 0 && bytes_ + size > kBatchBytes)) {
    if (flush() != Code::kOk) return code_;
  }
  frame.request_id = request_id_;
  frame.payload_bytes = size;
  frame.payload_crc = crc32c(payload, size);
  seal(frame);
  Frame& header = frames_[num_frames_++] = frame;
  parts_[num_parts_++] = {.iov_base = &header, .iov_len = sizeof header};
  if (size > 0) {
    parts_[num_parts_++] = {.iov_base = const_cast<uint8_t*>(payload), .iov_len = size};
  }
  bytes_ += size;
  return code_;
}

Code FrameBatch::add_layers(const Slice& slice, const Name& name) {
  const uint32_t layer_bytes = pool_.shape().layer_bytes;
  const auto step = std::max<uint32_t>(1, kFramePayloadBytes / layer_bytes);
  for (uint32_t first = slice.layer_first; first < slice.layer_end; first += step) {
    Frame frame{};
    frame.kind = FrameKind::kData;
    frame.ordinal = slice.ordinal;
    frame.layer_first = first;
    frame.layer_count = std::min(step, slice.layer_end - first);
    frame.name = name;
    const size_t size = size_t{frame.layer_count} * layer_bytes;
    if (add(frame, pool_.layer(slice.block, first), size) != Code::kOk) break;
  }
  return code_;
}

Code FrameBatch::add_miss(uint32_t ordinal, const Name& name) {
  Frame frame{};
  frame.kind = FrameKind::kMiss;
  frame.ordinal = ordinal;
  frame.name = name;
  return add(frame, nullptr, 0);
}

Code FrameBatch::add_end(Code reason, uint32_t count) {
  Frame frame{};
  frame.kind = FrameKind::kEnd;
  frame.ordinal = count;
  frame.code = reason;
  add(frame, nullptr, 0);
  return flush();
}

Code FrameBatch::flush() {
  if (code_ == Code::kOk && stopped_.is_raised()) code_ = Code::kCancelled;
  if (code_ == Code::kOk && num_parts_ > 0) {
    code_ = stream_.send_all(parts_.data(), num_parts_, Deadline::in(kSendStallMs), &stopped_);
  }
  if (code_ == Code::kOk) payload_bytes_sent_ += bytes_;
  num_frames_ = num_parts_ = bytes_ = 0;
  // The last pin may be of a block with frames still to come.
  const size_t num_done = pins_.empty() ? 0 : pins_.size() - 1;
  for (size_t i = 0; i < num_done; ++i) pool_.unpin(pins_[i]);
  pins_.erase(pins_.begin(), pins_.begin() + static_cast<ptrdiff_t>(num_done));
  return code_;
}

}  // namespace kvasir
