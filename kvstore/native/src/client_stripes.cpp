// A pull over several connections at once.
#include <algorithm>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "client.h"
#include "stripe.h"

namespace kvasir {
namespace {

constexpr size_t kStripeBytes = 2 << 20;  // so much of a pull is worth a connection of its own

// What the stripes of a pull brought together. A block is whole if it is for each of them.
PullResult join_stripes(std::vector<PullResult>& stripes, Code failure) {
  PullResult joined = std::move(stripes[0]);
  for (size_t k = 1; k < stripes.size(); ++k) {
    const PullResult& one = stripes[k];
    for (size_t i = 0; i < joined.blocks_ok.size(); ++i) {
      joined.blocks_ok[i] = joined.blocks_ok[i] && one.blocks_ok[i];
    }
    joined.bytes_moved += one.bytes_moved;
    joined.frames_bad += one.frames_bad;
    joined.bytes_wire += one.bytes_wire;
    joined.wire_ns = std::max(joined.wire_ns, one.wire_ns);
    joined.is_lossy = joined.is_lossy || one.is_lossy;
  }
  joined.error = joined.frames_bad > 0 ? Code::kBadFrame : failure;
  return joined;
}

}  // namespace

// Over so many connections at most.
uint32_t BlockClient::num_stripes(const Pull& pull) const {
  if (pull.is_session() || options_.remote) return 1;
  const size_t num_blocks = pull.blocks.size();
  const size_t by_size = num_blocks * pool_.shape().block_bytes() / kStripeBytes;
  const size_t num_frames = num_blocks * frames_per_block(pool_.shape());
  return static_cast<uint32_t>(std::clamp<size_t>(std::min(by_size, num_frames), 1, kStripesMax));
}

// Each connection carries a part of every block, on a thread of its own. Where one fails, no more
// blocks would become whole, so all end; those that are whole stay.
PullResult BlockClient::pull_striped(const Pull& pull, std::vector<Link> links, Deadline deadline,
                                     Signal& ended) {
  const auto count = static_cast<uint32_t>(links.size());
  std::vector<std::atomic<uint32_t>> landed(pull.blocks.size());
  std::vector<PullResult> results(count);
  std::mutex mutex;
  Code failure = Code::kOk;
  std::exception_ptr fault;
  const auto take_stripe = [&](uint32_t index) {
    Code code = Code::kAborted;
    std::exception_ptr caught;
    try {
      Receiver receiver = make_receiver(pull);
      receiver.set_stripe({.index = index, .count = count}, landed);
      code = attempt(pull, std::move(links[index]), receiver, deadline, &ended);
      results[index] = receiver.take_result(code);
    } catch (...) {
      caught = std::current_exception();
    }
    if (code == Code::kOk) return;
    const std::lock_guard lock(mutex);
    if (failure == Code::kOk) failure = code;
    if (caught) fault = caught;
    ended.raise();
  };
  std::vector<std::thread> threads;
  threads.reserve(count);
  for (uint32_t index = 1; index < count; ++index) {
    try {
      threads.emplace_back(take_stripe, index);
    } catch (const std::system_error&) {  // the process may have no more threads
      take_stripe(index);
    }
  }
  take_stripe(0);
  for (std::thread& thread : threads) thread.join();
  if (fault) std::rethrow_exception(fault);
  PullResult result = join_stripes(results, failure);
  for (size_t i = 0; i < pull.blocks.size(); ++i) {
    if (!result.blocks_ok[i]) pool_.raise_ready(pull.blocks[i], 0);
  }
  return result;
}

}  // namespace kvasir
