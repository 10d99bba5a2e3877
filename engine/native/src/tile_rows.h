// From a number of rows to code compiled for that number: tiles keep their sums in registers.
#pragma once

namespace kvasir::vec {

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// body(Constant<rows>{}) for rows in [1, kMost].
template <int kMost, class Body>
inline __attribute__((always_inline)) void with_rows(int rows, const Body& body) {
#define KVASIR_ROWS(R)                             \
  case R:                                          \
    if constexpr (R <= kMost) body(Constant<R>{}); \
    break;
  switch (rows) {
    KVASIR_ROWS(1)
    KVASIR_ROWS(2)
    KVASIR_ROWS(3)
    KVASIR_ROWS(4)
    KVASIR_ROWS(5)
    KVASIR_ROWS(6)
    KVASIR_ROWS(7)
    KVASIR_ROWS(8)
    KVASIR_ROWS(9)
    KVASIR_ROWS(10)
    KVASIR_ROWS(11)
    KVASIR_ROWS(12)
  }
#undef KVASIR_ROWS
}

}  // namespace kvasir::vec
