#include "loader.h"

#include <algorithm>

#include "bf16.h"

namespace kvasir {

namespace {

constexpr size_t kSourceBytesTogether = size_t{16} << 20;

// The head decides about every token: with int4 weights it stays at int8. Routers are small.
WeightFormat format_of(MatrixRole role, WeightFormat format) {
  if (role == MatrixRole::kRouter) return WeightFormat::kBf16;
  const bool is_int4_head = role == MatrixRole::kHead && format == WeightFormat::kInt4;
  return is_int4_head ? WeightFormat::kInt8 : format;
}

// Panels whose source is packed before anybody may give its memory back.
int panels_together(const PackedMatrix& matrix) {
  const size_t panel = panel_bytes(WeightFormat::kBf16, matrix.k);
  return static_cast<int>(std::max(kSourceBytesTogether / panel, size_t{1}));
}

int stretched_rows(const std::vector<TensorRows>& sources) {
  int total = 0;
  for (const TensorRows& source : sources) total += source.groups.stretched(source.rows);
  return total;
}

// Builds nothing: counts what Loader takes of its arena.
class Sizer {
 public:
  struct Matrix {
    int bias = 0;
  };
  using Vector = int;

  explicit Sizer(WeightFormat format) : format_(format) {}

  Matrix matrix(const std::vector<TensorRows>& sources, int num_columns, Groups columns,
                MatrixRole role) {
    add(matrix_bytes(format_of(role, format_), stretched_rows(sources),
                     columns.stretched(num_columns)));
    return {};
  }
  int norm(const std::string&, int size, Signal) { return add(size * sizeof(float)); }
  int biases(const std::vector<TensorRows>& sources) {
    return add(stretched_rows(sources) * sizeof(float));
  }
  size_t total() const { return total_; }

 private:
  int add(size_t bytes) {
    total_ += round_up(bytes, kCacheLineBytes);
    return 0;
  }

  WeightFormat format_;
  size_t total_ = 0;
};

}  // namespace

size_t packed_bytes(const ModelShape& shape, WeightFormat format) {
  Sizer sizer(format);
  WeightTable table(shape, &sizer);
  for (int i = 0; i < shape.num_layers; ++i) table.layer(i);
  table.final_norm();
  table.head();
  return sizer.total();
}

PackedMatrix Loader::matrix(const std::vector<TensorRows>& sources, int num_columns, Groups columns,
                            MatrixRole role) {
  std::vector<RowBlock> blocks;
  for (const TensorRows& source : sources) {
    const uint16_t* data = arena_->is_filled()
                               ? nullptr
                               : find_tensor(tensors_, source.name, source.rows, num_columns);
    const float* divisors = role == MatrixRole::kUp ? balance_.of(Signal::kHidden) : nullptr;
    blocks.push_back({data, source.rows, source.groups, divisors});
  }
  const PackedMatrix packed = place(blocks, num_columns, columns, format_of(role, format_), arena_);
  if (arena_->is_filled()) return packed;
  const size_t panel = panel_bytes(packed.format, packed.k);
  const size_t before_bytes = packed.panels - arena_->data();
  const int num_together = panels_together(packed);
  for (int first = 0; first < packed.num_panels(); first += num_together) {
    const int end = std::min(first + num_together, packed.num_panels());
    pack(blocks, num_columns, columns, balance_.of(input_of(role)), packed, {first, end}, pool_);
    done_bytes_ = std::max(done_bytes_, before_bytes + end * panel);
    if (progress_) progress_(done_bytes_, arena_->bytes());
  }
  return packed;
}

const float* Loader::norm(const std::string& name, int size, Signal made) {
  float* values = arena_->take<float>(size);
  if (arena_->is_filled()) return values;
  const uint16_t* bits = find_tensor(tensors_, name, size, 0);
  const float* divisors = balance_.of(made);
  for (int i = 0; i < size; ++i) {
    values[i] = shape_.norm_offset + bf16_to_float(bits[i]);
    if (divisors != nullptr) values[i] /= divisors[i];
  }
  return values;
}

const float* Loader::biases(const std::vector<TensorRows>& sources) {
  float* values = arena_->take<float>(stretched_rows(sources));  // zeros
  if (arena_->is_filled()) return values;
  float* next = values;
  for (const TensorRows& source : sources) {
    const uint16_t* bits = find_tensor(tensors_, source.name, source.rows, 0);
    for (int i = 0; i < source.rows; ++i) next[source.groups.place(i)] = bf16_to_float(bits[i]);
    next += source.groups.stretched(source.rows);
  }
  return values;
}

const uint16_t* Loader::embeddings() {
  if (shape_.has_tied_embeddings && format_ == WeightFormat::kBf16) return nullptr;
  return find_tensor(tensors_, kEmbeddings, shape_.vocab_size, shape_.hidden_size);
}

}  // namespace kvasir
