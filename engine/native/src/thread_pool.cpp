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
int end_of(uint64_t ticket) { return static_cast<int>((ticket >> kItemBits) & kItemMask); }
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

ThreadPool::ThreadPool(int num_threads, std::function<void(int thread)> start) {
  if (num_threads < 1) throw std::invalid_argument("num_threads must be at least 1");
  tickets_ = std::make_unique<Ticket[]>(num_threads);
  for (int thread = 1; thread < num_threads; ++thread) {
    workers_.emplace_back([this, thread, start] {
      if (start) start(thread);
      work(thread);
    });
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
  num_items_ = num_items;
  const uint64_t epoch = epoch_of(tickets_[0].word.load(std::memory_order_relaxed)) + 1;
  for (int thread = 0; thread < num_threads(); ++thread) {
    const uint64_t first = int64_t{num_items} * thread / num_threads();
    const uint64_t end = int64_t{num_items} * (thread + 1) / num_threads();
    tickets_[thread].word.store((epoch << (2 * kItemBits)) | (end << kItemBits) | first,
                                std::memory_order_seq_cst);
  }
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
  for (int i = 0; i < num_threads(); ++i) claim_items_of((thread + i) % num_threads(), thread);
}

void ThreadPool::claim_items_of(int owner, int thread) {
  std::atomic<uint64_t>& word = tickets_[owner].word;
  while (true) {
    const uint64_t ticket = word.fetch_add(1, std::memory_order_acq_rel);
    if (item_of(ticket) >= end_of(ticket)) return;
    // This item is unfinished, so its job cannot end: what is read until it is done is its own.
    call_(context_, item_of(ticket), thread);
    const uint32_t num_items = num_items_;
    const uint32_t done = num_done_.fetch_add(1, std::memory_order_seq_cst) + 1;
    if (done == num_items && thread != 0 && is_caller_parked_.load()) futex_wake_all(&num_done_);
  }
}

void ThreadPool::wait_for_ticket(int thread, uint64_t seen) {
  const auto has_job = [&] {
    return epoch_of(tickets_[thread].word.load(std::memory_order_seq_cst)) != seen ||
           is_stopping_.load();
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
    wait_for_ticket(thread, seen);
    if (is_stopping_.load()) return;
    seen = epoch_of(tickets_[thread].word.load(std::memory_order_acquire));
    claim_items(thread);
  }
}

}  // namespace kvasir
