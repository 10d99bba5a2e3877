// Next tokens from logits: greedy, temperature, top-k, top-p; a function of its arguments alone.
#pragma once

#include <cstdint>

namespace kvasir {

struct SampleOptions {
  float temperature;  // 0: greedy, lowest id on ties
  int32_t top_k;      // 0: off
  float top_p;        // 1: off
  uint64_t seed;
  int64_t position;  // of the token that is drawn
};

// Throws std::invalid_argument for options out of range and for NaN or infinite logits.
int32_t sample_row(const float* logits, int vocab_size, const SampleOptions& options);

// Uniform in [0, 1), 53 bits: Philox4x32-10 (Salmon et al., SC 2011) at counter `position` under
// key `seed`. Any position can be drawn without the ones before it.
double philox_uniform(uint64_t seed, uint64_t position);

}  // namespace kvasir
