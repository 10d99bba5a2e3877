#include <cmath>

#include "shape.h"

namespace kvasir {

void fill_rope_row(const ModelShape& shape, int position, float* cos, float* sin) {
  const int half = shape.head_dim / 2;
  for (int i = 0; i < half; ++i) {
    // The angle is rounded to float32 as in the reference; its cosine is then exact to the last
    // bit.
    const float angle = static_cast<float>(position) * shape.inverse_frequencies[i];
    cos[i] = static_cast<float>(std::cos(static_cast<double>(angle))) * shape.rope_scale;
    sin[i] = static_cast<float>(std::sin(static_cast<double>(angle))) * shape.rope_scale;
  }
}

}  // namespace kvasir
