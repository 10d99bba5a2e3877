#include "codec_entropy.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <numeric>
#include <vector>

#include "codec_rans.h"

namespace kvasir {
namespace {

// A step of quantisation, in standard deviations: of the channel of V; of K, whose wide channels
// weigh more in scores, half-way (in the logarithm) between the channel's and the head's. The first
// third of the layers, the second and the last (CacheGen, section 5.2: early errors cost more).
constexpr std::array<float, 3> kCoarseness = {0.3F, 0.4F, 0.5F};
constexpr float kFineLevels = 2047.0F;   // of the section's largest magnitude: a step of one
constexpr int kShiftMax = 11;            // a channel's step: so many times doubled
constexpr float kMagnitudeMin = 1e-30F;  // a section below is all zeros
constexpr int kCentreMax = 2047;
constexpr size_t kStatesBytes = kLanes * sizeof(uint32_t);

size_t params_bytes(const CodecShape& shape) {
  return sizeof(float) + shape.head_dim * (sizeof(uint16_t) + sizeof(uint8_t));
}

size_t num_sections(const CodecShape& shape, uint32_t num_layers) {
  return size_t{2} * num_layers * shape.num_heads;
}

// Grown once a thread. Symbols lie in rows of 32: a channel of K or V over the tokens.
struct Scratch {
  std::vector<uint8_t> symbols;
  std::vector<uint8_t> tables;  // of rows
  std::vector<uint8_t> shifts;
  std::vector<int16_t> centres;
  std::vector<uint16_t> words;
  std::vector<int16_t> levels;
  std::vector<int16_t> turned;

  void fit(size_t num_rows, size_t head_dim) {
    if (tables.size() < num_rows) {
      tables.resize(num_rows);
      shifts.resize(num_rows);
      centres.resize(num_rows);
      symbols.resize(num_rows * kLanes);
      words.resize(num_rows * kLanes + kWordsAhead);
    }
    levels.resize(std::max(levels.size(), head_dim * kLanes));
    turned.resize(levels.size());
  }

  SymbolRows rows(size_t first) {
    return {&symbols[first * kLanes], &tables[first], &shifts[first], &centres[first]};
  }
};

Scratch& scratch() {
  static thread_local Scratch mine;
  return mine;
}

// Encodes one section after the other into the scratch, then all symbols at once.
class Encoder {
 public:
  Encoder(const CodecKernels& kernels, const CodecShape& shape)
      : kernels_(kernels), count_(shape.section_values()), head_dim_(shape.head_dim) {}

  // False: a value is out of bounds.
  bool add(const uint16_t* section, bool is_key, float coarseness, uint8_t* params) {
    const uint16_t most = kernels_.magnitude(section, count_);
    if (most > kMagnitudeMax) return false;
    const float step = widen(most) < kMagnitudeMin ? 0.0F : widen(most) / kFineLevels;
    std::memcpy(params, &step, sizeof step);
    quantise(section, is_key, step);
    Scratch& area = scratch();
    const SymbolRows rows = area.rows(num_rows_);
    choose_shifts(is_key, coarseness, rows.shifts);
    kernels_.to_symbols(area.levels.data(), head_dim_, rows);
    uint8_t* const packed = params + sizeof step;
    for (size_t c = 0; c < head_dim_; ++c) {
      const auto both = static_cast<uint16_t>((rows.centres[c] + kCentreMax) << 4 | rows.tables[c]);
      std::memcpy(packed + c * sizeof both, &both, sizeof both);
    }
    std::memcpy(packed + head_dim_ * sizeof(uint16_t), rows.shifts, head_dim_);
    num_rows_ += head_dim_;
    return true;
  }

  // Appends the stream; returns its bytes.
  size_t finish(uint8_t* target) const {
    Scratch& area = scratch();
    uint32_t states[kLanes];
    std::fill_n(states, kLanes, kStateMin);
    uint16_t* const end = area.words.data() + kWordsAhead + num_rows_ * kLanes;
    uint16_t* words = end;
    kernels_.rans_encode(area.symbols.data(), area.tables.data(), num_rows_, states, words);
    const size_t words_bytes = static_cast<size_t>(end - words) * sizeof(uint16_t);
    std::memcpy(target, states, kStatesBytes);
    std::memcpy(target + kStatesBytes, words, words_bytes);
    return kStatesBytes + words_bytes;
  }

 private:
  // To integers, channel by channel.
  void quantise(const uint16_t* section, bool is_key, float step) {
    Scratch& area = scratch();
    const float inverse = step == 0.0F ? 0.0F : 1.0F / step;
    kernels_.to_levels(section, count_, inverse, area.levels.data());
    if (!is_key) {
      kernels_.transpose(area.levels.data(), kLanes, head_dim_, area.turned.data());
      area.levels.swap(area.turned);
    }
  }

