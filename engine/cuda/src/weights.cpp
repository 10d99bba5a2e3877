#include "weights.h"

#include <algorithm>

#include "bf16.h"

namespace kvasir::cuda {

namespace {

// Builds what the weight table asks for (see weight_table.h).
class Uploader {
 public:
  using Matrix = cuda::Matrix;
  using Vector = Buffer<float>;

  Uploader(const ModelShape& shape, const TensorMap& tensors, const Progress& progress,
           cudaStream_t stream)
      : shape_(shape), tensors_(tensors), progress_(progress), stream_(stream) {
    for (const auto& [name, tensor] : tensors) {
      size_t count = 1;
      for (const size_t dim : tensor.dims) count *= dim;
      total_bytes_ += count * sizeof(uint16_t);
    }
  }

  Matrix matrix(const std::vector<TensorRows>& sources, int num_columns, Groups columns,
                MatrixRole) {
    Matrix made;
    made.k = columns.stretched(num_columns);
    for (const TensorRows& source : sources) made.n += source.groups.stretched(source.rows);
    std::vector<uint16_t> host(static_cast<size_t>(made.n) * made.k);
    size_t first = 0;
    for (const TensorRows& source : sources) {
      const uint16_t* data = find_tensor(tensors_, source.name, source.rows, num_columns);
      for (int row = 0; row < source.rows; ++row) {
        uint16_t* target = &host[(first + source.groups.place(row)) * made.k];
        const uint16_t* from = data + static_cast<size_t>(row) * num_columns;
        for (int i = 0; i < num_columns; ++i) target[columns.place(i)] = from[i];
      }
      first += source.groups.stretched(source.rows);
    }
    made.values.upload(host, stream_);
    check(cudaStreamSynchronize(stream_), "copying weights to the device");  // `host` goes
    bytes_ += made.values.bytes();
    if (progress_) progress_(bytes_, std::max(total_bytes_, bytes_));
    return made;
  }

  Buffer<float> norm(const std::string& name, int size, Signal) {
    const uint16_t* bits = find_tensor(tensors_, name, size, 0);
    std::vector<float> values(size);
    for (int i = 0; i < size; ++i) values[i] = shape_.norm_offset + bf16_to_float(bits[i]);
    return floats(values);
  }

  Buffer<float> biases(const std::vector<TensorRows>& sources) {
    std::vector<float> values;
    for (const TensorRows& source : sources) {
      const size_t first = values.size();
      values.resize(first + source.groups.stretched(source.rows));
      const uint16_t* bits = find_tensor(tensors_, source.name, source.rows, 0);
      for (int i = 0; i < source.rows; ++i) {
        values[first + source.groups.place(i)] = bf16_to_float(bits[i]);
      }
    }
    return floats(values);
  }

  Buffer<uint16_t> embeddings() {
    if (shape_.has_tied_embeddings) return {};
    const size_t count = static_cast<size_t>(shape_.vocab_size) * shape_.hidden_size;
    Buffer<uint16_t> made(count);
    made.upload(find_tensor(tensors_, kEmbeddings, shape_.vocab_size, shape_.hidden_size), count,
                stream_);
    check(cudaStreamSynchronize(stream_), "copying weights to the device");
    bytes_ += made.bytes();
    return made;
  }

  size_t bytes() const { return bytes_; }

 private:
  Buffer<float> floats(const std::vector<float>& values) {
    Buffer<float> made(values.size());
    made.upload(values, stream_);
    check(cudaStreamSynchronize(stream_), "copying weights to the device");
    bytes_ += made.bytes();
    return made;
  }

  const ModelShape& shape_;
  const TensorMap& tensors_;
  const Progress& progress_;
  cudaStream_t stream_;
  size_t total_bytes_ = 0;
  size_t bytes_ = 0;
};

}  // namespace

Weights upload(const ModelShape& shape, const TensorMap& tensors, const Progress& progress,
               cudaStream_t stream) {
  Uploader uploader(shape, tensors, progress, stream);
  WeightTable table(shape, &uploader);
  Weights weights;
  for (int i = 0; i < shape.num_layers; ++i) weights.layers.push_back(table.layer(i));
  weights.final_norm = table.final_norm();
  weights.head = table.head();
  weights.embeddings = uploader.embeddings();
  weights.bytes = uploader.bytes();
  return weights;
}

}  // namespace kvasir::cuda
