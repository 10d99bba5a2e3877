#include "probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "kernels.h"

namespace kvasir {

namespace {
constexpr size_t kItemBytes = size_t{1} << 20;
constexpr int kRounds = 20'000;
constexpr int kItemsPerThread = 16;
constexpr int kPeakRuns = 5;
}  // namespace

MemoryProbe::MemoryProbe(size_t bytes, int num_threads)
    : mapping_(round_up(bytes, kItemBytes)), pool_(num_threads) {
  std::memset(mapping_.data(), 1, mapping_.bytes());
}

double MemoryProbe::read() {
  const int num_items = static_cast<int>(mapping_.bytes() / kItemBytes);
  std::atomic<size_t> total{0};
  const auto start = std::chrono::steady_clock::now();
  pool_.run(num_items, [&](int item, int) {
    const size_t* words =
        static_cast<const size_t*>(mapping_.data()) + item * (kItemBytes / sizeof(size_t));
    size_t sums[8] = {};
    for (size_t i = 0; i < kItemBytes / sizeof(size_t); i += 8) {
      for (int j = 0; j < 8; ++j) sums[j] += words[i + j];
    }
    for (const size_t sum : sums) total += sum;
  });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  sink_ += total;
  return static_cast<double>(mapping_.bytes()) / seconds.count();
}

PeakProbe::PeakProbe(const std::string& path, const std::string& weights, int num_threads)
    : exercise_(kernels_of(path).gemm[static_cast<int>(weight_format_of(weights))].exercise),
      pool_(num_threads) {}

// A helper that has just woken may share the caller's processor for a while: the best of a few
// runs.
double PeakProbe::run() {
  double best = 0;
  for (int run = 0; run < kPeakRuns; ++run) {
    std::atomic<double> total{0};
    const auto start = std::chrono::steady_clock::now();
    pool_.run(pool_.num_threads() * kItemsPerThread,
              [&](int, int) { total += exercise_(kRounds); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, total / seconds.count());
  }
  return best;
}

}  // namespace kvasir
