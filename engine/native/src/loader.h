// Packs named weights into the forward pass's form.
#pragma once

#include "balance.h"
#include "model.h"
#include "weight_table.h"

namespace kvasir {

// Bytes of packed weights, panels and float32 vectors.
size_t packed_bytes(const ModelShape& shape, WeightFormat format);

// Builds what the weight table asks for (see weight_table.h).
class Loader {
 public:
  using Matrix = PackedMatrix;
  using Vector = const float*;

  // Weights that the arena is filled with are only found again; `tensors` need no more than the
  // embeddings then.
  Loader(const ModelShape& shape, const TensorMap& tensors, WeightFormat format, Arena* arena,
         ThreadPool* pool, const Progress& progress)
      : shape_(shape),
        tensors_(tensors),
        format_(format),
        arena_(arena),
        pool_(pool),
        progress_(progress) {}

  // Of all that is asked for from now on.
  void set_balance(Balance balance) { balance_ = std::move(balance); }

  PackedMatrix matrix(const std::vector<TensorRows>& sources, int num_columns, Groups columns,
                      MatrixRole role);
  const float* norm(const std::string& name, int size, Signal made);
  const float* biases(const std::vector<TensorRows>& sources);
  const uint16_t* embeddings();  // row-major; null if the head holds them

 private:
  const ModelShape& shape_;
  const TensorMap& tensors_;
  WeightFormat format_;
  Arena* arena_;
  ThreadPool* pool_;
  const Progress& progress_;
  Balance balance_;
  size_t done_bytes_ = 0;  // at most so far
};

}  // namespace kvasir
