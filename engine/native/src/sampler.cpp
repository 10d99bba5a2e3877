#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

// Compiled for wider vectors as well and chosen at run time. Every operation is on one element or
// in a written order, and contraction is off: all of them give the same bits.
#ifdef KVASIR_X86
#define KVASIR_WIDER [[gnu::target_clones("avx512f", "avx2", "default")]]
#else
#define KVASIR_WIDER
#endif

namespace kvasir {

namespace {

constexpr int kCandidates = 256;  // that are sorted where no top_k says how many
constexpr int kRungs = 4096;
constexpr int kBlock = 64;  // tokens that are looked at together
constexpr int kLanes = 8;
constexpr double kSurely = 0.99;  // of a bound: rounding cannot matter
constexpr float kForbidden = -std::numeric_limits<float>::infinity();
constexpr float kExponentMin = -87.0f;  // exp of less counts as zero

void check(const SampleOptions& o) {
  if (!(o.temperature >= 0) || std::isinf(o.temperature)) {
    throw std::invalid_argument("temperature must be finite and not negative");
  }
  if (!(o.top_p > 0 && o.top_p <= 1)) throw std::invalid_argument("top_p must be in (0, 1]");
  if (o.top_k < 0) throw std::invalid_argument("top_k must not be negative");
  if (o.position < 0) throw std::invalid_argument("position must not be negative");
}

// Logits of a row, a block at a time; the last is filled up with forbidden ones.
struct Row {
  const float* logits;
  int size;
  int num_blocks;
  float last[kBlock];

  Row(const float* row, int vocab_size)
      : logits(row), size(vocab_size), num_blocks((vocab_size + kBlock - 1) / kBlock) {
    std::fill_n(last, kBlock, kForbidden);
    const int first = (num_blocks - 1) * kBlock;
    std::copy(logits + first, logits + size, last);
  }
  const float* block(int index) const {
    return index == num_blocks - 1 ? last : logits + static_cast<size_t>(index) * kBlock;
  }
};

using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Ints = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));
// Twice as wide, for work on each element alone.
using WideFloats = float __attribute__((vector_size(2 * kLanes * sizeof(float))));
using WideInts = int32_t __attribute__((vector_size(2 * kLanes * sizeof(int32_t))));

template <class Vector = Floats>
inline __attribute__((always_inline)) Vector load(const float* p) {
  Vector value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

// Joins lanes pairwise, always by the same tree.
template <class Join>
inline __attribute__((always_inline)) float fold(Floats value, const Join& join) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &value, sizeof lanes);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] = join(lanes[j], lanes[j + width]);
  }
  return lanes[0];
}

// The largest of each block's logits; true if there is a NaN.
KVASIR_WIDER bool find_maxima(const Row& row, float* maxima) {
  Ints nans = {};
  for (int index = 0; index < row.num_blocks; ++index) {
    const float* logits = row.block(index);
    Floats most = load(logits);
    nans |= most != most;
    for (int i = kLanes; i < kBlock; i += kLanes) {
      const Floats value = load(logits + i);
      nans |= value != value;
      most = value > most ? value : most;
    }
    maxima[index] = fold(most, [](float x, float y) { return y > x ? y : x; });
  }
  for (int j = 0; j < kLanes; ++j) {
    if (nans[j] != 0) return true;
  }
  return false;
}

// Id of the largest logit, the lowest on ties. -inf marks forbidden tokens and is fine.
int find_best(const Row& row, const std::vector<float>& maxima) {
  const auto best = std::max_element(maxima.begin(), maxima.end());
  if (std::isinf(*best)) throw std::invalid_argument("no finite largest logit");
  const int index = static_cast<int>(best - maxima.begin());
  const float* logits = row.block(index);
  return index * kBlock + static_cast<int>(std::find(logits, logits + kBlock, *best) - logits);
}

// exp(x) for x <= 0, within 2 ulp. Cephes' polynomial.
inline __attribute__((always_inline)) WideFloats exponential(WideFloats x) {
  const WideFloats low = x < kExponentMin ? WideFloats{} + kExponentMin : x;
  const float rounder = 12582912.0f;  // 1.5 * 2^23
  const WideFloats n = (low * 1.44269504088896341f + rounder) - rounder;
  const WideFloats r = (low - n * 0.693359375f) + n * 2.12194440e-4f;
  WideFloats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const WideInts bits = (__builtin_convertvector(n, WideInts) + 127) << 23;
  WideFloats power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return x < kExponentMin ? WideFloats{} : p * power;
}

