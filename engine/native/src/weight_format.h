// How weights lie in memory. One layout serves every path, so packed weights can be kept on disk.
//
// A matrix W [n][k] (y = x W^T) is cut into panels of 32 columns of the product, that is 32 rows of
// W, zero-padded to whole panels and along k to whole groups of 64. Within a panel, units of 4
// bytes of consecutive k lie side by side for all 32 columns:
//   bf16  [k / 2][32][2]
//   int8  [k / 4][32][4] codes + 128, then 32 float32 scales; code * scale is w with outliers
//         spread (see integer_rows.h)
//   int4  for each group of 32: [4][32][4], then 32 scales and 32 offsets in bf16;
//         w = code * scale + offset; a byte holds a code of unit 2i (low) and of 2i + 1 (high)
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace kvasir {

inline constexpr int kPanelColumns = 32;
inline constexpr int kGroupDepth = 64;  // of k
inline constexpr int kInt4Depth = 32;   // of k, with a scale and an offset of their own
inline constexpr int kNumFormats = 3;
inline constexpr int kCodeBias = 128;

enum class WeightFormat { kBf16, kInt8, kInt4 };

inline constexpr size_t kScalesBytes = kPanelColumns * sizeof(float);
inline constexpr size_t kInt4GroupBytes = size_t{kPanelColumns} * (kInt4Depth / 2 + 4);
inline constexpr size_t kInt4ScalesOffset = size_t{kPanelColumns} * (kInt4Depth / 2);

// One definition per translation unit each: they are compiled for other instruction sets.
static inline int num_groups(int k) { return (k + kGroupDepth - 1) / kGroupDepth; }
static inline int padded_depth(int k) { return num_groups(k) * kGroupDepth; }

static inline size_t panel_bytes(WeightFormat format, int k) {
  const size_t elements = static_cast<size_t>(padded_depth(k)) * kPanelColumns;
  switch (format) {
    case WeightFormat::kBf16:
      return elements * sizeof(uint16_t);
    case WeightFormat::kInt8:
      return elements + kScalesBytes;
    case WeightFormat::kInt4:
      return static_cast<size_t>(padded_depth(k) / kInt4Depth) * kInt4GroupBytes;
  }
  return 0;
}

// Throws std::invalid_argument that says which formats there are.
WeightFormat weight_format_of(const std::string& name);

}  // namespace kvasir
