// What computes a step: the processor, or a device with memory of its own.
//
// The pool in host memory is where KV is exchanged with other workers. A device that keeps KV
// elsewhere copies blocks that `arrived` from it before it computes, and blocks that a step
// `completes` to it, layer by layer, before it raises their `ready` count.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "shape.h"

namespace kvasir {

// A named weight, bf16 bits, row-major; the memory belongs to the caller.
struct Tensor {
  const uint16_t* data;
  std::vector<size_t> dims;
};
using TensorMap = std::unordered_map<std::string, Tensor>;

// The values of a tensor of these dimensions (columns 0: a vector). Throws std::invalid_argument
// that names one which is missing or has other dimensions.
const uint16_t* find_tensor(const TensorMap& tensors, const std::string& name, size_t rows,
                            size_t columns);

// KV memory of the process: [num_blocks][num_layers][K|V], see KvLayout.
struct KvPool {
  uint8_t* data = nullptr;
  uint32_t* ready = nullptr;     // [num_blocks]: layers of a block that are final
  uint32_t* progress = nullptr;  // futex word, raised after `ready`
  int num_blocks = 0;
  size_t block_bytes = 0;
};

// One step of a mixed batch; the arrays' owner has checked shapes, not values.
struct Step {
  const int32_t* token_ids;  // [num_tokens]
  const int32_t* positions;  // [num_tokens], consecutive within a sequence
  int num_tokens;
  int num_layers;  // the first ones are computed, and K and V of the next, if there is one
  const int32_t* seq_token_counts;  // [num_seqs]
  int num_seqs;
  const int32_t* block_tables;  // [num_seqs][table_width]
  int table_width;
  const int32_t* output_rows;  // [num_outputs], tokens whose logits are wanted
  int num_outputs;
  float* logits;             // [num_outputs][vocab_size]
  const int32_t* completes;  // [num_completes], blocks whose last token is in this step
  int num_completes;
  const int32_t* arrived;  // [num_arrived], blocks that others filled since the last step
  int num_arrived;
};

struct KvMove;
struct KvSpan;

// Called with the bytes of weights that are in place, and those of all.
using Progress = std::function<void(size_t done_bytes, size_t total_bytes)>;

class Device {
 public:
  virtual ~Device() = default;

  // Throws std::invalid_argument if blocks of that size do not fit the model.
  virtual void attach_pool(const KvPool& pool) = 0;
  // Throws std::invalid_argument before anything is written if a value is out of range.
  virtual void forward(const Step& step) = 0;

  // body(row) for every row, on the threads that steps are computed with; not while one is.
  virtual void for_each_row(int count, const std::function<void(int)>& body) {
    for (int row = 0; row < count; ++row) body(row);
  }

  // KV between blocks of the pool, see kv_move.h. Throw std::invalid_argument for spans outside the
  // pool, and on devices that keep KV elsewhere.
  virtual void move_kv(const KvMove&) { throw std::invalid_argument("this device moves no KV"); }
  virtual void read_kv(int, const KvSpan&, float*) {
    throw std::invalid_argument("this device moves no KV");
  }

  virtual const ModelShape& shape() const = 0;
  virtual std::string path() const = 0;  // of kernels
  virtual int num_threads() const = 0;
  virtual size_t weight_bytes() const = 0;
  virtual size_t layer_bytes() const = 0;                         // of one block in the pool
  virtual std::span<const uint8_t> packed() const { return {}; }  // weights as they lie
};

// Throws std::invalid_argument if a value of the step is out of range.
void check_step(const Step& step, const ModelShape& shape, const KvPool& pool);

// Tells whoever waits for the step's completed blocks that one more layer of them is final.
void announce_layer(const Step& step, const KvPool& pool, int layer);

}  // namespace kvasir
