#include "frame_batch.h"

#include <algorithm>

#include "crc32c.h"

namespace kvasir {
namespace {

constexpr int64_t kSendStallMs = 20'000;  // a peer that takes nothing for so long is given up

}  // namespace

// What is still queued in place must not leave once the blocks may hold something else.
FrameBatch::~FrameBatch() {
  if (pipe_ && !is_acknowledged_) stream_.discard();
  for (const Name& name : pins_) pool_.unpin(name);
}

Code FrameBatch::add(Frame frame, const uint8_t* payload) {
  if (code_ != Code::kOk) return code_;
  const bool is_sealed = stream_.secure() != nullptr;
  const bool is_full = !is_sealed && bytes_ > 0 && bytes_ + frame.payload_bytes > kBatchBytes;
  if ((num_frames_ == kFrames || is_full) && flush() != Code::kOk) return code_;
  frame.request_id = request_id_;
  seal(frame);
  const Frame& header = frames_[num_frames_++] = frame;
  add_part(&header, sizeof header);
  if (is_sealed) return add_sealed(header, payload);
  if (payload != nullptr) add_part(payload, header.payload_bytes);
  bytes_ += frame.payload_bytes;
  return code_;
}

void FrameBatch::send_in_place() {
  pipe_ = Pipe::make();
  if (pipe_) keep_pins();
}

void FrameBatch::add_part(const void* data, size_t size) {
  parts_[num_parts_++] = {.iov_base = const_cast<void*>(data), .iov_len = size};
}

Code FrameBatch::add_sealed(const Frame& header, const uint8_t* payload) {
  SecureChannel& secure = *stream_.secure();
  const size_t size = payload != nullptr ? header.payload_bytes : 0;
  if (size > 0) secure.outgoing.resize(kSealedBytes);
  if (payload == nullptr) bytes_ += header.payload_bytes;  // read from the pool itself
  bool good = secure.sending.begin(as_bytes(header));
  for (size_t done = 0; good && done < size;) {
    if (bytes_ == kSealedBytes && flush() != Code::kOk) return code_;
    const size_t piece = std::min(size - done, kSealedBytes - bytes_);
    uint8_t* const target = secure.outgoing.data() + bytes_;
    good = secure.sending.update(payload + done, target, piece);
    add_part(target, piece);
    bytes_ += piece;
    done += piece;
  }
  Tag& tag = tags_[num_tags_++];
  if (!good || !secure.sending.finish(tag)) code_ = Code::kRefused;
  add_part(&tag, sizeof tag);
  return code_;
}

const uint8_t* FrameBatch::encode_layers(Frame& frame, const uint8_t* layers) {
  const size_t size_max = encoded_bytes_max(codec_, shape_, frame.layer_count);
  // What is encoded now must lie there until it is sent: add() must find room for it.
  if (num_frames_ == kFrames || (bytes_ > 0 && bytes_ + size_max > kBatchBytes)) flush();
  if (code_ != Code::kOk) return nullptr;
  if (encoded_.size() < kBatchBytes + size_max) {
    flush();
    encoded_.resize(kBatchBytes + size_max);
  }
  uint8_t* const target = encoded_.data() + encoded_used_;
  const LayerRun run{
      .first = frame.layer_first, .count = frame.layer_count, .total = pool_.shape().num_layers};
  const size_t size = encode(codec_, shape_, run, layers, {target, size_max}, false);
  if (size == 0 || size >= frame.payload_bytes) return nullptr;
  encoded_used_ += size;
  frame.codec = codec_;
  frame.payload_bytes = size;
  return target;
}

uint32_t FrameBatch::frame_checksum(const Frame& frame, const uint8_t* payload, bool is_pinned) {
  if (stream_.secure() != nullptr && codec_ != Codec::kShared) return 0;  // it has a tag
  if (!is_pinned || is_lossy(frame.codec)) return crc32c(payload, frame.payload_bytes);
  auto checksum = pool_.frame_checksum(frame.source_block, frame.layer_first);
  if (!checksum) {
    checksum = crc32c(payload, frame.payload_bytes);
    pool_.keep_frame_checksum(frame.source_block, frame.layer_first, *checksum);
  }
  return *checksum;
}

Code FrameBatch::add_block(uint32_t ordinal, uint32_t block, const Name& name, uint32_t checksum) {
  Frame frame{};
  frame.kind = FrameKind::kData;
  frame.codec = Codec::kShared;
  frame.ordinal = ordinal;
  frame.source_block = block;
  frame.layer_count = static_cast<uint16_t>(pool_.shape().num_layers);
  frame.name = name;
  frame.payload_bytes = pool_.shape().block_bytes();
  frame.payload_crc = checksum;
  return add(frame, nullptr);
}

Code FrameBatch::add_layers(const Slice& slice, const Name& name) {
  const uint32_t layer_bytes = pool_.shape().layer_bytes;
  const uint32_t step = frame_layers(pool_.shape());
  for (uint32_t first = slice.layer_first; first < slice.layer_end; first += step) {
    if (!stripe_.has(pool_.shape(), slice.ordinal, first)) continue;
    Frame frame{};
    frame.kind = FrameKind::kData;
    frame.codec = codec_ == Codec::kShared ? codec_ : Codec::kRaw;
    frame.ordinal = slice.ordinal;
    frame.source_block = slice.block;
    frame.layer_first = static_cast<uint16_t>(first);
    frame.layer_count = static_cast<uint16_t>(std::min(step, slice.layer_end - first));
    frame.name = name;
    frame.payload_bytes = uint64_t{frame.layer_count} * layer_bytes;
    const uint8_t* const layers = pool_.layer(slice.block, first);
    const uint8_t* const encoded = is_lossy(codec_) ? encode_layers(frame, layers) : nullptr;
    const uint8_t* const payload = encoded != nullptr ? encoded : layers;
    frame.payload_crc = frame_checksum(frame, payload, slice.is_pinned);
    if (add(frame, codec_ == Codec::kShared ? nullptr : payload) != Code::kOk) break;
  }
  return code_;
}

Code FrameBatch::add_miss(uint32_t ordinal, const Name& name) {
  Frame frame{};
  frame.kind = FrameKind::kMiss;
  frame.ordinal = ordinal;
  frame.name = name;
  return add(frame, nullptr);
}

Code FrameBatch::add_end(Code reason, uint32_t count) {
  Frame frame{};
  frame.kind = FrameKind::kEnd;
  frame.ordinal = count;
  frame.code = reason;
  frame.is_held = keeps_pins_;
  add(frame, nullptr);
  return flush();
}

Code FrameBatch::flush() {
  if (code_ == Code::kOk && stopped_.is_raised()) code_ = Code::kCancelled;
  if (code_ == Code::kOk && num_parts_ > 0) {
    if (background_) background_->before(bytes_);
    const Deadline deadline = Deadline::in(kSendStallMs);
    code_ = pipe_ ? stream_.send_in_place(parts_.data(), num_parts_, pipe_, deadline, &stopped_)
                  : stream_.send_all(parts_.data(), num_parts_, deadline, &stopped_);
  }
  if (code_ == Code::kOk) payload_bytes_sent_ += bytes_;
  num_frames_ = num_tags_ = num_parts_ = bytes_ = encoded_used_ = 0;
  // The last pin may be of a block with frames still to come.
  const size_t num_done = pins_.empty() || keeps_pins_ ? 0 : pins_.size() - 1;
  for (size_t i = 0; i < num_done; ++i) pool_.unpin(pins_[i]);
  pins_.erase(pins_.begin(), pins_.begin() + static_cast<ptrdiff_t>(num_done));
  return code_;
}

}  // namespace kvasir
