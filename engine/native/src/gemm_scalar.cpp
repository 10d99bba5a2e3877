// Products by plain loops, the reference of all others. With int8 and int4 weights every path does
// the same arithmetic: exact integer sums and a few float operations in a stated order.
#include <cmath>

#include "bf16.h"
#include "integer_rows.h"
#include "kernels.h"

namespace kvasir {

namespace {

size_t row_bytes(int k) {
  return round_up(static_cast<size_t>(k) * sizeof(float), kCacheLineBytes);
}

// Code of weight (k, column): see weight_format.h.
int code_at(WeightFormat format, const uint8_t* panel, int k, int column) {
  const size_t unit = k / 4, byte = k % 4;
  if (format == WeightFormat::kInt8) {
    return panel[(unit * kPanelColumns + column) * 4 + byte] - kCodeBias;
  }
  const size_t group = k / kInt4Depth, pair = k % kInt4Depth / 8;
  const uint8_t codes = panel[group * kInt4GroupBytes + (pair * kPanelColumns + column) * 4 + byte];
  return unit % 2 == 0 ? codes & 0xF : codes >> 4;
}

float bf16_product(const GemmArgs& g, int row, const uint8_t* panel, int column) {
  const float* a = reinterpret_cast<const float*>(g.a + row * g.a_stride);
  const uint16_t* weights = reinterpret_cast<const uint16_t*>(panel);
  float sum = 0;
  for (int i = 0; i < g.k; ++i) {
    const size_t pair = i / 2;
    sum += a[i] * bf16_to_float(weights[(pair * kPanelColumns + column) * 2 + i % 2]);
  }
  return sum;
}

int sum_of_codes(WeightFormat format, const int8_t* a, const uint8_t* panel, int column, int first,
                 int count) {
  int sum = 0;
  for (int i = first; i < first + count; ++i) sum += a[i] * code_at(format, panel, i, column);
  return sum;
}

float int8_product(const GemmArgs& g, int row, const uint8_t* panel, int column) {
  const int8_t* a = reinterpret_cast<const int8_t*>(g.a + row * g.a_stride);
  const int sum = sum_of_codes(WeightFormat::kInt8, a, panel, column, 0, padded_depth(g.k));
  const uint8_t* end = panel + panel_bytes(WeightFormat::kInt8, g.k);
  const float* scales = reinterpret_cast<const float*>(end - kScalesBytes);
  return static_cast<float>(sum) * (tail_of(a, g.k)->scale * scales[column]);
}

float int4_product(const GemmArgs& g, int row, const uint8_t* panel, int column) {
  const int8_t* a = reinterpret_cast<const int8_t*>(g.a + row * g.a_stride);
  float total = 0;
  for (int group = 0; group < padded_depth(g.k) / kInt4Depth; ++group) {
    const uint16_t* scales =
        reinterpret_cast<const uint16_t*>(panel + group * kInt4GroupBytes + kInt4ScalesOffset);
    const GroupTail& tail = group_tails_of(a, g.k)[group];
    const int sum =
        sum_of_codes(WeightFormat::kInt4, a, panel, column, group * kInt4Depth, kInt4Depth);
    const float scaled = static_cast<float>(sum) * tail.scale;
    total = std::fma(scaled, bf16_to_float(scales[column]), total);
    total = std::fma(tail.sum, bf16_to_float(scales[kPanelColumns + column]), total);
  }
  return total;
}

using Product = float (*)(const GemmArgs& g, int row, const uint8_t* panel, int column);

template <WeightFormat kFormat, Product kProduct>
void multiply(const GemmArgs& g) {
  for (int column = 0; column < g.n; ++column) {
    const uint8_t* panel = g.panels + column / kPanelColumns * panel_bytes(kFormat, g.k);
    for (int row = 0; row < g.m; ++row) {
      const float product = kProduct(g, row, panel, column % kPanelColumns);
      const float sum = g.bias == nullptr ? product : product + g.bias[column];
      float* c = g.c + row * g.c_stride + column;
      *c = g.store == Store::kAdd ? *c + sum : sum;
    }
  }
}

double exercise(int rounds) {
  volatile float sum = 0;
  for (int i = 0; i < rounds; ++i) sum = sum * 0.5f + 1.0f;
  return 2.0 * rounds;
}

}  // namespace

GemmKernel scalar_gemm(WeightFormat format) {
  switch (format) {
    case WeightFormat::kBf16:
      return {row_bytes, nullptr, multiply<WeightFormat::kBf16, bf16_product>, exercise};
    case WeightFormat::kInt8:
      return {int8_row_bytes, prepare_int8_row, multiply<WeightFormat::kInt8, int8_product>,
              exercise};
    case WeightFormat::kInt4:
      break;
  }
  return {int4_row_bytes, prepare_int4_row, multiply<WeightFormat::kInt4, int4_product>, exercise};
}

}  // namespace kvasir
