// Forks and joins of every size, pools that end while helpers sleep or spin: to be run under
// ThreadSanitizer, which reports races, and fails by itself when an item is lost or done twice.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "thread_pool.h"

namespace {

constexpr int kForks = 400;
constexpr int kItemsMax = 70;
constexpr int kPauseEvery = 40;                        // forks
constexpr auto kPause = std::chrono::milliseconds(1);  // long enough that helpers go to sleep

// Plain memory written by whoever runs an item and read after the join: a race unless run() orders
// them.
void fork_and_join(int num_threads, std::mt19937* random) {
  kvasir::ThreadPool pool(num_threads);
  std::vector<int> items(kItemsMax);
  std::vector<int> by_thread(num_threads);
  int expected = 0;
  for (int fork = 0; fork < kForks; ++fork) {
    const int num_items = static_cast<int>((*random)() % kItemsMax);
    pool.run(num_items, [&](int item, int thread) {
      items[item] += fork;
      ++by_thread[thread];
    });
    for (int item = 0; item < num_items; ++item) {
      if (items[item] != fork) {
        std::fprintf(stderr, "item %d of fork %d was not run once\n", item, fork);
        std::exit(1);
      }
    }
    std::fill(items.begin(), items.end(), 0);
    expected += num_items;
    if (fork % kPauseEvery == 0) std::this_thread::sleep_for(kPause);
  }
  int total = 0;
  for (const int count : by_thread) total += count;
  if (total != expected) {
    std::fprintf(stderr, "%d items run of %d\n", total, expected);
    std::exit(1);
  }
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (const int num_threads : {1, 2, 3, 5, 8}) fork_and_join(num_threads, &random);
  for (int i = 0; i < kForks; ++i) {  // ended at once, or after one fork
    kvasir::ThreadPool pool(4);
    if (i % 2 == 0) pool.run(i % kItemsMax, [](int, int) {});
  }
  std::puts("thread pool: no race seen");
}
