// Memory of the device, freed with its owner.
#pragma once

#include <utility>
#include <vector>

#include "runtime.h"

namespace kvasir::cuda {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t count) { reserve(count); }
  ~Buffer() { cudaFree(data_); }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }

  // Room for at least so many; what was in it is lost if it grows.
  void reserve(size_t count) {
    if (count <= count_) return;
    cudaFree(data_);
    data_ = nullptr;
    count_ = 0;
    void* data = nullptr;
    check(cudaMalloc(&data, count * sizeof(T)), "allocating memory of the device");
    data_ = static_cast<T*>(data);
    count_ = count;
  }
  void upload(const T* from, size_t count, cudaStream_t stream) {
    reserve(count);
    if (count == 0) return;
    check(cudaMemcpyAsync(data_, from, count * sizeof(T), cudaMemcpyHostToDevice, stream),
          "copying to the device");
  }
  void upload(const std::vector<T>& from, cudaStream_t stream) {
    upload(from.data(), from.size(), stream);
  }
  void download(T* to, size_t count, cudaStream_t stream) const {
    check(cudaMemcpyAsync(to, data_, count * sizeof(T), cudaMemcpyDeviceToHost, stream),
          "copying from the device");
  }

  T* get() const { return data_; }
  size_t bytes() const { return count_ * sizeof(T); }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  cudaStream_t get() const { return stream_; }
  void wait() const { check(cudaStreamSynchronize(stream_), "computing a step"); }

 private:
  cudaStream_t stream_{};
};

}  // namespace kvasir::cuda
