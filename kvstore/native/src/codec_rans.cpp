#include "codec_rans.h"

#include <algorithm>
#include <memory>

namespace kvasir {
namespace {

// exp(-1 / (2 sigma^2)) * 2^32 for sigma = 0.25 * 1.45^i.
constexpr std::array<uint64_t, kTables> kFalls{
    1440801,    95603092,   703066689,  1816086926, 2852071873, 3535038563, 3915059443, 4109883769,
    4205920083, 4252381596, 4274659582, 4285296452, 4290364889, 4292777664, 4293925715, 4294471863,
};

void fill_symbol(RansTables& tables, size_t table, int symbol, uint32_t first, uint32_t frequency) {
  const auto place = static_cast<uint32_t>(symbol + 128);
  for (uint32_t i = 0; i < frequency; ++i) {
    tables.decode[table * kSlots + first + i] = place | frequency << 8 | i << 19;
  }
  uint64_t& entry = tables.encode[table * 256 + place];
  if (frequency == 1) {  // x * (2^32 - 1) >> 32 is x - 1: what is missing is in the addend
    entry = ~uint32_t{0} | uint64_t{frequency | (first + kSlots - 1) << 11} << 32;
    return;
  }
  uint32_t shift = 0;
  while (frequency > uint32_t{1} << shift) ++shift;
  // Rounded up: exact for x < 2^31 (T. Granlund, P. Montgomery, 1994).
  const uint64_t dividend = uint64_t{1} << (shift + 31);
  const uint64_t reciprocal = (dividend + frequency - 1) / frequency;
  entry = reciprocal | uint64_t{frequency | first << 11 | (shift - 1) << 23} << 32;
}

void fill_table(RansTables& tables, size_t table) {
  const int magnitude = kMagnitudes[table];
  std::array<uint64_t, 128> weights{};
  uint64_t weight = uint64_t{1} << 32;
  uint64_t fall = kFalls[table];
  const uint64_t squared = fall * fall >> 32;
  uint64_t sum = 0;
  for (int s = 0; s <= magnitude; ++s) {
    weights[static_cast<size_t>(s)] = weight;
    sum += s == 0 ? weight : 2 * weight;
    weight = weight * fall >> 32;
    fall = fall * squared >> 32;
  }
  std::array<uint32_t, 128> frequencies{};
  uint32_t used = 0;
  for (int s = 1; s <= magnitude; ++s) {
    const auto i = static_cast<size_t>(s);
    frequencies[i] = std::max<uint32_t>(1, static_cast<uint32_t>(weights[i] * kSlots / sum));
    used += 2 * frequencies[i];
  }
  frequencies[0] = kSlots - used;
  uint32_t first = 0;
  for (int s = -magnitude; s <= magnitude; ++s) {
    const uint32_t frequency = frequencies[static_cast<size_t>(s < 0 ? -s : s)];
    fill_symbol(tables, table, s, first, frequency);
    first += frequency;
  }
}

}  // namespace

const RansTables& rans_tables() {
  static const std::unique_ptr<const RansTables> tables = [] {
    auto made = std::make_unique<RansTables>();
    for (size_t table = 0; table < kTables; ++table) fill_table(*made, table);
    return made;
  }();
  return *tables;
}

void rans_encode(const uint8_t* symbols, const uint8_t* tables, size_t num_rows, uint32_t* states,
                 uint16_t*& words) {
  const RansTables& all = rans_tables();
  uint16_t* out = words;
  for (size_t i = num_rows * kLanes; i-- > 0;) {
    uint32_t& state = states[i % kLanes];
    const uint64_t both = all.encode[size_t{tables[i / kLanes]} * 256 + symbols[i]];
    const auto entry = static_cast<uint32_t>(both >> 32);
    const uint32_t frequency = entry & (kSlots - 1);
    uint32_t x = state;
    if (x >= frequency << 20) {
      *--out = static_cast<uint16_t>(x);
      x >>= 16;
    }
    const auto high = static_cast<uint32_t>(uint64_t{x} * static_cast<uint32_t>(both) >> 32);
    const uint32_t quotient = high >> (entry >> 23);
    state = x + quotient * (kSlots - frequency) + (entry >> 11 & (2 * kSlots - 1));
  }
  words = out;
}

bool rans_decode(uint8_t* symbols, const uint8_t* tables, size_t num_rows, uint32_t* states,
                 const uint16_t*& words, const uint16_t* words_end) {
  const RansTables& all = rans_tables();
  const uint16_t* in = words;
  for (size_t i = 0; i < num_rows * kLanes; ++i) {
    uint32_t& state = states[i % kLanes];
    const uint32_t entry = all.decode[tables[i / kLanes] * kSlots + (state & (kSlots - 1))];
    uint32_t x = (entry >> 8 & (kSlots - 1)) * (state >> kProbabilityBits) + (entry >> 19);
    if (x < kStateMin) {
      if (in == words_end) return false;
      x = x << 16 | *in++;
    }
    state = x;
    symbols[i] = static_cast<uint8_t>(entry);
  }
  words = in;
  return true;
}

}  // namespace kvasir
