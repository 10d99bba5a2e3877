// Weight matrices as panels, packed once at load, and their products.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arena.h"
#include "kernels.h"
#include "shape.h"
#include "thread_pool.h"

namespace kvasir {

// y = x W^T + bias for W [n][k], as panels: see weight_format.h.
struct PackedMatrix {
  WeightFormat format = WeightFormat::kBf16;
  uint8_t* panels = nullptr;
  const float* bias = nullptr;
  int n = 0;
  int k = 0;

  int num_panels() const { return (n + kPanelColumns - 1) / kPanelColumns; }
  const uint8_t* panel(int index) const { return panels + index * panel_bytes(format, k); }
  // Row `row` of W as float32 (an embedding); bf16 only.
  void read_row(int row, float* out) const;
};

inline size_t matrix_bytes(WeightFormat format, int n, int k) {
  return round_up(static_cast<size_t>(n), kPanelColumns) / kPanelColumns * panel_bytes(format, k);
}

// Rows [rows][columns] of one source matrix, bf16 bits.
struct RowBlock {
  const uint16_t* data;
  int rows;
  Groups groups;
  const float* divisors = nullptr;  // of each row, or null
};

// The place of one matrix made of all the sources' rows; its k is that of the stretched columns.
PackedMatrix place(const std::vector<RowBlock>& sources, int num_columns, Groups columns,
                   WeightFormat format, Arena* arena);

// Fills panels of that place: all zeros so far, or, but for int4, what the same rows left there.
// factors: of each column, or null.
void pack(const std::vector<RowBlock>& sources, int num_columns, Groups columns,
          const float* factors, const PackedMatrix& packed, Range panels, ThreadPool* pool);

struct Rows {
  float* data = nullptr;
  size_t stride = 0;  // floats

  float* operator[](int row) const { return data + static_cast<size_t>(row) * stride; }
};

// What every phase of a step computes with. Scratch of thread t starts at scratch + t * stride.
struct Compute {
  const Kernels* kernels;
  ThreadPool* pool;
  float* scratch;
  size_t scratch_stride;
  uint8_t* operand;  // activations as a product's kernel takes them: operand_bytes()

  float* scratch_of(int thread) const { return scratch + thread * scratch_stride; }
};

// Floats of scratch that linear and gated products of up to k columns need per thread.
inline size_t linear_scratch(int k) {
  const size_t gated = kGemmScratch + 2 * size_t{kGemmRowsMax} * kPanelColumns;
  return std::max(gated, static_cast<size_t>(padded_depth(k)));
}

// Bytes of prepared activations of up to m rows and k columns, for weights of any format.
size_t operand_bytes(const Kernels& kernels, int m, int k);

// c (=|+=) a W^T + bias for m rows
void linear(const Compute& compute, const PackedMatrix& weights, Rows a, int m, Rows c,
            Store store);

using Gate = void (*)(const float* gate, const float* up, int n, float* out);

// c = activate(a Gate^T) * (a Up^T)
void gated_linear(const Compute& compute, Gate activate, const PackedMatrix& gate,
                  const PackedMatrix& up, Rows a, int m, Rows c);

// body(row) for every row, `grain` rows to an item
template <class Body>
void for_rows(ThreadPool* pool, int rows, int grain, const Body& body) {
  pool->run((rows + grain - 1) / grain, [&](int item, int) {
    const int end = (item + 1) * grain < rows ? (item + 1) * grain : rows;
    for (int row = item * grain; row < end; ++row) body(row);
  });
}

}  // namespace kvasir