  // The powers of two nearest to the steps that suit the channels' spreads, by the exponents of
  // their squares (of V) and fourth powers (of K).
  void choose_shifts(bool is_key, float coarseness, uint8_t* shifts) const {
    uint32_t spreads[kGroupsMax];
    kernels_.spreads(scratch().levels.data(), head_dim_, spreads);
    const float usual = static_cast<float>(std::accumulate(spreads, spreads + head_dim_, 0ULL)) /
                        static_cast<float>(head_dim_);
    const float square = coarseness * coarseness / 1024.0F;
    const float factor = is_key ? 4.0F * square * square * usual : 2.0F * square;
    for (size_t c = 0; c < head_dim_; ++c) {
      const auto bits = std::bit_cast<uint32_t>(factor * static_cast<float>(spreads[c]));
      const int exponent = std::max(0, static_cast<int>(bits >> 23) - 127);
      shifts[c] = static_cast<uint8_t>(std::min(kShiftMax, exponent >> (is_key ? 2 : 1)));
    }
  }

  const CodecKernels& kernels_;
  const size_t count_;
  const size_t head_dim_;
  size_t num_rows_ = 0;
};

void decode_section(const CodecKernels& kernels, const CodecShape& shape, bool is_key,
                    const SymbolRows& rows, const uint8_t* params, uint16_t* target) {
  Scratch& area = scratch();
  float step;
  std::memcpy(&step, params, sizeof step);
  kernels.from_symbols(rows, shape.head_dim, area.levels.data());
  if (!is_key) {
    kernels.transpose(area.levels.data(), shape.head_dim, kLanes, area.turned.data());
    area.levels.swap(area.turned);
  }
  kernels.from_levels(area.levels.data(), shape.section_values(), step, target);
}

// False: a parameter is out of bounds.
bool read_params(const CodecShape& shape, const uint8_t* params, const SymbolRows& rows) {
  float step;
  std::memcpy(&step, params, sizeof step);
  if (!(step >= 0.0F && step <= widen(kMagnitudeMax))) return false;
  params += sizeof step;
  for (size_t c = 0; c < shape.head_dim; ++c) {
    uint16_t both;
    std::memcpy(&both, params + c * sizeof both, sizeof both);
    rows.tables[c] = both & 0xf;
    rows.centres[c] = static_cast<int16_t>((both >> 4) - kCentreMax);
  }
  std::memcpy(rows.shifts, params + shape.head_dim * sizeof(uint16_t), shape.head_dim);
  return std::all_of(rows.shifts, rows.shifts + shape.head_dim,
                     [](uint8_t shift) { return shift <= kShiftMax; });
}

}  // namespace

size_t entropy_bytes_max(const CodecShape& shape, uint32_t num_layers) {
  const size_t sections = num_sections(shape, num_layers);
  return sections * (params_bytes(shape) + shape.section_values() * sizeof(uint16_t)) +
         kStatesBytes;
}

size_t entropy_encode(const CodecKernels& kernels, const CodecShape& shape, const LayerRun& run,
                      const uint16_t* source, uint8_t* target) {
  const size_t sections = num_sections(shape, run.count);
  scratch().fit(sections * shape.head_dim, shape.head_dim);
  Encoder encoder(kernels, shape);
  for (size_t i = 0; i < sections; ++i, target += params_bytes(shape)) {
    const size_t layer = run.first + i / (2 * shape.num_heads);
    const float coarseness = kCoarseness[std::min<size_t>(2, 3 * layer / run.total)];
    const bool is_key = i / shape.num_heads % 2 == 0;
    const uint16_t* const section = source + i * shape.section_values();
    if (!encoder.add(section, is_key, coarseness, target)) return 0;
  }
  return sections * params_bytes(shape) + encoder.finish(target);
}

bool entropy_decode(const CodecKernels& kernels, const CodecShape& shape, uint32_t num_layers,
                    std::span<const uint8_t> source, uint16_t* target) {
  const size_t sections = num_sections(shape, num_layers);
  const size_t all_params = sections * params_bytes(shape);
  if (source.size() < all_params + kStatesBytes || source.size() % 2 != 0) return false;
  // 1. What is told of the rows.
  Scratch& area = scratch();
  area.fit(sections * shape.head_dim, shape.head_dim);
  for (size_t i = 0; i < sections; ++i) {
    const uint8_t* const params = source.data() + i * params_bytes(shape);
    if (!read_params(shape, params, area.rows(i * shape.head_dim))) return false;
  }
  // 2. All symbols; a stream that is what was written ends where it began, with all words read.
  const std::span<const uint8_t> stream = source.subspan(all_params);
  const size_t num_words = (stream.size() - kStatesBytes) / sizeof(uint16_t);
  if (num_words > sections * shape.section_values()) return false;
  uint32_t states[kLanes];
  std::memcpy(states, stream.data(), kStatesBytes);
  std::memcpy(area.words.data(), stream.data() + kStatesBytes, num_words * sizeof(uint16_t));
  const uint16_t* words = area.words.data();
  const uint16_t* const end = words + num_words;
  const size_t num_rows = sections * shape.head_dim;
  if (!kernels.rans_decode(area.symbols.data(), area.tables.data(), num_rows, states, words, end) ||
      words != end ||
      std::any_of(states, states + kLanes, [](uint32_t s) { return s != kStateMin; })) {
    return false;
  }
  // 3. The values.
  for (size_t i = 0; i < sections; ++i) {
    decode_section(kernels, shape, i / shape.num_heads % 2 == 0, area.rows(i * shape.head_dim),
                   source.data() + i * params_bytes(shape), target + i * shape.section_values());
  }
  return true;
}

}  // namespace kvasir
