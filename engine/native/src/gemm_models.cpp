// Slow models of instructions that this processor may lack, so that the kernels written for them
// can be tested anywhere. A model computes what the instruction's description says.
#include <cstring>

#include "bf16_pairs_gemm.h"
#include "tile_gemm.h"

namespace kvasir {

namespace {

struct Tile {
  uint8_t rows[kTileRows][kTileRowBytes];
};
thread_local Tile tiles[8];

template <class T>
T at(const Tile& tile, int row, int index) {
  T value;
  std::memcpy(&value, tile.rows[row] + index * sizeof(T), sizeof(T));
  return value;
}

struct AmxModel {
  static void configure() { std::memset(tiles, 0xEE, sizeof tiles); }  // no tile is zero by chance
  static void release() {}
  template <int kTile>
  static void zero() {
    std::memset(&tiles[kTile], 0, sizeof(Tile));
  }
  template <int kTile>
  static void load(const uint8_t* p, size_t stride) {
    for (int row = 0; row < kTileRows; ++row) {
      std::memcpy(tiles[kTile].rows[row], p + row * stride, kTileRowBytes);
    }
  }
  template <int kTile>
  static void store(uint8_t* p, size_t stride) {
    for (int row = 0; row < kTileRows; ++row) {
      std::memcpy(p + row * stride, tiles[kTile].rows[row], kTileRowBytes);
    }
  }
  // sums[m][n] += a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1], k rising
  template <int kSums, int kA, int kB>
  static void dot_bf16() {
    for_sums<float>(kSums, [](int m, int n, int k, float sum) {
      for (int i = 0; i < 2; ++i) {
        sum += bf16_to_float(at<uint16_t>(tiles[kA], m, 2 * k + i)) *
               bf16_to_float(at<uint16_t>(tiles[kB], k, 2 * n + i));
      }
      return sum;
    });
  }
  template <int kSums, int kA, int kB>
  static void dot_int8() {
    for_sums<int32_t>(kSums, [](int m, int n, int k, int32_t sum) {
      for (int i = 0; i < 4; ++i) {
        sum += at<int8_t>(tiles[kA], m, 4 * k + i) * at<uint8_t>(tiles[kB], k, 4 * n + i);
      }
      return sum;
    });
  }

 private:
  template <class Sum, class Body>
  static void for_sums(int index, const Body& body) {
    for (int m = 0; m < kTileRows; ++m) {
      for (int n = 0; n < kTileRows; ++n) {
        Sum sum = at<Sum>(tiles[index], m, n);
        for (int k = 0; k < kTileRows; ++k) sum = body(m, n, k, sum);
        std::memcpy(tiles[index].rows[m] + n * sizeof(Sum), &sum, sizeof sum);
      }
    }
  }
};

struct PairModel {
  static constexpr int kWidth = 16;
  static constexpr int kRows = 3;
  static constexpr int kColumns = 2;
  struct F {
    float lanes[kWidth];
  };
  struct Codes {
    uint16_t pairs[kWidth][2];
  };
  struct Inputs {
    uint16_t pair[2];
  };

  static F zero() { return {}; }
  static F broadcast(float x) {
    F value;
    for (float& lane : value.lanes) lane = x;
    return value;
  }
  static F load(const float* p) { return copy<F>(p); }
  static void store(float* p, const F& x) { std::memcpy(p, &x, sizeof x); }
  [[gnu::noinline]] static F add(const F& a, const F& b) {
    F sum;
    for (int i = 0; i < kWidth; ++i) sum.lanes[i] = a.lanes[i] + b.lanes[i];
    return sum;
  }
  static Codes load_codes(const uint8_t* p) { return copy<Codes>(p); }
  static Inputs broadcast_inputs(const uint8_t* p) { return copy<Inputs>(p); }
  [[gnu::noinline]] static F dot(F sums, const Codes& codes, const Inputs& inputs) {
    for (int i = 0; i < kWidth; ++i) {
      for (const int half : {1, 0}) {
        sums.lanes[i] += bf16_to_float(codes.pairs[i][half]) * bf16_to_float(inputs.pair[half]);
      }
    }
    return sums;
  }

 private:
  template <class T>
  static T copy(const void* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
};

double exercise_nothing(int) { return 0; }

}  // namespace

GemmKernel amx_model_gemm(WeightFormat format) { return tile_gemm_of<AmxModel>(format); }

GemmKernel avx512bf16_model_gemm() {
  return {bf16_row_bytes, prepare_bf16_row, vec::multiply_pairs<PairModel>, exercise_nothing};
}

}  // namespace kvasir
