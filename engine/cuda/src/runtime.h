// What the device code needs of CUDA, so that the same source runs on a GPU and, slowly, on a
// processor: there each thread of a block is a fiber and "device memory" is a heap of its own
// (emulation.h). Tests on machines without a GPU use that.
#pragma once

#ifdef KVASIR_CUDA_EMULATED
#include "emulation.h"
#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <tuple>

namespace kvasir::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Every product has this many rows: one shape means one kernel and one order of summation, so that
// a row's result does not depend on what shares the step with it. At 128 rows a product of a few
// tokens still takes the time of reading its weights.
inline constexpr int kTileRows = 128;
// Positions whose partial sums of attention are merged, in order.
inline constexpr int kSplitTokens = 512;
// Attention blocks that keep a large device busy twice over.
inline constexpr int kBusyBlocks = 264;

#ifdef __CUDACC__
inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The largest value of a warp, and the sum of its values by a fixed tree; every lane has the
// result.
__device__ inline float warp_max(float value) {
  for (int step = 16; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}
__device__ inline float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}
__device__ inline void warp_fence() { __syncwarp(); }
__device__ inline void block_fence() { __syncthreads(); }
#endif

// Launches a kernel with these arguments on a stream; a launch that fails throws.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned block, cudaStream_t stream,
            Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  std::tuple<Parameters...> values(arguments...);
  std::apply(
      [&](auto&... each) {
        void* pointers[] = {&each...};
        check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(block), pointers,
                               0, stream),
              "launching a kernel");
      },
      values);
}

}  // namespace kvasir::cuda
#endif
