// Takes in the frames of one answer: verifies each and lets `ready` grow only then.
//
// Invariant: a byte lands only in a layer that is not yet final, and `ready` covers it only after
// its checksum agreed. A header that is wrong in any way ends the pull, since nothing after it can
// be trusted; a payload that is wrong costs its block.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "codec.h"
#include "crypto.h"
#include "pool.h"
#include "remote.h"
#include "shared_view.h"
#include "stream.h"
#include "stripe.h"
#include "wire.h"

namespace kvasir {

enum class Transport { kNone, kTcp, kEncrypted, kShared, kRemote };

// "" for kNone.
const char* transport_name(Transport transport);

struct PullResult {
  std::vector<bool> blocks_ok;
  uint64_t bytes_moved = 0;
  Code error = Code::kOk;
  uint64_t frames_bad = 0;
  Transport transport = Transport::kNone;  // that of the last attempt
  uint64_t bytes_wire = 0;                 // of verified payloads, as they were sent
  int64_t wire_ns = 0;                     // from their headers to their ends
  bool is_lossy = false;                   // some were encoded
};

class Receiver {
 public:
  // `names`: per block, or empty for the session `session`.
  Receiver(BlockPool& pool, const std::vector<uint32_t>& blocks, const std::vector<Name>& names,
           uint64_t session_id);

  // Reads frames until the end of the answer. kUnreachable before any frame arrived leaves
  // everything as it was, so that the caller may ask again.
  Code run(const Stream& stream, uint64_t request_id, Deadline deadline, const Signal* ended);

  // From now on, payloads may be encoded so.
  void accept(Codec codec, const CodecShape& shape);
  // From now on, frames may say where in this memory their payload lies; null: none may.
  void read_from(const SharedView* view, Transport transport);
  // From now on, frames say where in this pool their payload lies.
  void read_from(RemoteReader& reader, const RemotePool& pool);
  // Takes in one stripe of a pull; `landed` counts the verified layers of each block for all of
  // them, and a block becomes ready, all at once, with the last.
  void set_stripe(const Stripe& stripe, std::vector<std::atomic<uint32_t>>& landed);
  const Stripe& stripe() const { return stripe_; }
  // From now on, lets urgent transfers pass.
  void set_background() { background_.emplace(pool_.traffic()); }
  // Copies the named blocks that the memory lists with a checksum; returns how many it lists
  // without, which the owner has yet to make.
  size_t copy_listed(Deadline deadline, const Signal* ended);

  bool has_received() const { return has_received_; }
  // The source holds the blocks until we say that all is here.
  bool is_source_holding() const { return is_source_holding_; }
  // Some layers are final: a peer that sends all that was asked for would send them again.
  bool has_landed() const { return result_.bytes_moved > 0 || result_.frames_bad > 0; }
  bool all_whole() const;
  // Blocks that are not whole are set back to `ready` 0, unless it is one stripe's result.
  PullResult take_result(Code error);

 private:
  Code receive_header(Frame& frame);
  Code receive_tag(size_t received);
  // Of a frame without a payload: its tag must be right, where messages are sealed.
  Code open(const Frame& frame);
  Code receive_payload(const Frame& frame);
  void copy_payload(const Frame& frame);
  Code take_reference(const Frame& frame);
  // Reads from afar what the waiting frames stand for.
  Code read_waiting();
  uint32_t next_layer(size_t ordinal) const;
  // Whether the payload that has arrived becomes the layers it stands for.
  bool land(const Frame& frame, const uint8_t* payload);
  // False: listed, but without a checksum.
  bool copy_named(size_t ordinal);
  void take_layers(size_t ordinal, uint32_t count, bool is_right);
  bool is_expected(const Frame& frame) const;
  Code bad_frame();

  BlockPool& pool_;
  const SharedView* view_ = nullptr;
  RemoteReader* remote_ = nullptr;
  const RemotePool* remote_pool_ = nullptr;
  std::vector<Frame> waiting_;  // their payloads have yet to be read from afar
  size_t waiting_bytes_ = 0;
  Codec codec_ = Codec::kRaw;
  CodecShape shape_;
  std::vector<uint8_t> encoded_;  // the payload of a frame, until it is verified
  const std::vector<uint32_t>& blocks_;
  const std::vector<Name>& names_;
  const Name session_;
  const Stream* stream_ = nullptr;
  uint64_t request_id_ = 0;
  Deadline deadline_ = Deadline::in(0);
  const Signal* ended_ = nullptr;

  std::vector<uint32_t> layers_;  // per block: all of ours before this one are verified
  std::vector<bool> spoilt_;      // a payload of the block was wrong
  struct Ahead {
    Tag tag;  // of the last frame, where messages are sealed
    Frame frame;
  };
  Ahead ahead_{};  // read together with the last payload
  size_t next_bytes_ = 0;
  bool has_received_ = false;
  bool is_source_holding_ = false;
  Stripe stripe_;
  std::vector<std::atomic<uint32_t>>* landed_ = nullptr;
  std::optional<Traffic::Background> background_;
  PullResult result_;
};

}  // namespace kvasir
