// The slow reference: what every other path must equal, byte for byte.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "codec_kernels.h"
#include "codec_rans.h"

namespace kvasir {
namespace {

uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }

uint16_t load16(const uint8_t* at) {
  uint16_t value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

void store16(uint8_t* at, uint16_t value) { std::memcpy(at, &value, sizeof value); }

uint16_t magnitude(const uint16_t* source, size_t count) {
  uint16_t most = 0;
  for (size_t i = 0; i < count; ++i) most = std::max<uint16_t>(most, source[i] & 0x7fff);
  return most;
}

// The token of value i of a section.
size_t token_of(size_t i, size_t head_dim, bool is_key) {
  return is_key ? i % kLanes : i / head_dim;
}

// Where the code of value i lies: rows are stored in pairs, whose values alternate.
size_t code_place(size_t i, size_t row_values) {
  const size_t row = i / row_values;
  const size_t column = i % row_values;
  return row / 2 * 2 * row_values + 2 * column + row % 2;
}

bool int8_encode(const uint16_t* source, size_t head_dim, bool is_key, uint8_t* target) {
  const size_t count = kLanes * head_dim;
  uint16_t most[kLanes] = {};
  for (size_t i = 0; i < count; ++i) {
    uint16_t& of_token = most[token_of(i, head_dim, is_key)];
    of_token = std::max<uint16_t>(of_token, source[i] & 0x7fff);
  }
  float inverse[kLanes];
  for (size_t t = 0; t < kLanes; ++t) {
    if (most[t] > kMagnitudeMax) return false;
    const uint16_t scale = step_of(widen(most[t]), 127.0F);
    store16(target + 2 * t, scale);
    inverse[t] = inverse_of(scale);
  }
  uint8_t* const codes = target + 2 * kLanes;
  for (size_t i = 0; i < count; ++i) {
    const float level = widen(source[i]) * inverse[token_of(i, head_dim, is_key)] + kRoundSigned;
    codes[code_place(i, is_key ? kLanes : head_dim)] = static_cast<uint8_t>(bits_of(level));
  }
  return true;
}

bool int8_decode(const uint8_t* source, size_t head_dim, bool is_key, uint16_t* target) {
  float scales[kLanes];
  for (size_t t = 0; t < kLanes; ++t) {
    const uint16_t scale = load16(source + 2 * t);
    if (scale > kMagnitudeMax) return false;
    scales[t] = widen(scale);
  }
  const auto* codes = reinterpret_cast<const int8_t*>(source + 2 * kLanes);
  for (size_t i = 0; i < kLanes * head_dim; ++i) {
    const float code = codes[code_place(i, is_key ? kLanes : head_dim)];
    target[i] = narrow(code * scales[token_of(i, head_dim, is_key)]);
  }
  return true;
}

bool int4_encode(const uint16_t* source, size_t num_groups, uint8_t* target) {
  uint8_t* const steps = target + 2 * num_groups;
  uint8_t* const codes = steps + 2 * num_groups;
  std::memset(codes, 0, 16 * num_groups);
  for (size_t g = 0; g < num_groups; ++g, source += kLanes) {
    if (magnitude(source, kLanes) > kMagnitudeMax) return false;
    const auto sortable = [](uint16_t bits) {
      return static_cast<uint16_t>(bits & 0x8000 ? ~bits : bits | 0x8000);
    };
    const auto less = [&](uint16_t a, uint16_t b) { return sortable(a) < sortable(b); };
    const auto [least, most] = std::minmax_element(source, source + kLanes, less);
    const uint16_t step = step_of(widen(*most) - widen(*least), 15.0F);
    store16(target + 2 * g, *least);
    store16(steps + 2 * g, step);
    const float inverse = inverse_of(step);
    for (size_t i = 0; i < kLanes; ++i) {
      const float level = (widen(source[i]) - widen(*least)) * inverse + kRoundUnsigned;
      uint8_t* const word = codes + g / 4 * 64 + 2 * i;
      store16(word, static_cast<uint16_t>(load16(word) | (bits_of(level) & 0xf) << 4 * (g % 4)));
    }
  }
  return true;
}

bool int4_decode(const uint8_t* source, size_t num_groups, uint16_t* target) {
  const uint8_t* const steps = source + 2 * num_groups;
  const uint8_t* const codes = steps + 2 * num_groups;
  for (size_t g = 0; g < num_groups; ++g, target += kLanes) {
    const uint16_t least = load16(source + 2 * g);
    const uint16_t step = load16(steps + 2 * g);
    if ((least & 0x7fff) > kMagnitudeMax || step > kMagnitudeMax) return false;
    for (size_t i = 0; i < kLanes; ++i) {
      const int code = load16(codes + g / 4 * 64 + 2 * i) >> 4 * (g % 4) & 0xf;
      target[i] = narrow(static_cast<float>(code) * widen(step) + widen(least));
    }
  }
  return true;
}

void to_levels(const uint16_t* source, size_t count, float inverse, int16_t* levels) {
  for (size_t i = 0; i < count; ++i) {
    levels[i] = static_cast<int16_t>(bits_of(widen(source[i]) * inverse + kRoundSigned));
  }
}

void from_levels(const int16_t* levels, size_t count, float step, uint16_t* target) {
  for (size_t i = 0; i < count; ++i) target[i] = narrow(static_cast<float>(levels[i]) * step);
}

void transpose(const int16_t* source, size_t num_rows, size_t num_columns, int16_t* target) {
  for (size_t r = 0; r < num_rows; ++r) {
    for (size_t c = 0; c < num_columns; ++c) target[c * num_rows + r] = source[r * num_columns + c];
  }
}

void spreads(const int16_t* levels, size_t num_rows, uint32_t* found) {
  for (size_t r = 0; r < num_rows; ++r) {
    int64_t sum = 0;
    int64_t squares = 0;
    for (size_t i = r * kLanes; i < (r + 1) * kLanes; ++i) {
      sum += levels[i];
      squares += levels[i] * levels[i];
    }
    found[r] = static_cast<uint32_t>(kLanes * squares - sum * sum);
  }
}

// The narrowest table for 32 symbols of this sum of squares, none of a larger magnitude.
uint8_t table_for(uint32_t squares, int magnitude) {
  size_t table = 0;
  while (table + 1 < kTables && (squares > kSquares[table] || magnitude > kMagnitudes[table])) {
    ++table;
  }
  return static_cast<uint8_t>(table);
}

bool row_to_symbols(const int16_t* levels, size_t row, int shift, const SymbolRows& rows) {
  int coarse[kLanes];
  int sum = 0;
  for (size_t i = 0; i < kLanes; ++i) {
    coarse[i] = (levels[row * kLanes + i] + (1 << shift >> 1)) >> shift;
    sum += coarse[i];
  }
  const int centre = (sum + static_cast<int>(kLanes / 2)) >> 5;
  uint32_t squares = 0;
  int magnitude = 0;
  for (size_t i = 0; i < kLanes; ++i) {
    const int around = coarse[i] - centre;
    squares += static_cast<uint32_t>(around * around);
    magnitude = std::max(magnitude, std::abs(around));
    rows.symbols[row * kLanes + i] = static_cast<uint8_t>(around + 128);
  }
  rows.tables[row] = table_for(squares, magnitude);
  rows.shifts[row] = static_cast<uint8_t>(shift);
  rows.centres[row] = static_cast<int16_t>(centre);
  return magnitude <= kSymbolMax;
}

void to_symbols(const int16_t* levels, size_t num_rows, const SymbolRows& rows) {
  for (size_t r = 0; r < num_rows; ++r) {
    int shift = rows.shifts[r];
    while (!row_to_symbols(levels, r, shift, rows)) ++shift;  // 64 levels at 6: all fits
  }
}

void from_symbols(const SymbolRows& rows, size_t num_rows, int16_t* levels) {
  for (size_t i = 0; i < num_rows * kLanes; ++i) {
    const int coarse = rows.symbols[i] - 128 + rows.centres[i / kLanes];
    levels[i] = static_cast<int16_t>(static_cast<uint32_t>(coarse) << rows.shifts[i / kLanes]);
  }
}

}  // namespace

const CodecKernels& scalar_codec_kernels() {
  static constexpr CodecKernels kernels{
      .int8_encode = int8_encode,
      .int8_decode = int8_decode,
      .int4_encode = int4_encode,
      .int4_decode = int4_decode,
      .magnitude = magnitude,
      .to_levels = to_levels,
      .from_levels = from_levels,
      .transpose = transpose,
      .spreads = spreads,
      .to_symbols = to_symbols,
      .from_symbols = from_symbols,
      .rans_encode = rans_encode,
      .rans_decode = rans_decode,
  };
  return kernels;
}

}  // namespace kvasir
