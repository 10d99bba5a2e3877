#include "thread_pool.h"

#include <chrono>
#include <stdexcept>

#include "futex.h"

namespace kvasir {

namespace {

constexpr int kItemBits = 20;
constexpr uint64_t kItemMask = (uint64_t{1} << kItemBits) - 1;
constexpr int kItemsMax = static_cast<int>(kItemMask) / 2;  // room for late claims
constexpr auto kSpin = std::chrono::microseconds(50);
constexpr int kPollsPerClockRead = 64;

uint64_t epoch_of(uint64_t ticket) { return ticket >> (2 * kItemBits); }
int num_items_of(uint64_t ticket) { return static_cast<int>((ticket >> kItemBits) & kItemMask); }
int item_of(uint64_t ticket) { return static_cast<int>(ticket & kItemMask); }

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Polls for kSpin; true as soon as the condition holds.
template <class Condition>
bool spin_until(const Condition& condition) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < kPollsPerClockRead; ++i) {
      if (condition()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return condition();
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
  if (num_threads < 1) throw std::invalid_argument("num_threads must be at least 1");
  for (int thread = 1; thread < num_threads; ++thread) {
    workers_.emplace_back([this, thread] { work(thread); });
  }
}

ThreadPool::~ThreadPool() {
  is_stopping_.store(true);
  wake_word_.fetch_add(1);
  futex_wake_all(&wake_word_);
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run_erased(int num_items, Call call, const void* context) {
  if (num_items > kItemsMax) throw std::invalid_argument("too many items for one fork");
  if (num_items <= 1 || workers_.empty()) {
    for (int item = 0; item < num_items; ++item) call(context, item, 0);
    return;
  }
  // 1. Publish the job; claims of the previous one are all done, so nobody reads these fields.
  call_ = call;
  context_ = context;
  num_done_.store(0, std::memory_order_relaxed);
  const uint64_t epoch = epoch_of(ticket_.load(std::memory_order_relaxed)) + 1;
  const uint64_t fresh =
      (epoch << (2 * kItemBits)) | (static_cast<uint64_t>(num_items) << kItemBits);
  ticket_.store(fresh, std::memory_order_seq_cst);
  // 2. Wake helpers that sleep.
  if (num_parked_.load(std::memory_order_seq_cst) > 0) {
    wake_word_.fetch_add(1);
    futex_wake_all(&wake_word_);
  }
  // 3. Take part, then wait for items that others claimed.
  claim_items(0);
  const auto is_done = [&] {
    return num_done_.load(std::memory_order_acquire) == static_cast<uint32_t>(num_items);
  };
  if (spin_until(is_done)) return;
  is_caller_parked_.store(true);
  for (uint32_t done = num_done_.load(); done != static_cast<uint32_t>(num_items);
       done = num_done_.load()) {
    futex_wait(&num_done_, done);
  }
  is_caller_parked_.store(false);
}

void ThreadPool::claim_items(int thread) {
  while (true) {
    const uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
    const int num_items = num_items_of(ticket);
    if (item_of(ticket) >= num_items) return;
    // This item is unfinished, so its job cannot end before the call returns: call_ is its own.
    call_(context_, item_of(ticket), thread);
    const uint32_t done = num_done_.fetch_add(1, std::memory_order_seq_cst) + 1;
    if (done == static_cast<uint32_t>(num_items) && thread != 0 && is_caller_parked_.load()) {
      futex_wake_all(&num_done_);
    }
  }
}

void ThreadPool::wait_for_ticket(uint64_t seen) {
  const auto has_job = [&] {
    return epoch_of(ticket_.load(std::memory_order_seq_cst)) != seen || is_stopping_.load();
  };
  if (spin_until(has_job)) return;
  num_parked_.fetch_add(1, std::memory_order_seq_cst);
  for (uint32_t word = wake_word_.load(); !has_job(); word = wake_word_.load()) {
    futex_wait(&wake_word_, word);
  }
  num_parked_.fetch_sub(1);
}

void ThreadPool::work(int thread) {
  uint64_t seen = 0;
  while (true) {
    wait_for_ticket(seen);
    if (is_stopping_.load()) return;
    seen = epoch_of(ticket_.load(std::memory_order_acquire));
    claim_items(thread);
  }
}

}  // namespace kvasir
