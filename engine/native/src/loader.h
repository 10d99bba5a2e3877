// Packs named weights into the forward pass's form.
#pragma once

#include "model.h"

namespace kvasir {

// Bytes of packed weights, panels and float32 vectors.
size_t packed_bytes(const ModelShape& shape, WeightFormat format);

class Loader {
 public:
  // is_filled: the arena holds the packed weights, which are only found again.
  Loader(const ModelShape& shape, const TensorMap& tensors, WeightFormat format, bool is_filled,
         Arena* arena, ThreadPool* pool, const Progress& progress)
      : shape_(shape),
        tensors_(tensors),
        format_(format),
        is_filled_(is_filled),
        arena_(arena),
        pool_(pool),
        progress_(progress) {}

  Layer layer(int index);
  PackedMatrix head();
  const float* final_norm() { return norm("model.norm", shape_.hidden_size); }
  const uint16_t* embeddings();  // row-major; null if the head holds them

 private:
  const uint16_t* find(const std::string& name, size_t rows, size_t columns) const;
  Groups heads() const { return {shape_.head_dim, shape_.head_width()}; }
  RowBlock rows(const std::string& name, int count, int columns, Groups groups = {}) const;
  PackedMatrix matrix(const std::vector<RowBlock>& sources, int num_columns, WeightFormat format,
                      Groups columns = {});
  const float* norm(const std::string& name, int size);
  const float* biases(const std::vector<std::string>& names, const std::vector<int>& sizes,
                      Groups groups);
  Expert expert(const std::string& prefix, int inner);
  void load_attention(const std::string& prefix, Layer* layer);
  void load_norms(const std::string& prefix, Layer* layer);

  const ModelShape& shape_;
  const TensorMap& tensors_;
  WeightFormat format_;
  bool is_filled_;
  Arena* arena_;
  ThreadPool* pool_;
  const Progress& progress_;
  size_t done_bytes_ = 0;
};

}  // namespace kvasir
