// What this machine can do now: the limits of decoding and prefill, measured beside them.
#pragma once

#include <string>

#include "arena.h"
#include "thread_pool.h"

namespace kvasir {

class MemoryProbe {
 public:
  MemoryProbe(size_t bytes, int num_threads);
  // Reads the buffer once with all threads; bytes per second.
  double read();

 private:
  Mapping mapping_;
  ThreadPool pool_;
  size_t sink_ = 0;  // the sum of what was read, so that reading is not left out
};

// Operations per second of a path's multiply-adds for weights of one format, with all threads.
class PeakProbe {
 public:
  PeakProbe(const std::string& path, const std::string& weights, int num_threads);
  double run();  // takes some milliseconds

 private:
  double (*exercise_)(int rounds);
  ThreadPool pool_;
};

}  // namespace kvasir
