#include "packed_matrix.h"

#include <algorithm>

#include "bf16.h"

namespace kvasir {

namespace {

constexpr int kItemsPerThread = 8;  // enough that threads finish together
constexpr int kPanelsPerItemMax = 8;
constexpr size_t kBlockBytes = size_t{256}
                               << 10;  // of activations, in a core's cache beside weights
constexpr int kBlockRowsMin = 48;
constexpr int kBlockRowsUnit = 48;       // whole register tiles of every kernel
constexpr int kOperandRowsUnit = 16;     // of the tallest tile
constexpr int kPrepareGrain = 16 << 10;  // elements per item of preparing activations

// How a product is cut into items: groups of panels times row blocks, which begin with a kRowGroup
// (rows lie interleaved). The cut is invisible in the result, since no sum crosses items.
struct Cut {
  int num_blocks;
  int block_rows;
  int num_groups;
  int group_panels;
  int m;
  int num_panels;

  Cut(const PackedMatrix& weights, size_t row_bytes, int rows, int num_threads)
      : m(rows), num_panels(weights.num_panels()) {
    const int fitting = static_cast<int>(std::min(kBlockBytes / row_bytes, size_t{kGemmRowsMax}));
    const int most = std::max(fitting / kRowGroup * kRowGroup, kBlockRowsMin);
    num_blocks = (m + most - 1) / most;
    block_rows = std::min(
        most, static_cast<int>(round_up((m + num_blocks - 1) / num_blocks, kBlockRowsUnit)));
    group_panels =
        std::clamp(num_panels * num_blocks / (num_threads * kItemsPerThread), 1, kPanelsPerItemMax);
    num_groups = (num_panels + group_panels - 1) / group_panels;
  }
  int num_items() const { return num_blocks * num_groups; }
  // Row blocks vary fastest: weights come from memory once, activations from the shared cache.
  int first_row(int item) const { return item % num_blocks * block_rows; }
  int rows(int item) const { return std::min(block_rows, m - first_row(item)); }
  int first_panel(int item) const { return item / num_blocks * group_panels; }
  int panels(int item) const { return std::min(group_panels, num_panels - first_panel(item)); }
};

// Rows of activations in the form that a kernel takes.
struct Operand {
  const GemmKernel* kernel;
  const uint8_t* data;
  size_t stride;                   // bytes
  const uint8_t* words = nullptr;  // the same interleaved, or null
  size_t words_stride = 0;         // of kRowGroup rows
};

// Kernels may read past the last row, to whole tiles.
size_t operand_rows(int m) { return round_up(m, kOperandRowsUnit) + kOperandRowsUnit; }

Operand prepare(const Compute& compute, const PackedMatrix& weights, Rows a, int m) {
  const GemmKernel& kernel = compute.kernels->gemm[static_cast<int>(weights.format)];
  const bool is_prepared = kernel.prepare != nullptr, is_interleaved = kernel.interleave != nullptr;
  Operand operand = {&kernel, reinterpret_cast<const uint8_t*>(a.data), a.stride * sizeof(float)};
  if (!is_prepared && !is_interleaved) return operand;
  const size_t stride = kernel.row_bytes(weights.k);
  uint8_t* prepared = compute.operand;
  uint8_t* words = compute.operand + (is_prepared ? operand_rows(m) * stride : 0);
  if (is_prepared) operand = {&kernel, prepared, stride};
  if (is_interleaved) operand.words = words, operand.words_stride = kRowGroup * stride;
  const int num_groups = (m + kRowGroup - 1) / kRowGroup;
  const int grain = std::max(1, kPrepareGrain / kRowGroup / weights.k);  // groups of an item
  compute.pool->run((num_groups + grain - 1) / grain, [&](int item, int thread) {
    for (int group = item * grain; group < std::min(num_groups, (item + 1) * grain); ++group) {
      const int first = group * kRowGroup;
      const int count = std::min(kRowGroup, m - first);
      for (int r = first; is_prepared && r < first + count; ++r) {
        kernel.prepare(a[r], weights.k, compute.scratch_of(thread), prepared + r * stride);
      }
      if (!is_interleaved) continue;
      kernel.interleave(operand.data + first * operand.stride, operand.stride, count, weights.k,
                        words + group * operand.words_stride);
    }
  });
  return operand;
}

GemmArgs args_of(const PackedMatrix& weights, const Operand& operand, const Cut& cut, int item,
                 int first_panel, int panels) {
  const int column = first_panel * kPanelColumns;
  GemmArgs args{};
  args.a = operand.data + cut.first_row(item) * operand.stride;
  args.a_stride = operand.stride;
  if (operand.words != nullptr) {
    args.words = operand.words + cut.first_row(item) / kRowGroup * operand.words_stride;
  }
  args.words_stride = operand.words_stride;
  args.m = cut.rows(item);
  args.k = weights.k;
  args.panels = weights.panel(first_panel);
  args.n = std::min(panels * kPanelColumns, weights.n - column);
  args.bias = weights.bias == nullptr ? nullptr : weights.bias + column;
  return args;
}

}  // namespace

void PackedMatrix::read_row(int row, float* out) const {
  const uint16_t* column =
      reinterpret_cast<const uint16_t*>(panel(row / kPanelColumns)) + row % kPanelColumns * 2;
  for (int i = 0; i < k; ++i) {
    out[i] = bf16_to_float(column[static_cast<size_t>(i / 2) * 2 * kPanelColumns + i % 2]);
  }
}

size_t operand_bytes(const Kernels& kernels, int m, int k) {
  size_t most = 0;
  for (const GemmKernel& kernel : kernels.gemm) {
    const int copies = (kernel.prepare != nullptr) + (kernel.interleave != nullptr);
    most = std::max(most, kernel.row_bytes(k) * copies);
  }
  return most * operand_rows(m);
}

void linear(const Compute& compute, const PackedMatrix& weights, Rows a, int m, Rows c,
            Store store) {
  const Operand operand = prepare(compute, weights, a, m);
  const Cut cut(weights, operand.stride, m, compute.pool->num_threads());
  compute.pool->run(cut.num_items(), [&](int item, int thread) {
    GemmArgs args = args_of(weights, operand, cut, item, cut.first_panel(item), cut.panels(item));
    args.store = store;
    args.c = c[cut.first_row(item)] + cut.first_panel(item) * kPanelColumns;
    args.c_stride = c.stride;
    args.scratch = compute.scratch_of(thread);
    operand.kernel->multiply(args);
  });
}

void gated_linear(const Compute& compute, Gate activate, const PackedMatrix& gate,
                  const PackedMatrix& up, Rows a, int m, Rows c) {
  const Operand operand = prepare(compute, gate, a, m);
  const Cut cut(gate, operand.stride, m, compute.pool->num_threads());
  compute.pool->run(cut.num_items(), [&](int item, int thread) {
    const int row = cut.first_row(item), rows = cut.rows(item);
    float* gated = compute.scratch_of(thread) + kGemmScratch;
    float* upped = gated + size_t{kGemmRowsMax} * kPanelColumns;
    for (int i = 0; i < cut.panels(item); ++i) {
      const int panel = cut.first_panel(item) + i;
      for (const bool is_gate : {true, false}) {
        GemmArgs args = args_of(is_gate ? gate : up, operand, cut, item, panel, 1);
        args.c = is_gate ? gated : upped;
        args.c_stride = kPanelColumns;
        args.scratch = compute.scratch_of(thread);
        operand.kernel->multiply(args);
      }
      const int column = panel * kPanelColumns;
      const int columns = std::min(kPanelColumns, gate.n - column);
      for (int r = 0; r < rows; ++r) {
        activate(gated + r * kPanelColumns, upped + r * kPanelColumns, columns,
                 c[row + r] + column);
      }
    }
  });
}

}  // namespace kvasir
