#include "balance.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "bf16.h"
#include "loader.h"
#include "model.h"

namespace kvasir {

namespace {

constexpr int kPromptTokens = 128;
constexpr int kPromptBlocks = kPromptTokens / kBlockTokens;
constexpr int kMeterColumns = 256;  // of one item
constexpr size_t kMeterBytes = size_t{16} << 20;
constexpr double kExponentMost = 8;

using Squares = std::vector<double>;  // of each channel, summed

// Builds nothing: measures the columns that meet each signal.
class ColumnMeter {
 public:
  struct Matrix {
    int bias = 0;
  };
  using Vector = int;

  ColumnMeter(const TensorMap& tensors, const Progress& progress, const Arena* arena,
              ThreadPool* pool)
      : tensors_(tensors), progress_(progress), arena_(arena), pool_(pool) {}

  Matrix matrix(const std::vector<TensorRows>& sources, int num_columns, Groups, MatrixRole role) {
    const Signal signal = input_of(role);
    if (signal == Signal::kOther || role == MatrixRole::kRouter) return {};
    Squares& squares = squares_[signal];
    squares.resize(num_columns);
    const int num_together = std::max<int>(kMeterBytes / sizeof(uint16_t) / num_columns, 1);
    for (const TensorRows& source : sources) {
      const uint16_t* data = find_tensor(tensors_, source.name, source.rows, num_columns);
      for (int row = 0; row < source.rows; row += num_together) {
        const int end = std::min(row + num_together, source.rows);
        add(data, {row, end}, &squares);
        if (progress_) progress_(arena_->used(), arena_->bytes());
      }
    }
    return {};
  }
  int norm(const std::string&, int, Signal) { return 0; }
  int biases(const std::vector<TensorRows>&) { return 0; }

  // What was measured since this was last asked.
  Squares take(Signal signal) { return std::exchange(squares_[signal], {}); }

 private:
  void add(const uint16_t* data, Range rows, Squares* squares) {
    const int num_columns = static_cast<int>(squares->size());
    pool_->run((num_columns + kMeterColumns - 1) / kMeterColumns, [&](int item, int) {
      const int first = item * kMeterColumns;
      const int count = std::min(kMeterColumns, num_columns - first);
      float sums[kMeterColumns] = {};
      for (int row = rows.from; row < rows.to; ++row) {
        const uint16_t* weights = data + static_cast<size_t>(row) * num_columns + first;
        for (int i = 0; i < count; ++i) {
          const float weight = bf16_to_float(weights[i]);
          sums[i] += weight * weight;
        }
      }
      for (int i = 0; i < count; ++i) (*squares)[first + i] += sums[i];
    });
  }

  const TensorMap& tensors_;
  const Progress& progress_;
  const Arena* arena_;
  ThreadPool* pool_;
  std::map<Signal, Squares> squares_;
};

// Shares of the channels in rows of n floats. Rows are rounded with scales of their own, so each
// counts as one, whatever its size.
Shares shares_of(Rows rows, int num_rows, int n) {
  Shares shares(n);
  for (int r = 0; r < num_rows; ++r) {
    double total = 0;
    for (int i = 0; i < n; ++i) total += double{rows[r][i]} * rows[r][i];
    if (!(total > 0)) continue;
    for (int i = 0; i < n; ++i) shares[i] += double{rows[r][i]} * rows[r][i] / total;
  }
  return shares;
}

// Channels without a size, on either side, stay as they are.
Factors factors_of(const Shares& inputs, const Squares& columns) {
  std::vector<double> exponents;
  double total = 0;
  int num_sized = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    exponents.push_back(std::log2(inputs[i] / columns[i]) / 4);  // of sqrt of a ratio of roots
    if (!std::isfinite(exponents.back())) continue;
    total += exponents.back();
    ++num_sized;
  }
  Factors factors;
  for (const double exponent : exponents) {
    const double off = std::isfinite(exponent) ? exponent - total / num_sized : 0;
    const double clamped = std::clamp(off, -kExponentMost, kExponentMost);
    factors.push_back(std::ldexp(1.0f, static_cast<int>(std::lround(clamped))));
  }
  return factors;
}

// Kernels that compute the same numbers on every path: packed weights do not say which one it was.
Kernels steady_kernels(const Kernels& fast) {
  constexpr int kInt8 = static_cast<int>(WeightFormat::kInt8);
  Kernels kernels = scalar_kernels();
  kernels.gemm[kInt8] = fast.gemm[kInt8];
  return kernels;
}

// One sequence of tokens from all over the vocabulary.
struct Prompt {
  std::vector<int32_t> ids, positions, blocks;
  int32_t num_tokens = kPromptTokens;
  std::vector<uint8_t> kv;

