// Weights balanced against their inputs before both are rounded to int8.
//
// Channels of a product's input differ in size, and so do the columns of weights that they meet; a
// row has one scale, so small channels and small columns get few steps. With s_i = sqrt(size of
// input i / size of column i), x_i / s_i meets s_i w_i: the product is the same, and both sides are
// equally uneven (SmoothQuant, arXiv 2211.10438, section 4). Division is free: it goes into the
// norm that makes the input, or into the rows of the up projection. Factors are powers of two, so
// balancing itself rounds nothing, and models in bf16 compute the same bits with it.
//
// Sizes of inputs are measured: a made-up prompt passes through each layer as it is loaded.
#pragma once

#include <vector>

#include "weight_table.h"

namespace kvasir {

using Factors = std::vector<float>;  // of the channels of one signal, powers of two
using Shares = std::vector<double>;  // of its size

struct Balance {
  Factors attention_input, feed_forward_input, hidden, head_input;  // empty: as it is

  // Null: as it is.
  const float* of(Signal signal) const {
    switch (signal) {
      case Signal::kAttentionInput:
        return data_of(attention_input);
      case Signal::kFeedForwardInput:
        return data_of(feed_forward_input);
      case Signal::kHidden:
        return data_of(hidden);
      case Signal::kHeadInput:
        return data_of(head_input);
      case Signal::kOther:
        break;
    }
    return nullptr;
  }

 private:
  static const float* data_of(const Factors& factors) {
    return factors.empty() ? nullptr : factors.data();
  }
};

}  // namespace kvasir
