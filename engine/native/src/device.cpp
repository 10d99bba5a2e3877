#include "device.h"

#include <atomic>
#include <stdexcept>

#include "futex.h"

namespace kvasir {

namespace {

void require(bool condition, const char* text) {
  if (!condition) throw std::invalid_argument(text);
}

std::string dims_text(const std::vector<size_t>& dims) {
  std::string text = "[";
  for (const size_t dim : dims) text += (text.size() > 1 ? ", " : "") + std::to_string(dim);
  return text + "]";
}

}  // namespace

const uint16_t* find_tensor(const TensorMap& tensors, const std::string& name, size_t rows,
                            size_t columns) {
  const auto found = tensors.find(name);
  if (found == tensors.end()) throw std::invalid_argument("weights lack the tensor " + name);
  const std::vector<size_t> wanted =
      columns == 0 ? std::vector<size_t>{rows} : std::vector<size_t>{rows, columns};
  if (found->second.dims != wanted) {
    throw std::invalid_argument("tensor " + name + " has shape " + dims_text(found->second.dims) +
                                " where config.json implies " + dims_text(wanted));
  }
  return found->second.data;
}

void check_step(const Step& step, const ModelShape& shape, const KvPool& pool) {
  require(pool.data != nullptr, "no KV pool is attached");
  require(step.num_tokens > 0, "a step needs at least one token");
  const bool is_whole = step.num_layers == shape.num_layers;
  require(is_whole || (step.num_layers > 0 && step.num_layers < shape.num_layers),
          "num_layers must be between 1 and the model's");
  require(is_whole || (step.num_outputs == 0 && step.num_completes == 0),
          "only a step of all layers has logits and completes blocks");
  int64_t total = 0;
  for (int s = 0; s < step.num_seqs; ++s) {
    require(step.seq_token_counts[s] > 0, "seq_token_counts must be positive");
    total += step.seq_token_counts[s];
  }
  require(total == step.num_tokens, "seq_token_counts must add up to the number of tokens");
  for (int i = 0; i < step.num_tokens; ++i) {
    require(step.token_ids[i] >= 0 && step.token_ids[i] < shape.vocab_size,
            "a token id is outside the vocabulary");
  }
  for (int s = 0, token = 0; s < step.num_seqs; token += step.seq_token_counts[s++]) {
    const int first = step.positions[token];
    const int64_t last = int64_t{first} + step.seq_token_counts[s] - 1;
    require(first >= 0 && last / kBlockTokens < step.table_width,
            "a position lies outside its sequence's block table");
    for (int i = 1; i < step.seq_token_counts[s]; ++i) {
      require(step.positions[token + i] == first + i,
              "positions of a sequence must be consecutive");
    }
    const int32_t* table = step.block_tables + static_cast<size_t>(s) * step.table_width;
    for (int b = 0; b <= last / kBlockTokens; ++b) {
      require(table[b] >= 0 && table[b] < pool.num_blocks, "a block id is outside the pool");
    }
  }
  for (int i = 0; i < step.num_outputs; ++i) {
    require(step.output_rows[i] >= 0 && step.output_rows[i] < step.num_tokens,
            "an output row is outside the step");
  }
  for (int i = 0; i < step.num_completes; ++i) {
    require(step.completes[i] >= 0 && step.completes[i] < pool.num_blocks,
            "a completed block is outside the pool");
  }
  for (int i = 0; i < step.num_arrived; ++i) {
    require(step.arrived[i] >= 0 && step.arrived[i] < pool.num_blocks,
            "an arrived block is outside the pool");
  }
}

void announce_layer(const Step& step, const KvPool& pool, int layer) {
  if (step.num_completes == 0) return;
  for (int i = 0; i < step.num_completes; ++i) {
    std::atomic_ref(pool.ready[step.completes[i]])
        .store(static_cast<uint32_t>(layer) + 1, std::memory_order_release);
  }
  std::atomic_ref(*pool.progress).fetch_add(1, std::memory_order_release);
  futex_wake_all(pool.progress);
}

}  // namespace kvasir
