// Takes in the frames of one answer: verifies each and lets `ready` grow only then.
//
// Invariant: a byte lands only in a layer that is not yet final, and `ready` covers it only after
// its checksum agreed. A header that is wrong in any way ends the pull, since nothing after it can
// be trusted; a payload that is wrong costs its block.
#pragma once

#include <cstdint>
#include <vector>

#include "pool.h"
#include "stream.h"
#include "wire.h"

namespace kvasir {

struct PullResult {
  std::vector<bool> blocks_ok;
  uint64_t bytes_moved = 0;
  Code error = Code::kOk;
  uint64_t frames_bad = 0;
};

class Receiver {
 public:
  // `names`: per block, or empty for the session `session`.
  Receiver(BlockPool& pool, const std::vector<uint32_t>& blocks, const std::vector<Name>& names,
           uint64_t session_id);

  // Reads frames until the end of the answer. kUnreachable before any frame arrived leaves
  // everything as it was, so that the caller may ask again.
  Code run(const Stream& stream, uint64_t request_id, Deadline deadline, const Signal* ended);

  bool has_received() const { return has_received_; }
  bool all_whole() const;
  // Blocks that are not whole are set back to `ready` 0.
  PullResult take_result(Code error);

 private:
  Code receive_header(Frame& frame);
  Code receive_payload(const Frame& frame);
  bool is_expected(const Frame& frame) const;
  Code bad_frame();

  BlockPool& pool_;
  const std::vector<uint32_t>& blocks_;
  const std::vector<Name>& names_;
  const Name session_;
  const Stream* stream_ = nullptr;
  uint64_t request_id_ = 0;
  Deadline deadline_ = Deadline::in(0);
  const Signal* ended_ = nullptr;

  std::vector<uint32_t> layers_;  // verified, per block
  std::vector<bool> spoilt_;      // a payload of the block was wrong
  Frame next_{};                  // header read ahead together with the last payload
  size_t next_bytes_ = 0;
  bool has_received_ = false;
  PullResult result_;
};

}  // namespace kvasir
