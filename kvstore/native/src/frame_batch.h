// Frames gathered for one sendmsg: headers here, payloads where they lie in the pool.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "codec.h"
#include "crypto.h"
#include "pool.h"
#include "stream.h"
#include "stripe.h"
#include "wire.h"

namespace kvasir {

class FrameBatch {
 public:
  // Codec kShared: the peer reads the payloads from the pool itself. Others need the shape.
  FrameBatch(BlockPool& pool, const Stream& stream, const Signal& stopped, uint64_t request_id,
             Codec codec, const CodecShape& shape = {})
      : pool_(pool),
        stream_(stream),
        stopped_(stopped),
        request_id_(request_id),
        codec_(codec),
        shape_(shape) {}
  // Only the frames of this stripe are sent.
  void set_stripe(const Stripe& stripe) { stripe_ = stripe; }
  // From now on, what is sent lets urgent transfers pass.
  void set_background() { background_.emplace(pool_.traffic()); }
  ~FrameBatch();
  FrameBatch(const FrameBatch&) = delete;
  FrameBatch& operator=(const FrameBatch&) = delete;

  struct Slice {
    uint32_t ordinal;
    uint32_t block;
    uint32_t layer_first;
    uint32_t layer_end;
    bool is_pinned = false;  // published, and held as it is: its checksums are made once
  };

  // Each sends what is full; the code is sticky.
  Code add_layers(const Slice& slice, const Name& name);
  // A whole block whose checksum is known (kShared).
  Code add_block(uint32_t ordinal, uint32_t block, const Name& name, uint32_t checksum);
  Code add_miss(uint32_t ordinal, const Name& name);
  Code add_end(Code reason, uint32_t count);
  Code flush();

  // The batch releases the pin once the block's frames have been sent.
  void own_pin(const Name& name) { pins_.push_back(name); }
  // From now on, pins are released with the batch: the peer reads the blocks until it acknowledges.
  void keep_pins() { keeps_pins_ = true; }
  bool keeps_pins() const { return keeps_pins_; }
  // From now on, payloads are sent from where they lie, if the system allows it; pins are kept.
  void send_in_place();
  // All that was sent in place has been taken.
  void note_acknowledged() { is_acknowledged_ = true; }

  uint64_t payload_bytes_sent() const { return payload_bytes_sent_; }

 private:
  static constexpr size_t kFrames = 64;
  static constexpr size_t kBatchBytes = 2 * kFramePayloadBytes;
  static constexpr size_t kSealedBytes = 128 << 10;  // encrypted and sent while in the L2 cache

  void add_part(const void* data, size_t size);
  // Encrypts the frame's payload, if it carries one, in pieces that are sent as they fill up, and
  // adds what is sent after the header.
  Code add_sealed(const Frame& header, const uint8_t* payload);

  // Makes the frame one of encoded layers; null: they cannot be, or it would not pay.
  const uint8_t* encode_layers(Frame& frame, const uint8_t* layers);
  uint32_t frame_checksum(const Frame& frame, const uint8_t* payload, bool is_pinned);
  // Seals the frame; makes room for it before if need be.
  Code add(Frame frame, const uint8_t* payload);

  BlockPool& pool_;
  const Stream& stream_;
  const Signal& stopped_;
  const uint64_t request_id_;
  const Codec codec_;
  const CodecShape shape_;
  Stripe stripe_;
  std::vector<uint8_t> encoded_;  // payloads of the frames gathered
  size_t encoded_used_ = 0;
  std::array<Frame, kFrames> frames_;
  std::array<Tag, kFrames + 1> tags_;  // one more: a frame may begin before a flush
  std::array<iovec, 3 * kFrames + 2> parts_;
  size_t num_frames_ = 0;
  size_t num_tags_ = 0;
  size_t num_parts_ = 0;
  size_t bytes_ = 0;
  uint64_t payload_bytes_sent_ = 0;
  Code code_ = Code::kOk;
  std::vector<Name> pins_;
  bool keeps_pins_ = false;
  bool is_acknowledged_ = false;
  Pipe pipe_;  // where payloads are sent in place
  std::optional<Traffic::Background> background_;
};

}  // namespace kvasir
