// Fork-join over numbered items, claimed one by one from a shared counter.
//
// The caller takes part and waits only for items that were claimed, never for a thread that has not
// woken: where several processes share few cores, a parked or preempted helper costs nothing.
// Which thread runs an item must not matter to its result.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace kvasir {

class ThreadPool {
 public:
  // num_threads counts the caller: 1 starts no thread.
  explicit ThreadPool(int num_threads);
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
  void wait_for_ticket(uint64_t seen);

  // epoch (24 bits) | number of items (20) | next item (20): one fetch_add claims an item together
  // with the job it belongs to, so a late thread never mixes two jobs.
  std::atomic<uint64_t> ticket_{0};
  Call call_ = nullptr;
  const void* context_ = nullptr;
  alignas(64) std::atomic<uint32_t> num_done_{0};
  alignas(64) std::atomic<uint32_t> wake_word_{0};
  std::atomic<uint32_t> num_parked_{0};
  std::atomic<bool> is_caller_parked_{false};
  std::atomic<bool> is_stopping_{false};
  std::vector<std::thread> workers_;
};

}  // namespace kvasir
