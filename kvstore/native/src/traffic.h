// Lets transfers that a request waits for pass those in the background, in one process.
//
// Strict, with a bound: a background transfer waits before each piece for as long as any other
// moves bytes, but never longer than kYieldMs, so it comes to an end too.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace kvasir {

class Traffic {
 public:
  static constexpr size_t kPieceBytes = 256 << 10;
  static constexpr auto kYieldMs = std::chrono::milliseconds(10);

  // Background transfers wait while one of these lives.
  class Urgent {
   public:
    explicit Urgent(Traffic& traffic) : traffic_(traffic) {
      const std::lock_guard lock(traffic_.mutex_);
      ++traffic_.num_urgent_;
    }
    ~Urgent() {
      const std::lock_guard lock(traffic_.mutex_);
      if (--traffic_.num_urgent_ == 0) traffic_.idle_.notify_all();
    }
    Urgent(const Urgent&) = delete;
    Urgent& operator=(const Urgent&) = delete;

   private:
    Traffic& traffic_;
  };

  // One background transfer.
  class Background {
   public:
    explicit Background(Traffic& traffic) : traffic_(traffic) {}
    // Before it moves so many bytes.
    void before(size_t bytes) {
      due_bytes_ += bytes;
      if (due_bytes_ < kPieceBytes) return;
      due_bytes_ = 0;
      traffic_.yield();
    }

   private:
    Traffic& traffic_;
    size_t due_bytes_ = kPieceBytes;  // the first piece waits too
  };

  uint64_t num_yields() const {
    const std::lock_guard lock(mutex_);
    return num_yields_;
  }

 private:
  void yield() {
    std::unique_lock lock(mutex_);
    if (num_urgent_ == 0) return;
    ++num_yields_;
    idle_.wait_for(lock, kYieldMs, [this] { return num_urgent_ == 0; });
  }

  mutable std::mutex mutex_;
  std::condition_variable idle_;
  uint32_t num_urgent_ = 0;
  uint64_t num_yields_ = 0;
};

}  // namespace kvasir