// Tokens' shares before they are scaled to sum to 1.
inline __attribute__((always_inline)) WideFloats weights_of(WideFloats logits, float largest,
                                                            float temperature) {
  const WideFloats below = logits - largest;
  return exponential(temperature == 1 ? below : below / temperature);
}
float weight_of(float logit, float largest, float temperature) {
  return weights_of(WideFloats{} + logit, largest, temperature)[0];
}

// The sum of a block's weights; `use` is given each vector of logits and of weights.
template <class Use>
inline __attribute__((always_inline)) float sum_block(const float* block, float largest,
                                                      float temperature, const Use& use) {
  Floats sum = {};
  for (int i = 0; i < kBlock; i += 2 * kLanes) {
    const WideFloats logits = load<WideFloats>(block + i);
    const WideFloats weights = weights_of(logits, largest, temperature);
    sum += __builtin_shufflevector(weights, weights, 0, 1, 2, 3, 4, 5, 6, 7);
    sum += __builtin_shufflevector(weights, weights, 8, 9, 10, 11, 12, 13, 14, 15);
    use(i, logits, weights);
  }
  return fold(sum, [](float x, float y) { return x + y; });
}

// The sum of each block's weights.
KVASIR_WIDER void find_sums(const Row& row, float largest, float temperature, float* sums) {
  for (int index = 0; index < row.num_blocks; ++index) {
    sums[index] = sum_block(row.block(index), largest, temperature,
                            [](int, const WideFloats&, const WideFloats&) {});
  }
}

// Weights in the place of logits; there are whole vectors of them.
KVASIR_WIDER void weigh(float* values, size_t count, float largest, float temperature) {
  for (size_t i = 0; i < count; i += 2 * kLanes) {
    const WideFloats weights = weights_of(load<WideFloats>(values + i), largest, temperature);
    __builtin_memcpy(values + i, &weights, sizeof weights);
  }
}

double total_of(const std::vector<float>& sums) {
  double total = 0;
  for (const float sum : sums) total += sum;
  return total;
}

// Draws from all tokens, in the order of their ids.
int draw_from_all(const Row& row, float largest, float temperature, double uniform) {
  std::vector<float> sums(row.num_blocks);
  find_sums(row, largest, temperature, sums.data());
  const double target = uniform * total_of(sums);
  double sum = 0;
  int chosen = 0;  // of the blocks: the first whose end lies behind the target
  for (int index = 0; index < row.num_blocks && sum <= target; ++index) {
    if (sums[index] == 0) continue;
    chosen = index;
    sum += sums[index];
  }
  sum -= sums[chosen];
  int last = 0;
  for (int i = 0; i < kBlock; ++i) {
    const float weight = weight_of(row.block(chosen)[i], largest, temperature);
    if (weight == 0) continue;
    last = chosen * kBlock + i;
    sum += weight;
    if (sum > target) break;
  }
  return last;
}

// Strongest first, lowest id first on ties.
struct Stronger {
  const float* logits;

  bool operator()(int a, int b) const {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  }
};

// The `count` strongest ids, strongest first, lowest id first on ties. That many blocks have a
// token as strong as the weakest of their maxima: weaker tokens are not looked at.
std::vector<int> strongest(const Row& row, std::vector<float> maxima, int count) {
  float bound = kForbidden;
  const std::vector<float> unsorted = maxima;
  if (count <= row.num_blocks) {
    std::nth_element(maxima.begin(), maxima.begin() + count - 1, maxima.end(), std::greater<>());
    bound = maxima[count - 1];
  }
  std::vector<int> ids;
  for (int index = 0; index < row.num_blocks; ++index) {
    if (unsorted[index] < bound) continue;
    const int first = index * kBlock, end = std::min(first + kBlock, row.size);
    for (int id = first; id < end; ++id) {
      if (row.logits[id] >= bound) ids.push_back(id);
    }
  }
  const Stronger is_stronger{row.logits};
  if (count < static_cast<int>(ids.size())) {
    std::nth_element(ids.begin(), ids.begin() + count, ids.end(), is_stronger);
    ids.resize(count);
  }
  std::sort(ids.begin(), ids.end(), is_stronger);
  return ids;
}

// Tokens in classes of about equal strength, the strongest first: what lies in one class is told
// from the logit alone, and no token is weaker than one of a later class.
struct Rungs {
  float largest;
  float per_unit;

