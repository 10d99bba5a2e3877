// How fast this machine reads memory now: the limit of decoding, measured beside it.
#pragma once

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

}  // namespace kvasir
