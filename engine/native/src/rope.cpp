#include <cmath>

#include "shape.h"

namespace kvasir {

void fill_rope_row(const ModelShape& shape, int position, float* cos, float* sin) {
  for (const Rope& rope : shape.ropes) {
    for (const float frequency : rope.inverse_frequencies) {
      // The angle is rounded to float32 as in the reference; its cosine is then exact to the last
      // bit.
      const float angle = static_cast<float>(position) * frequency;
      *cos++ = static_cast<float>(std::cos(static_cast<double>(angle))) * rope.scale;
      *sin++ = static_cast<float>(std::sin(static_cast<double>(angle))) * rope.scale;
    }
  }
}

}  // namespace kvasir
