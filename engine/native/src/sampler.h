// Next tokens from logits: greedy, temperature, top-k, top-p; a function of its arguments alone.
#pragma once

#include <cstdint>
#include <functional>

namespace kvasir {

struct SampleOptions {
  float temperature;  // 0: greedy, lowest id on ties
  int32_t top_k;      // 0: off
  float top_p;        // 1: off
  uint64_t seed;
  int64_t position;  // of the token that is drawn
};

// Rows of logits, and options for each.
struct SampleBatch {
  const float* logits;  // [num_rows][vocab_size]
  int num_rows;
  int vocab_size;
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const uint64_t* seed;
  const int64_t* position;
};

// Calls body(row) for every row, in any order and thread.
using RunRows = std::function<void(int count, const std::function<void(int)>& body)>;

// A token for each row. Throws std::invalid_argument for options out of range and for NaN or
// infinite logits; the message names the first such row.
void sample(const SampleBatch& batch, const RunRows& run, int32_t* ids);

// Uniform in [0, 1), 53 bits: Philox4x32-10 (Salmon et al., SC 2011) at counter `position` under
// key `seed`. Any position can be drawn without the ones before it.
double philox_uniform(uint64_t seed, uint64_t position);

}  // namespace kvasir
