// The forward pass on a CUDA device, behind the interface that the processor serves too.
#pragma once

#include <mutex>

#include "device.h"
#include "gemm.h"
#include "kernels.h"
#include "weights.h"

namespace kvasir::cuda {

class CudaModel final : public Device {
 public:
  CudaModel(const ModelShape& shape, const TensorMap& tensors, const Progress& progress);
  ~CudaModel() override;

  void attach_pool(const KvPool& pool) override;
  void forward(const Step& step) override;

  const ModelShape& shape() const override { return shape_; }
  std::string path() const override { return "cuda"; }
  int num_threads() const override { return 1; }
  size_t weight_bytes() const override { return weights_.bytes; }
  size_t layer_bytes() const override;

 private:
  // Of one step, grown to the largest step seen; rows in whole tiles of a product.
  struct Activations {
    Buffer<float> x, qkv, projected, gated, up, cos, sin, logits, choice_weights, expert_out;
    Buffer<uint16_t> normed, attended, hidden, expert_in;
    Buffer<int32_t> choices, slots, sources;
    Buffer<int32_t> ids, positions, seqs, tables, outputs, completes, arrived;
    Buffer<AttentionItem> items;
    Buffer<Partial> partials;
    Buffer<float> partial_sums;
  };
  // What the copying stream announces, layer by layer.
  struct Announcement {
    const Step* step;
    const KvPool* pool;
    int layer;
  };

  void take_in(const Step& step);
  void plan_attention(const Step& step);
  void attention(const Step& step, int index);
  void hand_out(const Step& step, int index);
  void project_to_stream(const Matrix& matrix, const uint16_t* from, const Buffer<float>& post_norm,
                         int rows);
  void feed_forward(const LayerWeights& layer, int rows);
  void gated(const Expert& expert, const uint16_t* in, int rows);
  void mixture(const LayerWeights& layer, int rows);
  void write_logits(const Step& step);
  void norm(const float* from, const Buffer<float>& weight, int rows, uint16_t* bf16, float* plain);
  void multiply(const Matrix& matrix, const uint16_t* from, int rows, bool adds, float* to);
  template <class... Parameters, class... Arguments>
  void on_rows(void (*kernel)(Parameters...), int rows, Arguments... arguments) {
    launch(kernel, dim3(rows), kThreads, compute_.get(), arguments...);
  }

  ModelShape shape_;
  Stream compute_, copying_;
  cudaEvent_t layer_done_{};
  Gemm gemm_;
  Weights weights_;
  Buffer<float> frequencies_, rope_scales_;
  Activations act_;
  std::vector<AttentionItem> items_;
  int num_splits_ = 0;  // see Attention
  Tokens tokens_{};
  std::vector<Announcement> announcements_;
  KvPool host_;
  uint8_t* host_mapped_ = nullptr;  // the host's pool as the device sees it
  Buffer<uint8_t> pool_;
  std::mutex in_use_;
};

}  // namespace kvasir::cuda