  Rungs(float most, float least, float temperature) : largest(most) {
    const float range = std::min(most - least, -kExponentMin * temperature);
    per_unit = range > 0 ? kRungs / range : 0;
  }
  template <class Vector>
  inline __attribute__((always_inline)) Vector of(Vector logits) const {
    const Vector place = (largest - logits) * per_unit;
    return place < kRungs - 1.0f ? place : Vector{} + (kRungs - 1.0f);
  }
};

// The smallest logit that is not forbidden.
KVASIR_WIDER float find_least(const Row& row, float most) {
  WideFloats least = WideFloats{} + most;
  for (int index = 0; index < row.num_blocks; ++index) {
    for (int i = 0; i < kBlock; i += 2 * kLanes) {
      const WideFloats value = load<WideFloats>(row.block(index) + i);
      const WideFloats allowed = value > kForbidden ? value : least;
      least = allowed < least ? allowed : least;
    }
  }
  for (int j = 0; j < 2 * kLanes; ++j) most = std::min(most, least[j]);
  return most;
}

// The sum of the weights of each class, and of each block.
KVASIR_WIDER void add_rungs(const Row& row, const Rungs& rungs, float temperature, double* sums,
                            float* block_sums) {
  for (int index = 0; index < row.num_blocks; ++index) {
    int32_t places[kBlock];
    float weights[kBlock];
    const auto keep = [&](int i, const WideFloats& logits, const WideFloats& values) {
      const WideInts found = __builtin_convertvector(rungs.of(logits), WideInts);
      __builtin_memcpy(places + i, &found, sizeof found);
      __builtin_memcpy(weights + i, &values, sizeof values);
    };
    block_sums[index] = sum_block(row.block(index), rungs.largest, temperature, keep);
    for (int i = 0; i < kBlock; ++i) sums[places[i]] += weights[i];
  }
}

// Whether one of a block's tokens is in the class. By the sign of numbers that are -1 for such a
// token and not negative for others: compilers take comparisons apart, lane by lane.
inline __attribute__((always_inline)) bool touches(const float* block, const Rungs& rungs,
                                                   int rung) {
  WideInts found = {};
  for (int i = 0; i < kBlock; i += 2 * kLanes) {
    const WideFloats places = rungs.of(load<WideFloats>(block + i));
    found |= (__builtin_convertvector(places, WideInts) ^ rung) - 1;
  }
  int32_t lanes[2 * kLanes], any = 0;
  __builtin_memcpy(lanes, &found, sizeof lanes);
  for (const int32_t lane : lanes) any |= lane;
  return any < 0;
}

// Which blocks have tokens of the class; their number.
KVASIR_WIDER int find_blocks(const Row& row, const Rungs& rungs, int rung, int* blocks) {
  int count = 0;
  for (int index = 0; index < row.num_blocks; ++index) {
    blocks[count] = index;
    count += touches(row.block(index), rungs, rung);
  }
  return count;
}

// The ids of one class that have any weight, strongest first, lowest id first on ties.
std::vector<int> ids_on(const Row& row, const Rungs& rungs, int rung, float temperature) {
  std::vector<int> ids, blocks(row.num_blocks);
  blocks.resize(find_blocks(row, rungs, rung, blocks.data()));
  for (const int index : blocks) {
    const int first = index * kBlock, end = std::min(first + kBlock, row.size);
    for (int id = first; id < end; ++id) {
      const float logit = row.logits[id];
      if (static_cast<int>(rungs.of(logit)) != rung) continue;
      if (weight_of(logit, rungs.largest, temperature) > 0) ids.push_back(id);
    }
  }
  std::sort(ids.begin(), ids.end(), Stronger{row.logits});
  return ids;
}

// Draws from the shortest run of strongest tokens whose share reaches top_p: many tokens, of which
// only those of two classes are sorted.
int draw_from_rungs(const Row& row, float largest, float temperature, float top_p, double uniform) {
  const Rungs rungs(largest, find_least(row, largest), temperature);
  std::vector<double> sums(kRungs);
  std::vector<float> block_sums(row.num_blocks);
  add_rungs(row, rungs, temperature, sums.data(), block_sums.data());
  const double limit = top_p * total_of(block_sums);
  const auto weight = [&](int id) { return weight_of(row.logits[id], largest, temperature); };
  // 1. The run: whole classes, then the front of the next.
  int last = 0;
  double sum = 0;
  while (last < kRungs - 1 && sum + sums[last] < limit) sum += sums[last++];
  std::vector<int> ids = ids_on(row, rungs, last, temperature);
  size_t kept = 0;
  while (kept < ids.size() && sum < limit) sum += weight(ids[kept++]);
  // 2. The class that holds the target, and the token.
  const double target = uniform * sum;
  int chosen = 0;
  sum = 0;
  while (chosen < last && sum + sums[chosen] <= target) sum += sums[chosen++];
  if (chosen < last) {
    ids = ids_on(row, rungs, chosen, temperature);
    kept = ids.size();
  }
  for (size_t i = 0; i < kept; ++i) {
    sum += weight(ids[i]);
    if (sum > target) return ids[i];
  }
  return ids[kept - 1];
}