  Prompt(int vocab_size, size_t block_bytes) : kv(kPromptBlocks * block_bytes) {
    uint64_t state = 0;
    for (int i = 0; i < kPromptTokens; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX
      ids.push_back(static_cast<int32_t>((state >> 33) % static_cast<uint64_t>(vocab_size)));
      positions.push_back(i);
    }
    for (int i = 0; i < kPromptBlocks; ++i) blocks.push_back(i);
  }
  Step step() const {
    Step step{};
    step.token_ids = ids.data();
    step.positions = positions.data();
    step.num_tokens = num_tokens;
    step.seq_token_counts = &num_tokens;
    step.num_seqs = 1;
    step.block_tables = blocks.data();
    step.table_width = kPromptBlocks;
    return step;
  }
};

}  // namespace

void Model::load_balanced(const TensorMap& tensors, const Progress& progress, Loader* loader) {
  const Shares shares = load_balanced_layers(tensors, progress, loader);
  if (loader->embeddings() != nullptr) {  // a head that holds them stays as it is
    ColumnMeter meter(tensors, progress, &weights_, &pool_);
    WeightTable(shape_, &meter).head();
    Balance balance;
    balance.head_input = factors_of(shares, meter.take(Signal::kHeadInput));
    loader->set_balance(std::move(balance));
  }
  WeightTable table(shape_, loader);
  final_norm_ = table.final_norm();
  head_ = table.head();
}

Shares Model::load_balanced_layers(const TensorMap& tensors, const Progress& progress,
                                   Loader* loader) {
  // 1. A prompt and its embeddings.
  const Kernels kernels = std::exchange(kernels_, steady_kernels(kernels_));
  const KvFormat kv_format = std::exchange(kv_format_, KvFormat::kPlain);
  Prompt prompt(shape_.vocab_size, shape_.num_layers * layer_bytes());
  const Step step = prompt.step();
  kv_.data = prompt.kv.data();
  kv_.num_blocks = kPromptBlocks;
  kv_.block_bytes = shape_.num_layers * layer_bytes();
  embeddings_ = find_tensor(tensors, kEmbeddings, shape_.vocab_size, shape_.hidden_size);
  act_.reserve(shape_, kernels_, step.num_tokens);
  compute_.operand = act_.operand;
  embed(step);
  plan_attention(step);
  // 2. Each layer as it is, for the inputs of its products, then balanced in the same place.
  ColumnMeter meter(tensors, progress, &weights_, &pool_);
  WeightTable columns(shape_, &meter);
  WeightTable table(shape_, loader);
  const auto shares_behind = [&](const float* norm) {
    normalise(act_.x, norm, step.num_tokens, act_.normed);
    return shares_of(act_.normed, step.num_tokens, shape_.hidden_size);
  };
  for (int i = 0; i < shape_.num_layers; ++i) {
    const size_t start = weights_.used();
    columns.layer(i);
    const Layer& layer = layers_.emplace_back(table.layer(i));
    Balance balance;
    balance.attention_input =
        factors_of(shares_behind(layer.attention_norm), meter.take(Signal::kAttentionInput));
    attention(step, i);
    balance.feed_forward_input =
        factors_of(shares_behind(layer.feed_forward_norm), meter.take(Signal::kFeedForwardInput));
    feed_forward(layer, step.num_tokens);
    const Squares downs = meter.take(Signal::kHidden);
    if (!shape_.layers[i].is_sparse) {  // experts see too few tokens of the prompt
      const int inner = shape_.intermediate_size;
      balance.hidden = factors_of(shares_of(act_.hidden, step.num_tokens, inner), downs);
    }
    weights_.rewind(start);
    loader->set_balance(std::move(balance));
    layers_[i] = table.layer(i);
    loader->set_balance({});
  }
  // 3. What the head will see. Steps use the fast kernels.
  const size_t start = weights_.used();
  Shares shares = shares_behind(table.final_norm());
  weights_.rewind(start);
  kernels_ = kernels;
  kv_format_ = kv_format;
  kv_ = KvPool();
  act_ = Activations();
  return shares;
}

}  // namespace kvasir
