#include "packed_matrix.h"

#include <algorithm>

#include "bf16.h"

namespace kvasir {

namespace {

constexpr int kItemsPerThread = 8;  // enough that threads finish together
constexpr int kPanelsPerItemMax = 8;
constexpr size_t kBlockBytes = size_t{640} << 10;  // of activations, to stay in a core's own cache
constexpr int kBlockRowsMin = 48;
constexpr int kBlockRowsUnit = 12;  // whole register tiles

// How a product is cut into items: groups of panels times row blocks. The cut is invisible in the
// result, since no sum crosses items.
struct Cut {
  int num_blocks;
  int block_rows;
  int num_groups;
  int group_panels;
  int m;
  int num_panels;

  Cut(const PackedMatrix& weights, int rows, int num_threads)
      : m(rows), num_panels(weights.num_panels()) {
    const int fitting = static_cast<int>(kBlockBytes / (weights.k * sizeof(float)));
    const int most = std::clamp(fitting, kBlockRowsMin, kGemmRowsMax);
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

GemmArgs args_of(const PackedMatrix& weights, Rows a, int first_row, int rows, int first_panel,
                 int panels) {
  const int column = first_panel * kPanelColumns;
  GemmArgs args{};
  args.a = a[first_row];
  args.a_stride = a.stride;
  args.m = rows;
  args.k = weights.k;
  args.panels = weights.panel(first_panel);
  args.n = std::min(panels * kPanelColumns, weights.n - column);
  args.bias = weights.bias == nullptr ? nullptr : weights.bias + column;
  return args;
}

}  // namespace

void PackedMatrix::read_row(int row, float* out) const {
  const uint16_t* column = panel(row / kPanelColumns) + row % kPanelColumns;
  for (int i = 0; i < k; ++i)
    out[i] = bf16_to_float(column[static_cast<size_t>(i) * kPanelColumns]);
}

PackedMatrix pack(const std::vector<RowBlock>& sources, int num_columns, Groups columns,
                  Arena* arena, ThreadPool* pool) {
  PackedMatrix packed;
  const int k = packed.k = columns.stretched(num_columns);
  std::vector<const uint16_t*> rows;  // null: zeros
  for (const RowBlock& source : sources) {
    for (int row = 0; row < source.rows; ++row) {
      rows.push_back(source.data + static_cast<size_t>(row) * num_columns);
      if ((row + 1) % source.groups.size != 0) continue;
      rows.insert(rows.end(), source.groups.width - source.groups.size, nullptr);
    }
  }
  packed.n = static_cast<int>(rows.size());
  packed.panels = arena->take<uint16_t>(packed_elements(packed.n, k));
  pool->run(packed.num_panels(), [&](int index, int) {
    const int first = index * kPanelColumns;
    const int count = std::min(kPanelColumns, packed.n - first);
    uint16_t* panel = packed.panels + static_cast<size_t>(index) * k * kPanelColumns;
    for (int i = 0, target = 0; i < num_columns; ++i, ++target) {
      if (i > 0 && i % columns.size == 0) target += columns.width - columns.size;
      for (int j = 0; j < count; ++j) {
        if (rows[first + j] == nullptr) continue;
        panel[static_cast<size_t>(target) * kPanelColumns + j] = rows[first + j][i];
      }
    }
  });
  return packed;
}

void linear(const Compute& compute, const PackedMatrix& weights, Rows a, int m, Rows c,
            Store store) {
  const Cut cut(weights, m, compute.pool->num_threads());
  compute.pool->run(cut.num_items(), [&](int item, int thread) {
    const int row = cut.first_row(item);
    GemmArgs args =
        args_of(weights, a, row, cut.rows(item), cut.first_panel(item), cut.panels(item));
    args.store = store;
    args.c = c[row] + cut.first_panel(item) * kPanelColumns;
    args.c_stride = c.stride;
    args.scratch = compute.scratch_of(thread);
    compute.kernels->gemm(args);
  });
}

void gated_linear(const Compute& compute, Gate activate, const PackedMatrix& gate,
                  const PackedMatrix& up, Rows a, int m, Rows c) {
  const Cut cut(gate, m, compute.pool->num_threads());
  compute.pool->run(cut.num_items(), [&](int item, int thread) {
    const int row = cut.first_row(item), rows = cut.rows(item);
    float* gated = compute.scratch_of(thread) + kGemmScratch;
    float* upped = gated + size_t{kGemmRowsMax} * kPanelColumns;
    for (int i = 0; i < cut.panels(item); ++i) {
      const int panel = cut.first_panel(item) + i;
      for (const bool is_gate : {true, false}) {
        GemmArgs args = args_of(is_gate ? gate : up, a, row, rows, panel, 1);
        args.c = is_gate ? gated : upped;
        args.c_stride = kPanelColumns;
        args.scratch = compute.scratch_of(thread);
        compute.kernels->gemm(args);
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