// The weights of some tokens, filled up to whole vectors.
std::vector<float> weights_at(const Row& row, const std::vector<int>& ids, float largest,
                              float temperature) {
  const size_t width = 2 * kLanes;
  std::vector<float> values((ids.size() + width - 1) / width * width, kForbidden);
  for (size_t i = 0; i < ids.size(); ++i) values[i] = row.logits[ids[i]];
  weigh(values.data(), values.size(), largest, temperature);
  return values;
}

double total_weight(const Row& row, float largest, float temperature) {
  std::vector<float> sums(row.num_blocks);
  find_sums(row, largest, temperature, sums.data());
  return total_of(sums);
}

// Draws from the shortest run of strongest tokens whose share reaches top_p, of the top_k
// strongest.
int draw_from_front(const Row& row, const std::vector<float>& maxima, float largest,
                    const SampleOptions& o, double uniform) {
  const bool has_top_k = o.top_k > 0 && o.top_k < row.size;
  const std::vector<int> ids =
      strongest(row, maxima, has_top_k ? o.top_k : std::min(row.size, kCandidates));
  const std::vector<float> weights = weights_at(row, ids, largest, o.temperature);
  const bool may_need_more = !has_top_k && static_cast<int>(ids.size()) < row.size;
  double total = total_of(weights);
  if (may_need_more) {
    // The largest of each block together are less than all: where even that is much more than
    // what was looked at, the total need not be known to tell that it does not suffice.
    const Row largest_ones(maxima.data(), row.num_blocks);
    const double least = total_weight(largest_ones, largest, o.temperature);
    if (total < kSurely * o.top_p * least) {
      return draw_from_rungs(row, largest, o.temperature, o.top_p, uniform);
    }
  }
  if (!has_top_k) total = total_weight(row, largest, o.temperature);
  const double limit = o.top_p * total;
  double sum = 0;
  size_t kept = 0;
  while (kept < ids.size() && (kept == 0 || sum < limit)) sum += weights[kept++];
  if (sum < limit && may_need_more) {
    return draw_from_rungs(row, largest, o.temperature, o.top_p, uniform);
  }
  const double target = uniform * sum;
  sum = 0;
  for (size_t i = 0; i < kept; ++i) {
    sum += weights[i];
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

namespace {

int32_t sample_row(const float* logits, int vocab_size, const SampleOptions& options) {
  check(options);
  const Row row(logits, vocab_size);
  std::vector<float> maxima(row.num_blocks);
  if (find_maxima(row, maxima.data())) throw std::invalid_argument("logits hold NaN");
  const int best = find_best(row, maxima);
  if (options.temperature == 0) return best;
  const double uniform = philox_uniform(options.seed, static_cast<uint64_t>(options.position));
  const bool takes_all = options.top_p == 1 && (options.top_k == 0 || options.top_k >= vocab_size);
  return takes_all ? draw_from_all(row, logits[best], options.temperature, uniform)
                   : draw_from_front(row, maxima, logits[best], options, uniform);
}

}  // namespace

void sample(const SampleBatch& batch, const RunRows& run, int32_t* ids) {
  std::vector<std::string> errors(batch.num_rows);
  run(batch.num_rows, [&](int i) {
    const SampleOptions options = {batch.temperature[i], batch.top_k[i], batch.top_p[i],
                                   batch.seed[i], batch.position[i]};
    try {
      const float* logits = batch.logits + static_cast<size_t>(i) * batch.vocab_size;
      ids[i] = sample_row(logits, batch.vocab_size, options);
    } catch (const std::invalid_argument& error) {
      errors[i] = error.what();
    }
  });
  for (int i = 0; i < batch.num_rows; ++i) {
    if (errors[i].empty()) continue;
    throw std::invalid_argument("row " + std::to_string(i) + ": " + errors[i]);
  }
}

}  // namespace kvasir
