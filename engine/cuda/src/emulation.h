// A slow model of CUDA: blocks run one after another, the threads of a block as fibers that take
// turns at fences. A kernel that lacks a fence reads stale data here as it may on a device; memory
// of the device is not that of the host, so a forgotten copy shows.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __restrict__
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
using cudaEvent_t = void*;
using cudaError_t = int;

namespace kvasir::cuda {

inline constexpr unsigned kWarpThreads = 32;

// Small, so that small tests come to every branch; what they mean: runtime.h.
inline constexpr int kTileRows = 8;
inline constexpr int kSplitTokens = 64;
inline constexpr int kBusyBlocks = 12;

class Emulator {
 public:
  void run(dim3 grid, unsigned block, const std::function<void()>& body) {
    body_ = &body;
    while (fibers_.size() < block) fibers_.emplace_back();
    exchange_.resize(block);
    grid_dim = grid;
    block_dim = dim3(block);
    for (block_index.z = 0; block_index.z < grid.z; ++block_index.z) {
      for (block_index.y = 0; block_index.y < grid.y; ++block_index.y) {
        for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) run_block(block);
      }
    }
  }

  // Returns when all threads of the block (or of the warp: all of the block in lock step) are here.
  void fence() { swapcontext(&fibers_[thread_index.x].context, &scheduler_); }

  // The values of all lanes of this thread's warp.
  const float* exchange(float value) {
    const unsigned lane = thread_index.x;
    fence();  // nobody reads the values before any more
    exchange_[lane] = value;
    fence();
    return exchange_.data() + lane / kWarpThreads * kWarpThreads;
  }

  dim3 block_index, thread_index, block_dim, grid_dim;

 private:
  struct Fiber {
    Fiber() : stack(kStackBytes) {}
    ucontext_t context;
    std::vector<char> stack;
    bool is_done = true;
  };
  static constexpr size_t kStackBytes = 64 << 10;

  static void enter();

  void run_block(unsigned block) {
    for (unsigned i = 0; i < block; ++i) {
      Fiber& fiber = fibers_[i];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler_;
      fiber.is_done = false;
      makecontext(&fiber.context, &Emulator::enter, 0);
    }
    for (unsigned running = block; running > 0;) {
      unsigned ended = 0;
      for (unsigned i = 0; i < block; ++i) {
        if (fibers_[i].is_done) continue;
        thread_index = dim3(i, 0, 0);
        swapcontext(&scheduler_, &fibers_[i].context);
        ended += fibers_[i].is_done;
      }
      // Threads of one block end between the same fences, or some wait for ever.
      if (ended != 0 && ended != running) throw std::logic_error("threads diverge at a fence");
      running -= ended;
    }
  }

  std::vector<Fiber> fibers_;
  std::vector<float> exchange_;
  const std::function<void()>* body_ = nullptr;
  ucontext_t scheduler_;
};

inline Emulator& emulator() {
  static Emulator instance;
  return instance;
}

inline void Emulator::enter() {
  Emulator& self = emulator();
  (*self.body_)();
  self.fibers_[self.thread_index.x].is_done = true;
}

inline float warp_max(float value) {
  const float* lanes = emulator().exchange(value);
  float max = lanes[0];
  for (unsigned i = 1; i < kWarpThreads; ++i) max = std::fmax(max, lanes[i]);
  return max;
}
inline float warp_sum(float value) {
  const float* lanes = emulator().exchange(value);
  float sums[kWarpThreads];
  std::memcpy(sums, lanes, sizeof sums);
  for (unsigned step = kWarpThreads / 2; step > 0; step /= 2) {
    for (unsigned i = 0; i < step; ++i) sums[i] += sums[i + step];
  }
  return sums[0];
}
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline void warp_fence() { emulator().fence(); }
inline void block_fence() { emulator().fence(); }

inline void check(cudaError_t status, const char* what) {
  if (status != 0) throw std::runtime_error(what);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned block, cudaStream_t,
            Arguments... arguments) {
  emulator().run(grid, block, [&] { kernel(arguments...); });
}

}  // namespace kvasir::cuda

#define threadIdx kvasir::cuda::emulator().thread_index
#define blockIdx kvasir::cuda::emulator().block_index
#define blockDim kvasir::cuda::emulator().block_dim
#define gridDim kvasir::cuda::emulator().grid_dim

// The calls of the runtime that device.cu makes; streams are in order, so nothing is asynchronous.
enum { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum { cudaHostRegisterMapped = 1, cudaEventDisableTiming = 2, cudaStreamNonBlocking = 1 };
inline cudaError_t cudaMalloc(void** data, size_t bytes) {
  *data = std::calloc(bytes, 1);
  return *data == nullptr;
}
inline cudaError_t cudaFree(void* data) { return std::free(data), 0; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
  return std::memcpy(to, from, bytes), 0;
}
inline cudaError_t cudaHostRegister(void*, size_t, unsigned) { return 0; }
inline cudaError_t cudaHostUnregister(void*) { return 0; }
inline cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  return *device = host, 0;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned) { return 0; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return 0; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return 0; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return 0; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned) { return 0; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return 0; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return 0; }
template <class Body>
cudaError_t cudaLaunchHostFunc(cudaStream_t, Body body, void* data) {
  return body(data), 0;
}
