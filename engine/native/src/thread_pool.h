// Fork-join over numbered items. Each thread begins with a range of its own, which it walks in
// rising order, so that it may fetch ahead what the next item reads; who is done claims what others
// left.
//
// The caller takes part and waits only for items that were claimed, never for a thread that has not
// woken: where several processes share few cores, a parked or preempted helper costs nothing.
// Which thread runs an item must not matter to its result.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace kvasir {

class ThreadPool {
 public:
  // num_threads counts the caller: 1 starts no thread. Each helper begins with start(thread),
  // if there is one.
  explicit ThreadPool(int num_threads, std::function<void(int thread)> start = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(item, thread) for every item in [0, num_items); one caller at a time. Bodies do not
  // throw.
  template <class Body>
  void run(int num_items, const Body& body) {
    const auto call = [](const void* context, int item, int thread) {
      (*static_cast<const Body*>(context))(item, thread);
    };
    run_erased(num_items, call, &body);
  }

 private:
  using Call = void (*)(const void* context, int item, int thread);

  void run_erased(int num_items, Call call, const void* context);
  void work(int thread);
  void claim_items(int thread);
  void claim_items_of(int owner, int thread);
  void wait_for_ticket(int thread, uint64_t seen);

  // Of one thread's range: epoch (24 bits) | end (20) | next item (20). One fetch_add claims an
  // item together with the job it belongs to, so a late thread never mixes two jobs.
  struct alignas(64) Ticket {
    std::atomic<uint64_t> word{0};
  };
  std::unique_ptr<Ticket[]> tickets_;
  Call call_ = nullptr;
  const void* context_ = nullptr;
  uint32_t num_items_ = 0;
  alignas(64) std::atomic<uint32_t> num_done_{0};
  alignas(64) std::atomic<uint32_t> wake_word_{0};
  std::atomic<uint32_t> num_parked_{0};
  std::atomic<bool> is_caller_parked_{false};
  std::atomic<bool> is_stopping_{false};
  std::vector<std::thread> workers_;
};

}  // namespace kvasir
