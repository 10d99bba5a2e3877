#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace kvasir {

namespace {

constexpr int kFirstCandidates = 256;
constexpr int kCandidateGrowth = 8;

void check(const SampleOptions& o) {
  if (!(o.temperature >= 0) || std::isinf(o.temperature)) {
    throw std::invalid_argument("temperature must be finite and not negative");
  }
  if (!(o.top_p > 0 && o.top_p <= 1)) throw std::invalid_argument("top_p must be in (0, 1]");
  if (o.top_k < 0) throw std::invalid_argument("top_k must not be negative");
  if (o.position < 0) throw std::invalid_argument("position must not be negative");
}

// Id of the largest logit, the lowest on ties. -inf marks forbidden tokens and is fine.
int argmax(const float* logits, int vocab_size) {
  float best = -std::numeric_limits<float>::infinity();
  int best_id = -1;
  bool has_nan = false;
  for (int id = 0; id < vocab_size; ++id) {
    has_nan |= std::isnan(logits[id]);
    if (logits[id] > best) {
      best = logits[id];
      best_id = id;
    }
  }
  if (has_nan) throw std::invalid_argument("logits hold NaN");
  if (best_id < 0 || std::isinf(best)) throw std::invalid_argument("no finite largest logit");
  return best_id;
}

// Draws from all tokens, in the order of their ids.
int draw_from_all(const std::vector<double>& weights, double uniform) {
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  const double target = uniform * total;
  double sum = 0;
  int last = 0;
  for (int id = 0; id < static_cast<int>(weights.size()); ++id) {
    if (weights[id] == 0) continue;
    last = id;
    sum += weights[id];
    if (sum > target) break;
  }
  return last;
}

// Puts the `count` strongest ids in front, strongest first, lowest id first on ties.
void sort_front(std::vector<int>* ids, const float* logits, int count) {
  const auto is_stronger = [logits](int a, int b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  if (count < static_cast<int>(ids->size())) {
    std::nth_element(ids->begin(), ids->begin() + count, ids->end(), is_stronger);
  }
  std::sort(ids->begin(), ids->begin() + count, is_stronger);
}

// Draws from the shortest run of strongest tokens whose share reaches top_p, of the top_k
// strongest.
int draw_from_front(const float* logits, const std::vector<double>& weights, const SampleOptions& o,
                    double uniform) {
  const int vocab_size = static_cast<int>(weights.size());
  const bool has_top_k = o.top_k > 0 && o.top_k < vocab_size;
  const int most = has_top_k ? o.top_k : vocab_size;
  std::vector<int> ids(vocab_size);
  std::iota(ids.begin(), ids.end(), 0);

  double total = 0;
  int count = has_top_k ? most : std::min(most, kFirstCandidates);
  sort_front(&ids, logits, count);
  if (has_top_k) {
    for (int i = 0; i < count; ++i) total += weights[ids[i]];
  } else {
    total = std::accumulate(weights.begin(), weights.end(), 0.0);
  }
  double sum = 0;
  int kept = 0;
  while (kept < most && (kept == 0 || sum < o.top_p * total)) {
    if (kept == count) {
      count = std::min(most, count * kCandidateGrowth);
      sort_front(&ids, logits, count);
    }
    sum += weights[ids[kept++]];
  }
  const double target = uniform * sum;
  sum = 0;
  for (int i = 0; i < kept; ++i) {
    sum += weights[ids[i]];
    if (sum > target) return ids[i];
  }
  return ids[kept - 1];
}

}  // namespace

double philox_uniform(uint64_t seed, uint64_t position) {
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
        static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    std::copy(next, next + 4, c);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  const uint64_t bits = (static_cast<uint64_t>(c[1]) << 32) | c[0];
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

int32_t sample_row(const float* logits, int vocab_size, const SampleOptions& options) {
  check(options);
  const int best = argmax(logits, vocab_size);
  if (options.temperature == 0) return best;
  std::vector<double> weights(vocab_size);
  for (int id = 0; id < vocab_size; ++id) {
    weights[id] = std::exp((static_cast<double>(logits[id]) - logits[best]) / options.temperature);
  }
  const double uniform = philox_uniform(options.seed, static_cast<uint64_t>(options.position));
  const bool takes_all = options.top_p == 1 && (options.top_k == 0 || options.top_k >= vocab_size);
  return takes_all ? draw_from_all(weights, uniform)
                   : draw_from_front(logits, weights, options, uniform);
}

}  // namespace kvasir
