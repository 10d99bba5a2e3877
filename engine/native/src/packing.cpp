// Weights from bf16 rows to panels (see weight_format.h).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "bf16.h"
#include "integer_rows.h"
#include "packed_matrix.h"

namespace kvasir {

namespace {

constexpr int kIntegerDepthMax = 1 << 16;  // sums of 127 * 255 fit 32 bits
constexpr float kInt4Levels = 15.0f;

// A row's units of 4 bytes to its column of the panel.
void write_units(const void* row, size_t bytes, int column, uint8_t* panel) {
  constexpr size_t kUnit = 4;
  const uint8_t* source = static_cast<const uint8_t*>(row);
  uint8_t* target = panel + column * kUnit;
  for (size_t at = 0; at < bytes; at += kUnit, target += kUnit * kPanelColumns) {
    std::memcpy(target, source + at, kUnit);
  }
}

void encode_bf16(const uint16_t* row, int k, int column, uint8_t* panel) {
  write_units(row, padded_depth(k) * sizeof(uint16_t), column, panel);
}

void encode_int8(const uint16_t* row, int k, int column, uint8_t* panel) {
  const int depth = padded_depth(k);
  std::vector<float> plain(k), spread(depth);
  std::vector<uint8_t> codes(depth);
  for (int i = 0; i < k; ++i) plain[i] = bf16_to_float(row[i]);
  spread_outliers(plain.data(), k, spread.data());
  const Coding coding = coding_of(spread.data(), depth);
  for (int i = 0; i < depth; ++i) {
    codes[i] = static_cast<uint8_t>(nearest(spread[i] * coding.inverse) + kCodeBias);
  }
  write_units(codes.data(), depth, column, panel);
  uint8_t* end = panel + panel_bytes(WeightFormat::kInt8, k);
  reinterpret_cast<float*>(end - kScalesBytes)[column] = coding.scale;
}

// One group of a row, count <= 32 weights.
void encode_int4_group(const uint16_t* row, int count, int column, uint8_t* block) {
  float low = bf16_to_float(row[0]), high = low;
  for (int i = 1; i < count; ++i) {
    low = std::fmin(low, bf16_to_float(row[i]));
    high = std::fmax(high, bf16_to_float(row[i]));
  }
  uint16_t* scales = reinterpret_cast<uint16_t*>(block + kInt4ScalesOffset);
  const uint16_t offset_bits = bf16_from_float(low);
  const float offset = bf16_to_float(offset_bits);
  const uint16_t scale_bits = bf16_from_float((high - offset) / kInt4Levels);
  const float scale = bf16_to_float(scale_bits);
  scales[column] = scale_bits;
  scales[kPanelColumns + column] = offset_bits;
  for (int i = 0; i < count && scale > 0; ++i) {
    const float level = (bf16_to_float(row[i]) - offset) / scale;
    const int code = nearest(std::fmin(std::fmax(level, 0.0f), kInt4Levels));
    const int unit = i / 4;
    uint8_t* byte = block + (unit / 2 * kPanelColumns + column) * 4 + i % 4;
    *byte = static_cast<uint8_t>(*byte | (unit % 2 == 0 ? code : code << 4));
  }
}

void encode_int4(const uint16_t* row, int k, int column, uint8_t* panel) {
  for (int first = 0, group = 0; first < k; first += kInt4Depth, ++group) {
    encode_int4_group(row + first, std::min(kInt4Depth, k - first), column,
                      panel + group * kInt4GroupBytes);
  }
}

uint16_t upper_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

struct SourceRow {
  const uint16_t* data = nullptr;  // null: zeros
  float divisor = 1;
};

// Factors and divisors are powers of two, so that nothing is rounded.
void balance(const SourceRow& row, const float* factors, int num_columns, uint16_t* out) {
  const float share = 1 / row.divisor;
  for (int i = 0; i < num_columns; ++i) {
    const float factor = factors == nullptr ? share : share * factors[i];
    out[i] = upper_half(bf16_to_float(row.data[i]) * factor);
  }
}

// row: [padded_depth(k)], zeros behind k
void encode(WeightFormat format, const uint16_t* row, int k, int column, uint8_t* panel) {
  switch (format) {
    case WeightFormat::kBf16:
      return encode_bf16(row, k, column, panel);
    case WeightFormat::kInt8:
      return encode_int8(row, k, column, panel);
    case WeightFormat::kInt4:
      return encode_int4(row, k, column, panel);
  }
}

}  // namespace

PackedMatrix place(const std::vector<RowBlock>& sources, int num_columns, Groups columns,
                   WeightFormat format, Arena* arena) {
  PackedMatrix packed;
  packed.format = format;
  packed.k = columns.stretched(num_columns);
  if (format != WeightFormat::kBf16 && packed.k > kIntegerDepthMax) {
    throw std::invalid_argument("a matrix is too deep for int8 activations");
  }
  for (const RowBlock& source : sources) packed.n += source.groups.stretched(source.rows);
  packed.panels = arena->take<uint8_t>(matrix_bytes(format, packed.n, packed.k));
  return packed;
}

void pack(const std::vector<RowBlock>& sources, int num_columns, Groups columns,
          const float* factors, const PackedMatrix& packed, Range panels, ThreadPool* pool) {
  std::vector<SourceRow> rows;
  for (const RowBlock& source : sources) {
    for (int row = 0; row < source.rows; ++row) {
      const float divisor = source.divisors == nullptr ? 1 : source.divisors[row];
      rows.push_back({source.data + static_cast<size_t>(row) * num_columns, divisor});
      if ((row + 1) % source.groups.size != 0) continue;
      rows.insert(rows.end(), source.groups.width - source.groups.size, SourceRow{});
    }
  }
  pool->run(panels.count(), [&](int item, int) {
    const int index = panels.from + item;
    const int first = index * kPanelColumns;
    uint8_t* panel = packed.panels + index * panel_bytes(packed.format, packed.k);
    std::vector<uint16_t> balanced(num_columns), stretched(padded_depth(packed.k));
    for (int j = 0; j < std::min(kPanelColumns, packed.n - first); ++j) {
      const SourceRow& row = rows[first + j];
      if (row.data == nullptr) continue;
      balance(row, factors, num_columns, balanced.data());
      for (int i = 0; i < num_columns; i += columns.size) {
        std::copy_n(balanced.data() + i, columns.size, stretched.data() + columns.stretched(i));
      }
      encode(packed.format, stretched.data(), packed.k, j, panel);
    }
  });
}

}  // namespace kvasir
